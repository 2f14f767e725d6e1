// The picture and what lies behind it: checkerboard, white, black, a colour or a photo; zoom; the alpha channel alone.

const find = (id) => document.getElementById(id);
const stage = find("stage");
const picture = find("picture");
const viewport = find("viewport");
const ZOOMS = [0.25, 0.5, 1, 2, 4, 8];
let zoom = null;
let photo = null;

/** Show a picture by its address. `is_final` is false for previews, which are small and have no alpha. */
export function show(address, { alt, caption, isFinal }) {
  find("empty").hidden = true;
  picture.hidden = false;
  picture.src = address;
  picture.alt = alt;
  picture.classList.toggle("preview", !isFinal);
  find("actions").hidden = !isFinal;
  say(caption);
}

export const say = (text) => (find("caption").textContent = text);

/** Lay a photo, a File, behind the picture. */
export function layBehind(file) {
  if (photo) URL.revokeObjectURL(photo);
  photo = URL.createObjectURL(file);
  viewport.style.setProperty("--photo", `url("${photo}")`);
  choose("photo");
}

function choose(backdrop) {
  document.querySelector(`[name=backdrop][value=${backdrop}]`).checked = true;
  stage.dataset.backdrop = backdrop;
}

function resize() {
  viewport.classList.toggle("fit", zoom === null);
  picture.style.width = zoom === null ? "" : `${picture.naturalWidth * zoom}px`;
  find("zoom-fit").textContent = zoom === null ? "Fit" : `${zoom * 100} %`;
}

function change(by) {
  const now = zoom ?? picture.clientWidth / (picture.naturalWidth || 1);
  const next = by > 0 ? ZOOMS.find((each) => each > now * 1.01) : ZOOMS.findLast((each) => each < now * 0.99);
  zoom = next ?? zoom;
  resize();
}

for (const radio of document.querySelectorAll("[name=backdrop]")) {
  radio.addEventListener("change", () => {
    if (radio.value === "photo" && !photo) find("open-file").click();
    choose(radio.value);
  });
}
find("backdrop-color").addEventListener("input", (event) => {
  viewport.style.setProperty("--color", event.target.value);
  choose("color");
});
find("alpha").addEventListener("change", (event) => picture.classList.toggle("alpha", event.target.checked));
find("zoom-in").addEventListener("click", () => change(+1));
find("zoom-out").addEventListener("click", () => change(-1));
find("zoom-fit").addEventListener("click", () => {
  zoom = null;
  resize();
});
viewport.addEventListener("keydown", (event) => {
  if (event.key === "+" || event.key === "=") change(+1);
  else if (event.key === "-") change(-1);
  else if (event.key === "0") find("zoom-fit").click();
});
picture.addEventListener("load", resize);
resize();
