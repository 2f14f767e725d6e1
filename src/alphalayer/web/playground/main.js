// Connects the parts of the page.

import * as choose from "./choose.js";
import * as health from "./health.js";
import * as history from "./history.js";
import * as images from "./images.js";
import * as jobs from "./jobs.js";
import * as layers from "./layers.js";
import * as outside from "./outside.js";
import * as result from "./result.js";
import * as service from "./service.js";
import * as settings from "./settings.js";
import { snippet } from "./snippets.js";
import * as stage from "./stage.js";
import * as task from "./task.js";

const find = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resume) => setTimeout(resume, seconds * 1000));
const UNANSWERED = "The service did not respond, so the job may exist or not. Press Generate again when it is back: the job runs only once.";
const EMPTY = "Describe an image and press Generate. The image appears here, without a background. Or drop an image.";
let needsKey = false;
let isLocked = false;
let noteTimer;

/** Show a message over the page. A brief one disappears after some seconds. */
function notify(text, { isBrief = false } = {}) {
  clearTimeout(noteTimer);
  find("note").textContent = text;
  if (isBrief) noteTimer = setTimeout(() => notify(""), 5000);
}

// --- the service

async function connect() {
  try {
    // one request first: without a key the service refuses one request, not three
    const models = await service.models();
    isLocked = false;
    settings.setChoices({ models, fields: await service.fields(), ...(await service.lists()) });
    health.report("entry", "");
    settings.clearErrors();
    task.update();
  } catch (error) {
    if (error.status === 401) return requestKey();
    if (error instanceof service.Away) return;
    health.report("entry", error.message);
    await pause(3);
    connect();
  }
}

service.onReach((isReachable) => {
  health.report("reach", isReachable ? "" : "The service cannot be reached. Trying again…");
  if (isReachable) connect();
});

// --- the key

function requestKey() {
  [needsKey, isLocked] = [true, true];
  const text = service.key.read() ? "This key is not known." : "This service needs a key.";
  health.report("entry", text);
  openKey(text);
}

function openKey(text) {
  find("key-error").textContent = text;
  // an open dialog keeps the text that the user types
  if (find("key-dialog").open) return;
  find("key").value = service.key.read();
  find("key-dialog").showModal();
}

find("open-key").addEventListener("click", () => openKey(""));
find("key-form").addEventListener("submit", (event) => {
  if (event.submitter?.value !== "save") return;
  const text = find("key").value.trim();
  const invalid = service.key.invalidCharacter(text);
  if (invalid) {
    event.preventDefault();
    find("key-error").textContent = `A key cannot contain “${invalid}”. Copy it again.`;
    return;
  }
  service.key.write(text);
  connect();
});

/** Show an error. If the key is missing or wrong, open its dialog. */
function showError(error) {
  if (error.status === 401) requestKey();
  else notify(error.message);
}

// --- jobs

let isSending = false;

async function generate() {
  settings.clearErrors();
  if (!settings.check() || !task.check() || isSending) return;
  if (isLocked) return requestKey();
  const body = { ...task.describe(), ...task.read() };
  notify("");
  let job;
  isSending = true;
  find("generate-word").textContent = "Sending…";
  try {
    job = await service.submit(`alpha/v1/${task.paths()[1]}`, { ...task.read(), ...(await task.readImages()) });
    confirmSent();
  } catch (error) {
    find("generate-word").textContent = task.verb();
    task.offerOpaque(error);
    if (error.status === 401) requestKey();
    else if (error instanceof service.Away) settings.showError(new Error(UNANSWERED));
    else settings.showError(error);
    return;
  } finally {
    isSending = false;
  }
  if (stage.isEditing()) showResult("");
  find("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  try {
    await finish(await jobs.follow(job, body), body);
  } catch (error) {
    if (!jobs.ids().length) restore();
    showError(error);
  }
}

async function confirmSent() {
  find("generate-word").textContent = "Sent ✓";
  await pause(1);
  if (!isSending) find("generate-word").textContent = task.verb();
}

/** Show the preview of an unfinished job. */
function preview(job, body) {
  result.hide();
  if (!job.preview_url) {
    if (!result.current()) stage.blank("");
    return;
  }
  const { width = 1024, height = 1024 } = settings.resolve(body);
  const address = service.fileAddress(service.nameOf(job.preview_url));
  stage.show(`${address}${address.includes("?") ? "&" : "?"}step=${job.step}`, { alt: "Preview", width, height, isFinal: false });
}

async function finish({ job, wasShown }, body) {
  if (job.state === "done") {
    const entries = await Promise.all(job.documents.length ? layerSets(job, body) : job.images.map((image, i) => entry(image, i, body)));
    for (const image of entries.toReversed()) past.add(image);
    if (wasShown) result.present(entries[0]);
    return;
  }
  if (wasShown) restore();
  if (job.state === "cancelled") return notify("Cancelled.", { isBrief: true });
  const reason = [job.error?.detail, job.error?.hint].filter(Boolean).join(" ");
  notify(`“${body.prompt.slice(0, 60)}” was not generated: ${reason}`);
}

/** Return the history entry of image number `i` of a batch, with all its settings. */
async function entry({ filename, seed, width, height }, i, body) {
  // numbers in JSON are exact only up to 2^53; all variations of a batch have the same seed
  const exact = Number.isSafeInteger(seed) ? seed : String(BigInt(body.seed) + BigInt(body.subseed_strength ? 0 : i));
  const own = { seed: exact, width, height, batch_size: 1 };
  if (body.subseed !== undefined) own.subseed = Number.isSafeInteger(body.subseed) ? body.subseed + i : String(BigInt(body.subseed) + BigInt(i));
  let used = settings.resolve(body);
  // without the list of the workers' models, the page does not know their defaults
  if (used.checkpoint === undefined) used = { ...(await outside.settingsOf(filename)), ...defined(used) };
  return { name: filename, seed: exact, width, height, settings: { ...used, ...own } };
}

/** Return the history entries of a job with layers, one for each set. */
function layerSets({ id, images, documents }, body) {
  const count = images.length / documents.length;
  return documents.map(async (_, i) => {
    const own = images.slice(i * count, (i + 1) * count);
    // the last layer shows the most
    return { ...(await entry(own.at(-1), i, body)), job: id, set: i + 1, layers: own.map(({ filename, role }) => ({ name: filename, role })) };
  });
}

const defined = (all) => Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));

/** Show again what the stage showed before the jobs. */
function restore() {
  if (!stage.isEditing()) showResult(EMPTY);
}

/** Show the last result, or a text if there is none. */
function showResult(text) {
  if (result.current()) result.present(result.current());
  else stage.blank(text);
}

// connecting checks whether the service rejects the current key
jobs.start(preview, () => isLocked || connect());
stage.start(jobs.unwatch);
layers.start(showError);
task.start(() => {
  if (!isSending) find("generate-word").textContent = task.verb();
  updateCode();
});
const past = history.start(service.fileAddress, service.isGone, (selected) => {
  notify("");
  jobs.unwatch();
  result.present(selected);
  find("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
});

find("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("settings").requestSubmit();
});
find("roll").addEventListener("click", () => {
  find("seed").value = Math.floor(Math.random() * 4294967294);
  updateCode();
});
// closing the page cancels its jobs
window.addEventListener("pagehide", (event) => {
  if (event.persisted) return;
  for (const id of jobs.ids()) service.cancel(id, { keepalive: true }).catch(() => {});
});

for (const format of ["png", "webp"]) {
  find(`save-${format}`).addEventListener("click", () => result.save(format).catch(showError));
}
find("use").addEventListener("click", () => result.file().then(choose.open).catch(showError));
find("reuse").addEventListener("click", () => notify(describeMissing(reuse(result.current().settings))));

const describeMissing = (names) => (names.length ? `Not available: ${names.join(", ")}.` : "");

/** Write settings into the form. Returns the names of what is not available here. */
function reuse(values) {
  const missing = settings.write(values);
  settings.clearErrors();
  updateCode();
  find("options").open = true;
  find("prompt").focus();
  return missing;
}

find("close-note").addEventListener("click", () => notify(""));

// --- image files of the user

/** Show an image and the choice what it is for. */
const openImage = (file) => choose.open(file).catch(showError);

choose.start({
  onSettings: useSettings,
  onPhoto: setBackground,
  onLeave() {
    showResult(EMPTY);
    if (jobs.ids().length) jobs.watch();
  },
});

/** Write the settings of an image into the form. */
function useSettings(name, read) {
  const missing = [...read.missing, ...reuse(read.settings)];
  notify(`The settings of ${name} are in the form. ${describeMissing(missing)}`.trim());
}

async function importFile(file) {
  try {
    await images.open(file);
    const read = await outside.readSettings(file);
    if (read) useSettings(file.name, read);
    else notify(`No settings were found in ${file.name}. ${outside.SUPPORTED} Images of Alphalayer, AUTOMATIC1111 and Forge have settings.`);
  } catch (error) {
    showError(error);
  }
}

function setBackground(file) {
  stage.setPhoto(file);
  notify(`${file.name} is the background.`, { isBrief: true });
}

function onFile(id, handle) {
  find(id).addEventListener("change", (event) => {
    if (event.target.files[0]) handle(event.target.files[0]);
    event.target.value = "";
  });
}

onFile("open-file", importFile);
onFile("open-image", openImage);
onFile("open-photo", (file) => images.open(file).then(() => setBackground(file), showError));
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  // text that comes with its image goes into the field
  if (!file || event.clipboardData.types.includes("text/plain")) return;
  event.preventDefault();
  openImage(file);
});
// dragged text keeps its usual target
const hasFiles = (event) => event.dataTransfer.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("dropping");
});
for (const kind of ["dragleave", "drop"]) document.addEventListener(kind, () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  if (event.dataTransfer.files[0]) openImage(event.dataTransfer.files[0]);
});

// --- the request as code

function updateCode() {
  find("brief").textContent = settings.brief();
  const language = document.querySelector("[name=language]:checked").value;
  find("snippet").textContent = snippet(language, {
    url: `${document.baseURI.split(/[?#]/)[0]}alpha/v1/${task.paths()[0]}`,
    body: task.read(),
    files: task.fileNames(),
    withKey: needsKey || Boolean(service.key.read()),
  });
}

for (const id of ["settings", "code-dialog"]) {
  for (const kind of ["input", "change"]) find(id).addEventListener(kind, updateCode);
}
find("drop-carried").addEventListener("click", updateCode);
find("go-opaque").addEventListener("click", () => {
  find("layerdiffuse_enabled").click();
  find("go-opaque").hidden = true;
  find("generate").focus({ preventScroll: true });
  find("settings").requestSubmit();
});
find("open-code").addEventListener("click", () => find("code-dialog").showModal());
find("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(find("snippet").textContent);
    find("copy").textContent = "Copied";
  } catch {
    // browsers deny the clipboard over plain HTTP: select the text, so that the user can copy it
    getSelection().selectAllChildren(find("snippet"));
    find("copy").textContent = "Selected";
  }
  await pause(2);
  find("copy").textContent = "Copy";
});

if (navigator.platform.startsWith("Mac")) find("shortcut").textContent = "⌘ + Enter";
// on narrow screens the image is below the form, so the settings are closed
find("options").open = matchMedia("(min-width: 60rem)").matches;
stage.blank(EMPTY);
updateCode();
connect();
health.poll();
