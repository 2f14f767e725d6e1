// The unfinished jobs of this page, and the one among them that the stage shows.
//
// The shown job is streamed while the page is visible. The others are polled.
// A browser has six connections to a service for all tabs: a stream for each job would use them up.

import * as service from "./service.js";

const INTERVAL_S = { usual: 2, stopping: 0.3 };
const find = (id) => document.getElementById(id);
const jobs = new Map();
let selected = null; // id of the job that the user selected; else the running one is shown
let isWatching = true; // false while a finished image is shown
let waitReason = ""; // why the service starts no job; else ""
let show = () => {};
let onKeyRejected = () => {};

/**
 * Set the callbacks.
 *
 * `onChange` is called with the shown job and the body of its request.
 * `onRejected` is called if the service rejects the key.
 */
export const start = (onChange, onRejected) => ([show, onKeyRejected] = [onChange, onRejected]);

/**
 * Follow a job until it is finished. Returns the job, and whether it was shown.
 * Throws `Refused` if the service has no such job.
 */
export async function follow(job, body) {
  const entry = { job, body, problem: "", isLive: false, turn: new AbortController(), row: row(job.id, body.prompt) };
  jobs.set(job.id, entry);
  watch();
  try {
    while (!service.isFinished(entry.job)) await turn(entry);
    return { job: entry.job, wasShown: current() === entry };
  } finally {
    const hadFocus = entry.row.item.contains(document.activeElement) || (current() === entry && document.activeElement === find("stop"));
    jobs.delete(job.id);
    entry.row.item.remove();
    render();
    // the positions of the others in the queue have changed
    for (const other of jobs.values()) if (!other.isLive) other.turn.abort();
    // the focus must not move to the cancel button of another job
    if (hadFocus) find("viewport").focus({ preventScroll: true });
  }
}

/** Stream a job while it is shown, or poll it once. */
async function turn(entry) {
  entry.turn = new AbortController();
  const { signal } = entry.turn;
  const onJob = (job) => update(entry, { job, problem: "" });
  try {
    if (entry.isLive) await service.stream(entry.job.id, onJob, signal);
    else onJob(await service.fetchJob(entry.job.id));
  } catch (error) {
    if (error.status === 404) throw error;
    if (!signal.aborted) update(entry, { problem: error.status === 401 ? "Waiting for the key" : "Waiting for the service" });
    if (error.status === 401) onKeyRejected();
  }
  if (!service.isFinished(entry.job)) await nextPoll(entry.isStopping ? INTERVAL_S.stopping : INTERVAL_S.usual, signal);
}

/** Wait for the next poll. All jobs poll at the same time: so their positions are consistent. */
function nextPoll(intervalS, signal) {
  return new Promise((resume) => {
    if (signal.aborted) return resume();
    signal.addEventListener("abort", resume);
    setTimeout(resume, intervalS * 1000 - (performance.now() % (intervalS * 1000)));
  });
}

/** Show the job with the id, or the running one. */
export function watch(id = null) {
  selected = id;
  isWatching = true;
  render();
  const entry = current();
  if (entry) show(entry.job, entry.body);
}

/** Show no job on the stage. */
export function unwatch() {
  isWatching = false;
  render();
}

/** Set the reason why the service starts no job, or "" if it does. */
export function setWaiting(reason) {
  waitReason = reason;
  render();
}

/** Return the ids of the unfinished jobs. */
export const ids = () => [...jobs.keys()];

const isRunning = (entry) => entry.job.position === 0;
const current = () => (isWatching ? jobs.get(selected) ?? [...jobs.values()].find(isRunning) ?? jobs.values().next().value : undefined);

function update(entry, changes) {
  Object.assign(entry, changes);
  render();
  if (current() === entry && !entry.problem && !service.isFinished(entry.job)) show(entry.job, entry.body);
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
  find("progress-bar").max = shown.job.steps || 1;
  find("progress-bar").value = isRunning(shown) ? shown.job.step : 0;
}

/** Describe the state of a job. */
function describe({ job, problem, isStopping, note }) {
  if (isStopping) return "Cancelling";
  if (note) return note;
  if (problem) return problem;
  if (waitReason && job.position > 0) return waitReason;
  const left = job.eta_s == null ? "" : `, ${duration(job.eta_s)} left`;
  if (job.position === 1) return `Next in the queue${left}`;
  if (job.position > 1) return `Number ${job.position} in the queue${left}`;
  if (job.stage === "sample" && job.steps) return `Step ${job.step} of ${job.steps}${left}`;
  return { load: "Loading the model", text: "Reading the prompt", inputs: "Reading the images", upscale: "Enlarging", vae: "Finishing", decode: "Finishing", store: "Saving" }[job.stage] ?? "Starting";
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
    update(entry, { job: await service.cancel(id), problem: "" });
    entry.turn.abort(); // poll immediately
  } catch (error) {
    // the button can be pressed again
    update(entry, { isStopping: false, note: `Not cancelled. ${error.message}` });
    setTimeout(() => update(entry, { note: "" }), 4000);
  }
}

function row(id, prompt) {
  const open = element("button", "what", prompt.slice(0, 200));
  open.title = "Show this job";
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
  const node = document.createElement(tag);
  if (tag === "button") node.type = "button";
  node.className = name;
  node.textContent = text;
  return node;
}

document.addEventListener("visibilitychange", render);
find("stop").addEventListener("click", () => {
  const shown = current();
  if (shown) cancel(shown.job.id);
});
