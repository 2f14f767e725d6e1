// The service over HTTP. Addresses are relative to the page, so that a prefix before it and another public name do no harm.

const KEY = "alphalayer.key";

/** An answer that is an error: `problem` is its JSON (title, detail, hint, code, field). */
export class Refused extends Error {
  constructor(status, problem) {
    const words = [problem.detail, problem.hint].filter(Boolean).join(" ");
    super(words.charAt(0).toUpperCase() + words.slice(1));
    this.status = status;
    this.problem = problem;
  }
}

/** No answer at all. */
export class Away extends Error {
  constructor() {
    super("The service cannot be reached.");
  }
}

export const key = {
  read: () => localStorage.getItem(KEY) ?? "",
  write: (value) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

let reachable = true;
let listen = () => {};

/** `told` is called with false when the service stops answering, and with true when it answers again. */
export const onReach = (told) => (listen = told);

function reached(is) {
  if (is === reachable) return;
  reachable = is;
  listen(is);
}

/** A request; the Response if it is 2xx. Throws `Refused` or `Away`. */
export async function ask(path, { method = "GET", body, ...more } = {}) {
  const headers = { "X-Requested-With": "fetch", ...credentials() };
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), ...more });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reached(false);
    throw new Away();
  }
  // a proxy that speaks for a service that is not there
  const isAway = [502, 504].includes(answer.status);
  reached(!isAway);
  if (isAway) throw new Away();
  if (answer.ok) return answer;
  const said = await answer.json().catch(() => ({}));
  const unexplained = { detail: `The service answered ${answer.status} without a reason. Try again; its log may say more.` };
  throw new Refused(answer.status, typeof said.detail === "string" ? said : unexplained);
}

export const json = async (path, options) => (await ask(path, options)).json();
export const models = async () => (await json("alpha/v1/models")).models;
export const submit = (body) => json("alpha/v1/jobs", { method: "POST", body: { ...body, previews: true } });
export const look = (id) => json(`alpha/v1/jobs/${id}`);
export const cancel = (id, options) => json(`alpha/v1/jobs/${id}`, { method: "DELETE", ...options });
/** Whether it can draw; false while it starts. */
export const isReady = async () => (await ask("ping")).status === 200;
export const fileAddress = (name) => `alpha/v1/file/${encodeURIComponent(name)}`;

/** Whether a picture is no longer kept, and not merely out of reach. */
export const isGone = (name) => ask(fileAddress(name)).then(() => false, (error) => error.status === 404);

/** The last part of an absolute address that the service gave: the name of a file. */
export const nameOf = (url) => decodeURIComponent(new URL(url, document.baseURI).pathname.split("/").pop());

/** A finished picture as a Blob, in another format or trimmed if asked for. */
export async function download(name, { format, trim, padding }) {
  const query = new URLSearchParams(trim ? { format, trim, trim_padding: padding } : { format });
  const path = format === "png" && !trim ? fileAddress(name) : `alpha/v1/convert/${encodeURIComponent(name)}?${query}`;
  return (await ask(path)).blob();
}

/** Follow a job until it is over; `told` gets it at each change. Calls `broken` and goes on when the service was away for a while. */
export async function follow(id, told, broken) {
  for (;;) {
    try {
      const job = await lastEvent(id, told);
      if (job && isOver(job)) return job;
    } catch (error) {
      if (error instanceof Refused) throw error;
      broken();
    }
    await new Promise((resume) => setTimeout(resume, 1500));
  }
}

export const isOver = (job) => ["done", "failed", "cancelled"].includes(job.state);

async function lastEvent(id, told) {
  const answer = await ask(`alpha/v1/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let job = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return job;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) told((job = JSON.parse(data)));
    }
  }
}

function credentials() {
  const secret = key.read();
  if (!secret) return {};
  return secret.includes(":") ? { Authorization: `Basic ${base64(secret)}` } : { "X-API-Key": secret };
}

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
