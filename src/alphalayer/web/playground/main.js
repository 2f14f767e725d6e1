// Puts the parts of the page together.

import * as history from "./history.js";
import * as queue from "./queue.js";
import * as service from "./service.js";
import * as settings from "./settings.js";
import { snippet } from "./snippets.js";
import * as stage from "./stage.js";

const find = (id) => document.getElementById(id);
const running = new Set();
let models = [];
let needsKey = false;
let shown = null;
let watched = null;

const past = history.start(service.fileAddress, present);

// --- the service

async function connect() {
  try {
    settings.name(await Promise.all(["samplers", "schedulers"].map(names)));
    models = await service.models();
  } catch (error) {
    if (error.status === 401) return askForKey(error);
    find("state").textContent = error.message;
    return void setTimeout(connect, 2000);
  }
  settings.offer(models);
  find("state").textContent = models.some((each) => !each.problem) ? "" : unusable();
  renderCode();
}

async function names(list) {
  const all = await service.json(`sdapi/v1/${list}`);
  return all.map((each) => each.label ?? each.name).filter((each) => each !== "Automatic");
}

const unusable = () => models[0]?.problem ?? "There is no model to draw with. Run: alphalayer models pull";

function askForKey(error) {
  needsKey = true;
  find("state").textContent = error.message;
  find("key").value = service.key.read();
  if (!find("key-dialog").open) find("key-dialog").showModal();
}

find("open-key").addEventListener("click", () => {
  find("key").value = service.key.read();
  find("key-dialog").showModal();
});
find("key-dialog").addEventListener("close", () => {
  if (find("key-dialog").returnValue !== "save") return;
  service.key.write(find("key").value.trim());
  connect();
});

// --- drawing

async function draw() {
  settings.clearFaults();
  const body = settings.read();
  let job;
  try {
    job = await service.submit(body);
  } catch (error) {
    settings.fault(error);
    if (error.status === 401) askForKey(error);
    return;
  }
  const row = queue.row(body.prompt, () => stop(job.id, row));
  running.add(job.id);
  watched = job.id;
  find("stage").scrollIntoView({ block: "nearest" });
  try {
    const end = await service.follow(
      job.id,
      (now) => {
        row.update(now);
        if (watched === now.id && !service.isOver(now)) preview(now, body);
      },
      (error) => row.say(error.message),
    );
    finish(end, body);
  } catch (error) {
    stage.say(error.message);
  } finally {
    running.delete(job.id);
    row.remove();
  }
}

async function stop(id, row) {
  try {
    await service.cancel(id);
  } catch (error) {
    row.say(error.message);
  }
}

function preview(job, body) {
  const caption = `${body.prompt}: ${queue.describe(job).toLowerCase()}`;
  if (!job.preview_url) return stage.say(caption);
  stage.show(`${service.fileAddress(service.nameOf(job.preview_url))}?step=${job.step}`, { alt: "Preview", caption, isFinal: false });
}

function finish(job, body) {
  if (job.state === "done") {
    const entries = job.images.map(({ filename, seed, width, height }) => ({ name: filename, seed, width, height, body }));
    for (const entry of entries.toReversed()) past.add(entry);
    if (watched === job.id) present(entries[0]);
    return;
  }
  if (watched !== job.id) return;
  if (shown) present(shown);
  stage.say(job.state === "cancelled" ? "Cancelled." : [job.error?.detail, job.error?.hint].filter(Boolean).join(" "));
}

function present(entry) {
  shown = entry;
  const caption = `${entry.width}×${entry.height}, seed ${entry.seed}: ${entry.body.prompt}`;
  stage.show(service.fileAddress(entry.name), { alt: entry.body.prompt, caption, isFinal: true });
}

find("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("settings").requestSubmit();
});
find("roll").addEventListener("click", () => {
  find("seed").value = Math.floor(Math.random() * 4294967294);
  renderCode();
});
// a page that is closed leaves no work behind
window.addEventListener("pagehide", (event) => {
  if (event.persisted) return;
  for (const id of running) service.cancel(id, { keepalive: true }).catch(() => {});
});

// --- the finished picture

async function save(format) {
  const name = shown.name;
  try {
    const blob = await service.download(name, { format, trim: find("trimmed").checked, padding: find("padding").value || 0 });
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name.replace(/\.\w+$/, `.${format}`);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  } catch (error) {
    stage.say(error.message);
    if (error.status === 401) askForKey(error);
  }
}

find("save-png").addEventListener("click", () => save("png"));
find("save-webp").addEventListener("click", () => save("webp"));
find("reuse").addEventListener("click", () => reuse({ ...shown.body, seed: shown.seed }));

function reuse(body) {
  settings.write(body);
  settings.clearFaults();
  renderCode();
  find("prompt").focus();
}

// --- pictures from outside

async function open(file) {
  let read;
  try {
    read = await service.json("sdapi/v1/png-info", { method: "POST", body: { image: await base64(file) } });
  } catch (error) {
    if (error.status === 401) askForKey(error);
    return stage.say(error.message);
  }
  const body = settings.fromPicture(read.parameters, models);
  if (!body) {
    stage.layBehind(file);
    return stage.say(`${file.name} lies behind the picture.`);
  }
  reuse(body);
  stage.say(`The settings of ${file.name} are in the form.`);
}

const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });

find("open-file").addEventListener("change", (event) => {
  if (event.target.files[0]) open(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});

// --- the request as code

function renderCode() {
  const language = document.querySelector("[name=language]:checked").value;
  find("snippet").textContent = snippet(language, document.baseURI.split(/[?#]/)[0], settings.read(), needsKey || Boolean(service.key.read()));
}

find("settings").addEventListener("input", renderCode);
find("settings").addEventListener("change", renderCode);
find("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(find("snippet").textContent);
  } catch {
    // pages that come over plain HTTP from elsewhere may not write there: leave it selected, to be copied by hand
    getSelection().selectAllChildren(find("snippet"));
    find("copy").textContent = "Selected";
    return;
  }
  find("copy").textContent = "Copied";
  setTimeout(() => (find("copy").textContent = "Copy"), 2000);
});

connect();
