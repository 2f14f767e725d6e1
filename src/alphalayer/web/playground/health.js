// The line at the top: what is wrong with the service now. Its readiness is looked at as long as the page is open.

import * as jobs from "./jobs.js";
import * as service from "./service.js";

const EVERY_S = { ready: 5, notReady: 1 };
const line = document.getElementById("state");
const wrong = { reach: "", entry: "", engine: "" };

/** Say what is wrong with one of "reach", "entry" and "engine"; "" if nothing is. The line has the first of them. */
export function say(what, words) {
  wrong[what] = words;
  const first = Object.values(wrong).find(Boolean) ?? "";
  if (line.textContent !== first) line.textContent = first;
}

/** Look for ever, also for a service that is away. */
export async function keepLooking() {
  for (;;) {
    const isReady = await look().catch(() => false);
    await new Promise((resume) => setTimeout(resume, 1000 * (isReady ? EVERY_S.ready : EVERY_S.notReady)));
  }
}

async function look() {
  const { ready, engines, problem } = await service.readiness();
  const states = Object.values(engines);
  const why = problem ?? states.find((each) => each !== "ready" && each !== "starting");
  const isStarting = !why && states.includes("starting");
  say("engine", (ready && !problem) || isStarting ? "" : `The service cannot draw now: ${why ?? "its log may say why."}`);
  const words = isStarting ? "Starting: the model is being loaded" : "Waiting: the service cannot draw now";
  jobs.setWaiting(ready || states.includes("ready") ? "" : words);
  return ready;
}
