// The status line at the top: the current problem of the service. The page polls its readiness.

import * as jobs from "./jobs.js";
import * as service from "./service.js";

const INTERVAL_S = { ready: 5, notReady: 1 };
const line = document.getElementById("state");
const problems = { reach: "", entry: "", engine: "" };

/** Report a problem of "reach", "entry" or "engine", or "". The line shows the first one. */
export function report(kind, text) {
  problems[kind] = text;
  const first = Object.values(problems).find(Boolean) ?? "";
  if (line.textContent !== first) line.textContent = first;
}

/** Poll the readiness forever, also if the service is unreachable. */
export async function poll() {
  for (;;) {
    const isReady = await check().catch(() => false);
    await new Promise((resume) => setTimeout(resume, 1000 * (isReady ? INTERVAL_S.ready : INTERVAL_S.notReady)));
  }
}

async function check() {
  const { ready, engines, problem } = await service.readiness();
  const states = Object.values(engines);
  const reason = problem ?? states.find((state) => state !== "ready" && state !== "starting");
  const isStarting = !reason && states.includes("starting");
  report("engine", (ready && !problem) || isStarting ? "" : `The service cannot generate images: ${reason ?? "its log may have the reason."}`);
  const text = isStarting ? "Starting: loading the model" : "Waiting: the service cannot generate images";
  jobs.setWaiting(ready || states.includes("ready") ? "" : text);
  return ready;
}
