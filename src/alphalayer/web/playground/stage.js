// The picture and what lies behind it: checkerboard, white, black, a colour or a photo; zoom; the alpha channel alone.

const find = (id) => document.getElementById(id);
const stage = find("stage");
const picture = find("picture");
const viewport = find("viewport");
const ZOOMS = [0.25, 0.5, 1, 2, 4, 8];
const MOST_FIT = 2; // small pictures are not blown up by themselves
const PIXELS_FROM = 4; // from here on, single pixels are what one wants to see
let size = null;
let zoom = null; // null: as large as fits
let photo = null;

/** Show a picture by its address, laid out at `width` x `height`: previews are smaller and have no alpha (`isFinal` is false). */
export function show(address, { alt, width, height, isFinal, missing = () => {} }) {
  size = { width, height };
  picture.onerror = () => {
    picture.hidden = true;
    if (isFinal) missing();
  };
  picture.onload = () => {
    find("empty").hidden = true;
    picture.hidden = false;
    layOut();
  };
  if (picture.getAttribute("src") !== address || picture.hidden) picture.src = address;
  picture.alt = alt;
  picture.classList.toggle("preview", !isFinal);
}

/** Words instead of a picture. */
export function blank(words) {
  size = null;
  picture.hidden = true;
  picture.removeAttribute("src");
  find("empty").hidden = false;
  find("empty").textContent = words;
  find("zoom-level").textContent = "–";
}

/** Lay a photo, a File, behind the picture. */
export function layBehind(file) {
  if (photo) URL.revokeObjectURL(photo);
  photo = URL.createObjectURL(file);
  stage.style.setProperty("--photo", `url("${photo}")`);
  find("photo-choice").hidden = false;
  find("choose-photo").textContent = "Other…";
  choose("photo");
}

function choose(backdrop) {
  document.querySelector(`[name=backdrop][value=${backdrop}]`).checked = true;
  stage.dataset.backdrop = backdrop;
}

// --- zoom

const scale = () => zoom ?? Math.min(viewport.clientWidth / size.width, viewport.clientHeight / size.height, MOST_FIT);

function layOut() {
  find("zoom-fit").setAttribute("aria-pressed", String(zoom === null));
  if (!size) return;
  const now = scale();
  picture.style.width = `${Math.floor(size.width * now)}px`;
  picture.style.height = `${Math.floor(size.height * now)}px`;
  find("zoom-level").textContent = `${Math.round(now * 100)} %`;
  const overflows = viewport.scrollWidth > viewport.clientWidth || viewport.scrollHeight > viewport.clientHeight;
  picture.draggable = !overflows;
  picture.classList.toggle("movable", overflows);
  picture.classList.toggle("pixels", now >= PIXELS_FROM);
}

/** Zoom; what lies at `x`, `y` of the viewport stays there. */
function zoomTo(next, x = viewport.clientWidth / 2, y = viewport.clientHeight / 2) {
  if (!size) return;
  const across = (viewport.scrollLeft + x - picture.offsetLeft) / picture.offsetWidth;
  const down = (viewport.scrollTop + y - picture.offsetTop) / picture.offsetHeight;
  zoom = next;
  layOut();
  viewport.scrollTo(picture.offsetLeft + across * picture.offsetWidth - x, picture.offsetTop + down * picture.offsetHeight - y);
}

function step(by) {
  if (!size) return;
  const now = scale();
  const next = by > 0 ? ZOOMS.find((each) => each > now * 1.01) : ZOOMS.findLast((each) => each < now * 0.99);
  if (next) zoomTo(next);
}

find("zoom-in").addEventListener("click", () => step(+1));
find("zoom-out").addEventListener("click", () => step(-1));
find("zoom-fit").addEventListener("click", () => zoomTo(null));
viewport.addEventListener("keydown", (event) => {
  if (event.key === "+" || event.key === "=") step(+1);
  else if (event.key === "-") step(-1);
  else if (event.key === "0") zoomTo(null);
});
viewport.addEventListener(
  "wheel",
  (event) => {
    if (!event.ctrlKey || !size) return;
    event.preventDefault();
    const place = viewport.getBoundingClientRect();
    const next = Math.min(Math.max(scale() * 2 ** (-event.deltaY / 200), ZOOMS[0]), ZOOMS.at(-1));
    zoomTo(next, event.clientX - place.left, event.clientY - place.top);
  },
  { passive: false },
);
// a mouse drags the picture; fingers scroll it by themselves
picture.addEventListener("pointerdown", (event) => {
  if (event.pointerType === "mouse" && event.button === 0 && !picture.draggable) picture.setPointerCapture(event.pointerId);
});
picture.addEventListener("pointermove", (event) => {
  if (event.pointerType === "mouse" && picture.hasPointerCapture(event.pointerId)) viewport.scrollBy(-event.movementX, -event.movementY);
});
new ResizeObserver(layOut).observe(viewport);

// --- what lies behind

for (const radio of document.querySelectorAll("[name=backdrop]")) radio.addEventListener("change", () => choose(radio.value));
for (const kind of ["click", "input"]) {
  find("backdrop-color").addEventListener(kind, (event) => {
    stage.style.setProperty("--color", event.target.value);
    choose("color");
  });
}
find("choose-photo").addEventListener("click", () => find("open-photo").click());
find("alpha").addEventListener("change", (event) => picture.classList.toggle("alpha", event.target.checked));
