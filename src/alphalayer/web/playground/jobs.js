// The jobs of this page that are not over, and the one among them that the stage shows.
//
// That one is streamed, as long as the page can be seen; the others are looked at now and then. A browser has six connections to a service
// for all its tabs together: streams of them all would leave none for anything else.

import * as service from "./service.js";

const LOOK_EVERY_S = { usual: 2, stopping: 0.3 };
const find = (id) => document.getElementById(id);
const jobs = new Map();
let chosen = null; // the id of a job that was chosen by hand; else the one that runs is shown
let isWatching = true; // false while a finished picture is looked at instead
let waiting = ""; // why nothing begins, if nothing does
let show = () => {};
let lacksKey = () => {};

/** `shown` is called with a job that has news and its request's body, where the stage is to show it; `refused` where the key is not taken. */
export const start = (shown, refused) => ([show, lacksKey] = [shown, refused]);

/** Follow a job until it is over; gives how it ended, and whether it was on the stage. Throws `Refused` where the service has no such job. */
export async function follow(job, body) {
  const entry = { now: job, body, trouble: "", isLive: false, turn: new AbortController(), row: row(job.id, body.prompt) };
  jobs.set(job.id, entry);
  watch();
  try {
    while (!service.isOver(entry.now)) await turn(entry);
    return { end: entry.now, wasShown: current() === entry };
  } finally {
    const hadFocus = entry.row.item.contains(document.activeElement) || (current() === entry && document.activeElement === find("stop"));
    jobs.delete(job.id);
    entry.row.item.remove();
    render();
    // their places in the queue have changed
    for (const each of jobs.values()) if (!each.isLive) each.turn.abort();
    // not to another button that cancels
    if (hadFocus) find("viewport").focus({ preventScroll: true });
  }
}

/** Follow a job until it comes onto the stage or leaves it, or for a while. */
async function turn(entry) {
  entry.turn = new AbortController();
  const { signal } = entry.turn;
  const told = (now) => update(entry, { now, trouble: "" });
  try {
    if (entry.isLive) await service.stream(entry.now.id, told, signal);
    else told(await service.look(entry.now.id));
  } catch (error) {
    if (error.status === 404) throw error;
    if (!signal.aborted) update(entry, { trouble: error.status === 401 ? "Waiting for the key" : "Waiting for the service" });
    if (error.status === 401) lacksKey();
  }
  if (!service.isOver(entry.now)) await nextLook(entry.isStopping ? LOOK_EVERY_S.stopping : LOOK_EVERY_S.usual, signal);
}

/** All look at the same moments, so that their places in the queue fit together. */
function nextLook(everyS, signal) {
  return new Promise((resume) => {
    if (signal.aborted) return resume();
    signal.addEventListener("abort", resume);
    setTimeout(resume, everyS * 1000 - (performance.now() % (everyS * 1000)));
  });
}

/** Look at the jobs: at the one with the id, or at whichever runs. */
export function watch(id = null) {
  chosen = id;
  isWatching = true;
  render();
  const entry = current();
  if (entry) show(entry.now, entry.body);
}

/** Look at something else. */
export function look() {
  isWatching = false;
  render();
}

/** Why the service begins with no job now, in words; "" if it does. */
export function setWaiting(words) {
  waiting = words;
  render();
}

/** The ids of the jobs that are not over. */
export const ids = () => [...jobs.keys()];

const runs = (entry) => entry.now.position === 0;
const current = () => (isWatching ? jobs.get(chosen) ?? [...jobs.values()].find(runs) ?? jobs.values().next().value : undefined);

function update(entry, news) {
  Object.assign(entry, news);
  render();
  if (current() === entry && !entry.trouble && !service.isOver(entry.now)) show(entry.now, entry.body);
}

function render() {
  const shown = current();
  for (const entry of jobs.values()) {
    const isLive = entry === shown && !document.hidden;
    if (isLive !== entry.isLive) {
      entry.isLive = isLive;
      entry.turn.abort();
    }
    entry.row.state.textContent = describe(entry);
    entry.row.open.setAttribute("aria-current", String(entry === shown));
  }
  find("queue").hidden = jobs.size === 0 || (jobs.size === 1 && Boolean(shown));
  find("progress").hidden = !shown;
  if (!shown) return;
  find("progress-prompt").textContent = shown.body.prompt.slice(0, 200);
  find("progress-words").textContent = describe(shown);
  find("progress-bar").max = shown.now.steps || 1;
  find("progress-bar").value = runs(shown) ? shown.now.step : 0;
}

/** How a job stands, in words. */
function describe({ now, trouble, isStopping, note }) {
  if (isStopping) return "Cancelling";
  if (note) return note;
  if (trouble) return trouble;
  if (waiting && now.position > 0) return waiting;
  const left = now.eta_s == null ? "" : `, ${duration(now.eta_s)} left`;
  if (now.position === 1) return `Next in the queue${left}`;
  if (now.position > 1) return `Number ${now.position} in the queue${left}`;
  if (now.stage === "sample" && now.steps) return `Step ${now.step} of ${now.steps}${left}`;
  return { load: "Loading the model", text: "Reading the prompt", vae: "Finishing", decode: "Finishing", store: "Saving" }[now.stage] ?? "Starting";
}

function duration(seconds) {
  if (seconds < 1.5) return "a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

async function cancel(id) {
  const entry = jobs.get(id);
  if (!entry || entry.isStopping) return;
  update(entry, { isStopping: true, note: "" });
  try {
    update(entry, { now: await service.cancel(id), trouble: "" });
    entry.turn.abort(); // look at once
  } catch (error) {
    // the button can be pressed again
    update(entry, { isStopping: false, note: `Not cancelled. ${error.message}` });
    setTimeout(() => update(entry, { note: "" }), 4000);
  }
}

function row(id, prompt) {
  const open = element("button", "what", prompt.slice(0, 200));
  open.title = "Look at this one";
  open.addEventListener("click", () => watch(id));
  const state = element("span", "how", "");
  const stop = element("button", "quiet", "Cancel");
  stop.setAttribute("aria-label", `Cancel ${prompt.slice(0, 200)}`);
  stop.addEventListener("click", () => cancel(id));
  const item = document.createElement("li");
  item.append(open, state, stop);
  find("jobs").append(item);
  return { item, open, state };
}

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (tag === "button") made.type = "button";
  made.className = name;
  made.textContent = text;
  return made;
}

document.addEventListener("visibilitychange", render);
find("stop").addEventListener("click", () => {
  const shown = current();
  if (shown) cancel(shown.now.id);
});
