// Layers of a finished job as a stack: each can be hidden, moved and downloaded.

import * as images from "./images.js";
import * as service from "./service.js";
import * as stage from "./stage.js";

const find = (id) => document.getElementById(id);
const NAMES = { image: "Image", foreground: "Foreground", background: "Background", blended: "Blended", composite: "Composite" };
let shown = null; // the entry of the history
let layers = []; // bottom to top: {name, title, isVisible, sheet, row}

/** Return whether a layer is visible at first. The blended image and the composite hide the others. */
const isVisible = (role, roles) => !roles.includes("composite") || ["foreground", "background"].includes(role);

/** Show the layers of an entry of the history. `onMissing` is called if one cannot be loaded. */
export function present(entry, onMissing) {
  shown = entry;
  const roles = entry.layers.map(({ role }) => role);
  layers = entry.layers.map(({ name, role }) => {
    const title = NAMES[role] ?? role;
    const layer = { name, title, isVisible: isVisible(role, roles) };
    layer.sheet = sheet(name, title, onMissing);
    layer.row = row(layer);
    return layer;
  });
  find("stack").style.setProperty("--ratio", entry.width / entry.height);
  find("moved").textContent = "";
  stage.view("layers");
  render();
}

/** Show the layers in their order, and list them from the top. */
function render() {
  const focused = document.activeElement;
  const visible = layers.filter(({ isVisible }) => isVisible);
  layers.forEach((layer, i) => {
    // from -0.5 to 0.5, of the visible layers
    layer.sheet.style.setProperty("--place", visible.length > 1 ? visible.indexOf(layer) / (visible.length - 1) - 0.5 : 0);
    layer.sheet.classList.toggle("off", !layer.isVisible);
    layer.row.eye.setAttribute("aria-pressed", String(layer.isVisible));
    layer.row.eye.replaceChildren(icon(layer.isVisible ? "eye" : "eyeoff"));
    layer.row.grip.setAttribute("aria-label", `Move ${layer.title}: layer ${layers.length - i} of ${layers.length}`);
  });
  find("stack").replaceChildren(...layers.map(({ sheet }) => sheet));
  find("layers").replaceChildren(...layers.toReversed().map(({ row }) => row.item));
  // moved elements lose the focus
  if (find("layers").contains(focused)) focused.focus();
}

function sheet(name, title, onMissing) {
  const node = element("div", "sheet");
  const image = new Image();
  image.alt = title;
  image.onerror = onMissing;
  image.src = service.fileAddress(name);
  node.append(image);
  return node;
}

function row(layer) {
  const item = document.createElement("li");
  const grip = button("icon grip", "", icon("move"));
  grip.title = "Drag, or use the arrow keys";
  const eye = button("icon eye", `Show ${layer.title}`, icon("eye"));
  const thumb = element("i", "thumb");
  const image = new Image(48, 48);
  image.alt = "";
  image.src = service.fileAddress(layer.name);
  thumb.append(image);
  const title = element("b", "");
  title.textContent = layer.title;
  const save = button("icon", `Download ${layer.title}`, icon("save"));
  item.append(grip, eye, thumb, title, save);
  eye.addEventListener("click", () => {
    layer.isVisible = !layer.isVisible;
    render();
  });
  save.addEventListener("click", () => download(service.fileAddress(layer.name), layer.name));
  grip.addEventListener("keydown", (event) => {
    const step = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    move(layer, layers.indexOf(layer) + step);
  });
  grip.addEventListener("pointerdown", (event) => grip.setPointerCapture(event.pointerId));
  grip.addEventListener("pointermove", (event) => {
    if (!grip.hasPointerCapture(event.pointerId)) return;
    const target = layers.findIndex((other) => isAt(other.row.item, event.clientY));
    if (target === -1 || target === layers.indexOf(layer)) return;
    move(layer, target);
    // a moved element loses the pointer, too
    grip.setPointerCapture(event.pointerId);
  });
  return { item, grip, eye };
}

function isAt(item, y) {
  const { top, bottom } = item.getBoundingClientRect();
  return top <= y && y < bottom;
}

function move(layer, index) {
  if (index < 0 || index >= layers.length) return;
  layers.splice(layers.indexOf(layer), 1);
  layers.splice(index, 0, layer);
  find("moved").textContent = `${layer.title} is layer ${layers.length - index} of ${layers.length}.`;
  render();
}

// --- downloads

let onError = () => {};

/** Set the receiver of errors. */
export const start = (listener) => (onError = listener);

async function download(address, name) {
  try {
    images.save(await (await service.send(address)).blob(), name);
  } catch (error) {
    onError(error);
  }
}

for (const control of document.querySelectorAll("[data-document]")) {
  control.addEventListener("click", () => {
    const kind = control.dataset.document;
    download(service.documentAddress(shown.job, kind, shown.set), shown.name.replace(/\.\w+$/, `.${kind}`));
  });
}
find("save-shown").addEventListener("click", () => {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [shown.width, shown.height];
  for (const { sheet, isVisible } of layers) if (isVisible) canvas.getContext("2d").drawImage(sheet.firstChild, 0, 0);
  canvas.toBlob((blob) => images.save(blob, shown.name.replace(/\.\w+$/, "_shown.png")));
});
for (const radio of document.querySelectorAll("[name=spread]")) {
  radio.addEventListener("change", () => find("stack").classList.toggle("spread", radio.value === "spread"));
}

// --- elements

function element(tag, name) {
  const node = document.createElement(tag);
  node.className = name;
  return node;
}

function button(name, label, content) {
  const node = element("button", name);
  node.type = "button";
  if (label) node.setAttribute("aria-label", label);
  node.append(content);
  return node;
}

function icon(name) {
  const SVG = "http://www.w3.org/2000/svg";
  const [node, use] = [document.createElementNS(SVG, "svg"), document.createElementNS(SVG, "use")];
  node.setAttribute("class", "i");
  node.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#i-${name}`);
  node.append(use);
  return node;
}
