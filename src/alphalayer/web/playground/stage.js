// The image, its background (checkerboard, white, black, a colour or a photo), zoom and alpha view.
// The same place shows a dropped image, a mask or layers.

const find = (id) => document.getElementById(id);
const stage = find("stage");
const image = find("image");
const viewport = find("viewport");
const ZOOMS = [0.25, 0.5, 1, 2, 4, 8];
const MAX_FIT = 2; // limit for enlarging small images to the frame
const PIXELATED_FROM = 4; // zoom from which single pixels are shown
let size = null;
let zoom = null; // null: fit into the frame
let photo = null;

let onEdit = () => {};

/** Set the listener. It is called if the user starts to choose what an image is for, or to paint. */
export const start = (listener) => (onEdit = listener);

/** Show one of the views: "image", "choose", "mask" or "layers". */
export function view(name) {
  stage.dataset.view = name;
  for (const part of stage.querySelectorAll("[data-show]")) part.hidden = part.dataset.show !== name;
  find("spread").hidden = name !== "layers";
  if (!isEditing()) return;
  onEdit();
  stage.scrollIntoView({ block: "nearest" });
}

/** Return whether the user chooses what an image is for, or paints a mask. */
export const isEditing = () => ["choose", "mask"].includes(stage.dataset.view);

/**
 * Show the image at a URL, with a layout size of `width` x `height`.
 * Previews (`isFinal` is false) have fewer pixels and no alpha.
 */
export function show(address, { alt, width, height, isFinal, onMissing = () => {} }) {
  view("image");
  size = { width, height };
  image.onerror = () => {
    image.hidden = true;
    if (isFinal) onMissing();
  };
  image.onload = () => {
    find("empty").hidden = true;
    image.hidden = false;
    layOut();
  };
  if (image.getAttribute("src") !== address || image.hidden) image.src = address;
  image.alt = alt;
  image.classList.toggle("preview", !isFinal);
}

/** Show a text instead of an image. */
export function blank(text) {
  view("image");
  size = null;
  image.hidden = true;
  image.removeAttribute("src");
  find("empty").hidden = false;
  find("empty").textContent = text;
  find("zoom-level").textContent = "–";
}

/** Use a photo, a File, as the background. */
export function setPhoto(file) {
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

const scale = () => zoom ?? Math.min(viewport.clientWidth / size.width, viewport.clientHeight / size.height, MAX_FIT);

function layOut() {
  find("zoom-fit").setAttribute("aria-pressed", String(zoom === null));
  if (!size) return;
  const factor = scale();
  image.style.width = `${Math.floor(size.width * factor)}px`;
  image.style.height = `${Math.floor(size.height * factor)}px`;
  find("zoom-level").textContent = `${Math.round(factor * 100)} %`;
  const overflows = viewport.scrollWidth > viewport.clientWidth || viewport.scrollHeight > viewport.clientHeight;
  image.draggable = !overflows;
  image.classList.toggle("movable", overflows);
  image.classList.toggle("pixels", factor >= PIXELATED_FROM);
}

/** Zoom. The point at `x`, `y` of the viewport stays in its place. */
function zoomTo(next, x = viewport.clientWidth / 2, y = viewport.clientHeight / 2) {
  if (!size) return;
  const across = (viewport.scrollLeft + x - image.offsetLeft) / image.offsetWidth;
  const down = (viewport.scrollTop + y - image.offsetTop) / image.offsetHeight;
  zoom = next;
  layOut();
  viewport.scrollTo(image.offsetLeft + across * image.offsetWidth - x, image.offsetTop + down * image.offsetHeight - y);
}

function step(direction) {
  if (!size) return;
  const factor = scale();
  const next = direction > 0 ? ZOOMS.find((level) => level > factor * 1.01) : ZOOMS.findLast((level) => level < factor * 0.99);
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
    const frame = viewport.getBoundingClientRect();
    const next = Math.min(Math.max(scale() * 2 ** (-event.deltaY / 200), ZOOMS[0]), ZOOMS.at(-1));
    zoomTo(next, event.clientX - frame.left, event.clientY - frame.top);
  },
  { passive: false },
);
// only for a mouse: the browser scrolls by touch itself
image.addEventListener("pointerdown", (event) => {
  if (event.pointerType === "mouse" && event.button === 0 && !image.draggable) image.setPointerCapture(event.pointerId);
});
image.addEventListener("pointermove", (event) => {
  if (event.pointerType === "mouse" && image.hasPointerCapture(event.pointerId)) viewport.scrollBy(-event.movementX, -event.movementY);
});
new ResizeObserver(layOut).observe(viewport);

// --- background

for (const radio of document.querySelectorAll("[name=backdrop]")) radio.addEventListener("change", () => choose(radio.value));
for (const kind of ["click", "input"]) {
  find("backdrop-color").addEventListener(kind, (event) => {
    stage.style.setProperty("--color", event.target.value);
    choose("color");
  });
}
find("choose-photo").addEventListener("click", () => find("open-photo").click());
find("alpha").addEventListener("change", (event) => {
  for (const shown of [image, find("stack")]) shown.classList.toggle("alpha", event.target.checked);
});
