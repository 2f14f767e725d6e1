// Puts the parts of the page together.

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
const UNANSWERED = "The service did not answer, so it may have this or not. Draw again when it is back: it is drawn once all the same.";
const EMPTY = "Say what to draw and press Draw. The picture appears here, without a background.";
let needsKey = false;
let isLocked = false;
let vanishing;

/** A message over the page; one that only confirms what can be seen goes away by itself. */
function say(words, { isBrief = false } = {}) {
  clearTimeout(vanishing);
  find("note").textContent = words;
  if (isBrief) vanishing = setTimeout(() => say(""), 5000);
}

// --- the service

async function connect() {
  try {
    // one question first: without a key there is one refusal, not three
    const models = await service.models();
    isLocked = false;
    settings.offer({ models, fields: await service.fields(), ...(await service.lists()) });
    health.say("entry", "");
    settings.clearFaults();
    changed();
  } catch (error) {
    if (error.status === 401) return askForKey();
    if (error instanceof service.Away) return;
    health.say("entry", error.message);
    await pause(3);
    connect();
  }
}

service.onReach((isThere) => {
  health.say("reach", isThere ? "" : "The service cannot be reached. Looking for it…");
  if (isThere) connect();
});

// --- the key

function askForKey() {
  [needsKey, isLocked] = [true, true];
  const words = service.key.read() ? "This key is not known." : "This service needs a key.";
  health.say("entry", words);
  openKey(words);
}

function openKey(words) {
  find("key-error").textContent = words;
  // what is being typed stays
  if (find("key-dialog").open) return;
  find("key").value = service.key.read();
  find("key-dialog").showModal();
}

find("open-key").addEventListener("click", () => openKey(""));
find("key-form").addEventListener("submit", (event) => {
  if (event.submitter?.value !== "save") return;
  const typed = find("key").value.trim();
  const unfit = service.key.unfit(typed);
  if (unfit) {
    event.preventDefault();
    find("key-error").textContent = `A key has no “${unfit}” in it. Copy it once more.`;
    return;
  }
  service.key.write(typed);
  connect();
});

/** Say what went wrong; without a right key, ask for it. */
function explain(error) {
  if (error.status === 401) askForKey();
  else say(error.message);
}

// --- drawing

let isSending = false;

async function draw() {
  settings.clearFaults();
  if (!settings.check() || isSending) return;
  if (isLocked) return askForKey();
  const body = settings.read();
  say("");
  let job;
  isSending = true;
  find("draw-word").textContent = "Sending…";
  try {
    job = await service.submit(body);
    taken();
  } catch (error) {
    find("draw-word").textContent = "Draw";
    if (error.status === 401) askForKey();
    else if (error instanceof service.Away) settings.fault(new Error(UNANSWERED));
    else settings.fault(error);
    return;
  } finally {
    isSending = false;
  }
  find("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  try {
    await finish(await jobs.follow(job, body), body);
  } catch (error) {
    if (!jobs.ids().length) back();
    explain(error);
  }
}

async function taken() {
  find("draw-word").textContent = "Sent ✓";
  await pause(1);
  if (!isSending) find("draw-word").textContent = "Draw";
}

/** What the stage shows of a job that is not over. */
function preview(job, body) {
  result.hide();
  if (!job.preview_url) {
    if (!result.current()) stage.blank("");
    return;
  }
  const { width = 1024, height = 1024 } = settings.resolve(body);
  const address = `${service.fileAddress(service.nameOf(job.preview_url))}?step=${job.step}`;
  stage.show(address, { alt: "Preview", width, height, isFinal: false });
}

async function finish({ end, wasShown }, body) {
  if (end.state === "done") {
    const entries = await Promise.all(end.images.map((image, i) => entry(image, i, body)));
    for (const each of entries.toReversed()) past.add(each);
    if (wasShown) result.present(entries[0]);
    return;
  }
  if (wasShown) back();
  if (end.state === "cancelled") return say("Cancelled.", { isBrief: true });
  const why = [end.error?.detail, end.error?.hint].filter(Boolean).join(" ");
  say(`“${body.prompt.slice(0, 60)}” was not drawn: ${why}`);
}

/** An entry of the history: picture number `i` of a batch, with all that made it. */
async function entry({ filename, seed, width, height }, i, body) {
  // JSON's numbers are exact up to 2^53 only; a batch of variations is of one seed
  const exact = Number.isSafeInteger(seed) ? seed : String(BigInt(body.seed) + BigInt(body.subseed_strength ? 0 : i));
  const own = { seed: exact, width, height, batch_size: 1 };
  if (body.subseed !== undefined) own.subseed = Number.isSafeInteger(body.subseed) ? body.subseed + i : String(BigInt(body.subseed) + BigInt(i));
  let made = settings.resolve(body);
  // who does not know the workers' models does not know their values either
  if (made.checkpoint === undefined) made = { ...(await outside.drawnWith(filename)), ...defined(made) };
  return { name: filename, seed: exact, width, height, settings: { ...made, ...own } };
}

const defined = (all) => Object.fromEntries(Object.entries(all).filter(([, value]) => value !== undefined));

/** What was on the stage before the jobs. */
function back() {
  if (result.current()) result.present(result.current());
  else stage.blank(EMPTY);
}

// connecting finds out whether it is the key that is kept now that is not taken
jobs.start(preview, () => isLocked || connect());
const past = history.start(service.fileAddress, service.isGone, (chosen) => {
  say("");
  jobs.look();
  result.present(chosen);
  find("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
});

find("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  draw();
});
find("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("settings").requestSubmit();
});
find("roll").addEventListener("click", () => {
  find("seed").value = Math.floor(Math.random() * 4294967294);
  changed();
});
// a page that is closed leaves no work behind
window.addEventListener("pagehide", (event) => {
  if (event.persisted) return;
  for (const id of jobs.ids()) service.cancel(id, { keepalive: true }).catch(() => {});
});

for (const format of ["png", "webp"]) {
  find(`save-${format}`).addEventListener("click", () => result.save(format).catch(explain));
}
find("reuse").addEventListener("click", () => say(notHere(reuse(result.current().settings))));

const notHere = (names) => (names.length ? `Not here: ${names.join(", ")}.` : "");

/** Put settings into the form; gives the names of what is not here. */
function reuse(chosen) {
  const missing = settings.write(chosen);
  settings.clearFaults();
  changed();
  find("options").open = true;
  find("prompt").focus();
  return missing;
}

find("close-note").addEventListener("click", () => say(""));

// --- pictures from outside

/** `isDropped`: a picture without settings is then meant to lie behind. */
async function take(file, isDropped) {
  try {
    const found = await outside.carriedBy(file);
    if (!found && isDropped) return layBehind(file);
    if (!found) return say(`No settings were found in ${file.name}. ${outside.LOOKED_INTO} Those made here or by AUTOMATIC1111 and Forge have some.`);
    const missing = [...found.missing, ...reuse(found.settings)];
    say(`The settings of ${file.name} are in the form. ${notHere(missing)}`.trim());
  } catch (error) {
    explain(error);
  }
}

async function layBehind(file) {
  try {
    await outside.behind(file);
    say(`${file.name} lies behind the picture.${outside.isTooLarge(file) ? ` ${outside.LOOKED_INTO}` : ""}`, { isBrief: true });
  } catch (error) {
    explain(error);
  }
}

function onFile(id, taken) {
  find(id).addEventListener("change", (event) => {
    if (event.target.files[0]) taken(event.target.files[0]);
    event.target.value = "";
  });
}

onFile("open-file", (file) => take(file, false));
onFile("open-photo", layBehind);
// text that is dragged goes where it always goes
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
  if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0], true);
});

// --- the request as code

function changed() {
  find("brief").textContent = settings.brief();
  const language = document.querySelector("[name=language]:checked").value;
  find("snippet").textContent = snippet(language, document.baseURI.split(/[?#]/)[0], settings.read(), needsKey || Boolean(service.key.read()));
}

for (const place of ["settings", "code-dialog"]) {
  for (const kind of ["input", "change"]) find(place).addEventListener(kind, changed);
}
find("drop-carried").addEventListener("click", changed);
find("open-code").addEventListener("click", () => find("code-dialog").showModal());
find("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(find("snippet").textContent);
    find("copy").textContent = "Copied";
  } catch {
    // pages that come over plain HTTP from elsewhere may not write there: leave it selected, to be copied by hand
    getSelection().selectAllChildren(find("snippet"));
    find("copy").textContent = "Selected";
  }
  await pause(2);
  find("copy").textContent = "Copy";
});

if (navigator.platform.startsWith("Mac")) find("shortcut").textContent = "⌘ + Enter";
// where the picture stands below the form, what it needs every time comes first
find("options").open = matchMedia("(min-width: 60rem)").matches;
stage.blank(EMPTY);
changed();
connect();
health.keepLooking();
