// The jobs of this page that are not over, and the one among them that the stage shows.

import * as service from "./service.js";

const find = (id) => document.getElementById(id);
const jobs = new Map();
let chosen = null; // the id of a job that was chosen by hand; else the one that runs is shown
let isWatching = true; // false while a finished picture is looked at instead
let isStarting = false;
let show = () => {};

/** `shown` is called with a job that has news and its request's body, where the stage is to show it. */
export const start = (shown) => (show = shown);

/** Follow a job until it is over; gives how it ended, and whether it was on the stage. Throws `Refused`. */
export async function follow(job, body) {
  const entry = { now: job, body, isAway: false, row: row(job.id, body.prompt) };
  jobs.set(job.id, entry);
  watch();
  try {
    const end = await service.follow(
      job.id,
      (now) => update(entry, { now, isAway: false }),
      () => update(entry, { isAway: true }),
    );
    return { end, wasShown: current() === entry };
  } finally {
    const hadFocus = entry.row.item.contains(document.activeElement) || (current() === entry && document.activeElement === find("stop"));
    jobs.delete(job.id);
    entry.row.item.remove();
    render();
    // not to another button that cancels
    if (hadFocus) find("viewport").focus({ preventScroll: true });
  }
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

/** Whether the service is still starting, which is why nothing runs. */
export function setStarting(is) {
  isStarting = is;
  render();
}

/** The ids of the jobs that are not over. */
export const ids = () => [...jobs.keys()];

const runs = (entry) => entry.now.position === 0;
const current = () => (isWatching ? jobs.get(chosen) ?? [...jobs.values()].find(runs) ?? jobs.values().next().value : undefined);

function update(entry, news) {
  Object.assign(entry, news);
  render();
  if (current() === entry && !entry.isAway && !service.isOver(entry.now)) show(entry.now, entry.body);
}

function render() {
  const shown = current();
  for (const entry of jobs.values()) {
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
function describe({ now, isAway, isStopping, note }) {
  if (isStopping) return "Cancelling";
  if (note) return note;
  if (isAway) return "Waiting for the service";
  if (isStarting) return "Starting: the model is being loaded";
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
    await service.cancel(id);
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

find("stop").addEventListener("click", () => {
  const shown = current();
  if (shown) cancel(shown.now.id);
});
