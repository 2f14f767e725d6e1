// Painting of a mask over an image. Each stroke is kept, so that it can be undone.

import * as stage from "./stage.js";

const find = (id) => document.getElementById(id);
const MAX_SIDE = 2048; // the service generates no larger images
const canvas = find("mask");
const pen = canvas.getContext("2d", { willReadFrequently: true });
const ring = find("brush-cursor");
let source = null; // the image that the mask belongs to
let strokes = [];
let undone = [];
let tool = "brush";
let stroke = null; // the one that is being painted
let place = [0, 0]; // of the ring, in pixels of the canvas

/** Show the mask of an image, {url, name, width, height}. That of another image is forgotten. */
export function open(image) {
  if (image !== source) {
    source = image;
    [strokes, undone] = [[], []];
    const factor = Math.min(1, MAX_SIDE / Math.max(image.width, image.height));
    [canvas.width, canvas.height] = [image.width, image.height].map((side) => Math.max(1, Math.round(side * factor)));
    place = [canvas.width / 2, canvas.height / 2];
    find("masked").src = image.url;
    find("masked").alt = image.name;
    find("easel").style.setProperty("--ratio", image.width / image.height);
  }
  stage.view("mask");
  render();
  canvas.focus({ preventScroll: true });
}

/** Return whether nothing is painted. */
export const isEmpty = (image) => image !== source || !pen.getImageData(0, 0, canvas.width, canvas.height).data.some(Boolean);

/** Return the mask as a PNG data URL: white is painted, black is not. */
export function read() {
  const copy = document.createElement("canvas");
  [copy.width, copy.height] = [canvas.width, canvas.height];
  const paper = copy.getContext("2d");
  paper.drawImage(canvas, 0, 0);
  fill(paper, "source-in", "#fff");
  fill(paper, "destination-over", "#000");
  return copy.toDataURL("image/png");
}

function fill(context, operation, color) {
  context.globalCompositeOperation = operation;
  context.fillStyle = color;
  context.fillRect(0, 0, context.canvas.width, context.canvas.height);
}

const ink = () => getComputedStyle(canvas).getPropertyValue("--mask").trim();

function render() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  for (const one of strokes) paint(one);
  find("mask-undo").disabled = strokes.length === 0;
  find("mask-redo").disabled = undone.length === 0;
  showRing();
}

/** Paint a stroke, or its last part alone. */
function paint({ kind, points, size }, from = 0) {
  if (kind === "clear") return pen.clearRect(0, 0, canvas.width, canvas.height);
  if (kind === "invert") return fill(pen, "source-out", ink());
  pen.globalCompositeOperation = kind === "brush" ? "source-over" : "destination-out";
  pen.strokeStyle = ink();
  pen.lineWidth = size;
  pen.lineCap = pen.lineJoin = "round";
  pen.beginPath();
  pen.moveTo(...points[from]);
  for (const point of points.slice(from)) pen.lineTo(...point);
  pen.stroke();
}

function add(one) {
  strokes.push(one);
  undone = [];
  render();
}

function undo() {
  if (strokes.length) undone.push(strokes.pop());
  render();
}

function redo() {
  if (undone.length) strokes.push(undone.pop());
  render();
}

function choose(name) {
  tool = name;
  for (const button of document.querySelectorAll("[data-tool]")) button.setAttribute("aria-pressed", String(button.dataset.tool === name));
}

/** Return the size of the brush in pixels of the canvas. The field has percent of the longer side. */
const size = () => Math.max(1, (find("brush-size").value / 100) * Math.max(canvas.width, canvas.height));

function resize(step) {
  find("brush-size").value = Number(find("brush-size").value) + step;
  showRing();
}

function showRing() {
  const [across, down] = [(size() / canvas.width) * 100, (size() / canvas.height) * 100];
  const [x, y] = [(place[0] / canvas.width) * 100, (place[1] / canvas.height) * 100];
  Object.assign(ring.style, { width: `${across}%`, height: `${down}%`, left: `${x - across / 2}%`, top: `${y - down / 2}%` });
}

function moveTo(x, y) {
  place = [x, y];
  showRing();
  if (!stroke) return;
  stroke.points.push(place);
  paint(stroke, stroke.points.length - 2);
}

function start() {
  stroke = { kind: tool, size: size(), points: [place] };
  paint(stroke);
}

function end() {
  if (stroke) add(stroke);
  stroke = null;
}

// --- pointer: one finger paints, two fingers zoom the page

function placeOf(event) {
  const frame = canvas.getBoundingClientRect();
  return [((event.clientX - frame.left) * canvas.width) / frame.width, ((event.clientY - frame.top) * canvas.height) / frame.height];
}

canvas.addEventListener("pointerdown", (event) => {
  if (!event.isPrimary || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  moveTo(...placeOf(event));
  start();
});
canvas.addEventListener("pointermove", (event) => {
  if (event.isPrimary) moveTo(...placeOf(event));
});
canvas.addEventListener("pointerup", end);
canvas.addEventListener("pointercancel", () => {
  stroke = null;
  render();
});

// --- keys

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const KEYS = { b: () => choose("brush"), e: () => choose("eraser"), i: () => add({ kind: "invert" }), "[": () => resize(-1), "]": () => resize(1) };

canvas.addEventListener("keydown", (event) => {
  const isCommand = event.ctrlKey || event.metaKey;
  const name = event.key.toLowerCase();
  if (isCommand && (name === "y" || (name === "z" && event.shiftKey))) redo();
  else if (isCommand && name === "z") undo();
  else if (isCommand || event.altKey) return;
  else if (MOVES[event.key]) moveBy(MOVES[event.key], event.shiftKey);
  else if (name === " ") stroke || start();
  else if (KEYS[name]) KEYS[name]();
  else return;
  event.preventDefault();
});
// Space paints while it is held
canvas.addEventListener("keyup", (event) => event.key === " " && end());
canvas.addEventListener("blur", end);

function moveBy([x, y], isFar) {
  const step = size() / (isFar ? 1 : 4);
  const within = (value, limit) => Math.min(Math.max(value, 0), limit);
  moveTo(within(place[0] + x * step, canvas.width), within(place[1] + y * step, canvas.height));
}

for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => choose(button.dataset.tool));
find("brush-size").addEventListener("input", showRing);
find("mask-undo").addEventListener("click", undo);
find("mask-redo").addEventListener("click", redo);
find("mask-invert").addEventListener("click", () => add({ kind: "invert" }));
find("mask-clear").addEventListener("click", () => add({ kind: "clear" }));
