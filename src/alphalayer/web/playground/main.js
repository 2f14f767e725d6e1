// Connects the parts of the page.

import * as health from "./health.js";
import * as history from "./history.js";
import * as jobs from "./jobs.js";
import * as outside from "./outside.js";
import * as result from "./result.js";
import * as service from "./service.js";
import * as settings from "./settings.js";
import { snippet } from "./snippets.js";
import * as stage from "./stage.js";

const find = (id) => document.getElementById(id);
const pause = (seconds) => new Promise((resume) => setTimeout(resume, seconds * 1000));
const UNANSWERED = "The service did not respond, so the job may exist or not. Press Generate again when it is back: the job runs only once.";
const EMPTY = "Describe an image and press Generate. The image appears here, without a background.";
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
    updateCode();
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
  if (!settings.check() || isSending) return;
  if (isLocked) return requestKey();
  const body = settings.read();
  notify("");
  let job;
  isSending = true;
  find("generate-word").textContent = "Sending…";
  try {
    job = await service.submit(body);
    confirmSent();
  } catch (error) {
    find("generate-word").textContent = "Generate";
    if (error.status === 401) requestKey();
    else if (error instanceof service.Away) settings.showError(new Error(UNANSWERED));
    else settings.showError(error);
    return;
  } finally {
    isSending = false;
  }
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
  if (!isSending) find("generate-word").textContent = "Generate";
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
    const entries = await Promise.all(job.images.map((image, i) => entry(image, i, body)));
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

const defined = (all) => Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));

/** Show again what the stage showed before the jobs. */
function restore() {
  if (result.current()) result.present(result.current());
  else stage.blank(EMPTY);
}

// connecting checks whether the service rejects the current key
jobs.start(preview, () => isLocked || connect());
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

/** Use the settings of an image. A dropped image without settings becomes the background. */
async function importFile(file, isDropped) {
  try {
    const imported = await outside.readSettings(file);
    if (!imported && isDropped) return useAsBackground(file);
    if (!imported) return notify(`No settings were found in ${file.name}. ${outside.SUPPORTED} Images of Alphalayer, AUTOMATIC1111 and Forge have settings.`);
    const missing = [...imported.missing, ...reuse(imported.settings)];
    notify(`The settings of ${file.name} are in the form. ${describeMissing(missing)}`.trim());
  } catch (error) {
    showError(error);
  }
}

async function useAsBackground(file) {
  try {
    await outside.useAsBackground(file);
    notify(`${file.name} is the background.${outside.isTooLarge(file) ? ` ${outside.SUPPORTED}` : ""}`, { isBrief: true });
  } catch (error) {
    showError(error);
  }
}

function onFile(id, handle) {
  find(id).addEventListener("change", (event) => {
    if (event.target.files[0]) handle(event.target.files[0]);
    event.target.value = "";
  });
}

onFile("open-file", (file) => importFile(file, false));
onFile("open-photo", useAsBackground);
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
  if (event.dataTransfer.files[0]) importFile(event.dataTransfer.files[0], true);
});

// --- the request as code

function updateCode() {
  find("brief").textContent = settings.brief();
  const language = document.querySelector("[name=language]:checked").value;
  find("snippet").textContent = snippet(language, document.baseURI.split(/[?#]/)[0], settings.read(), needsKey || Boolean(service.key.read()));
}

for (const id of ["settings", "code-dialog"]) {
  for (const kind of ["input", "change"]) find(id).addEventListener(kind, updateCode);
}
find("drop-carried").addEventListener("click", updateCode);
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
