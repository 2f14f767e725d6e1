// The service over HTTP. Addresses are relative to the page, so that a prefix before it and another public name do no harm.

import * as store from "./store.js";

const KEY = "alphalayer.key";

/** An answer that is an error: `problem` is its JSON (title, detail, hint, code, field); `besideField` are the words without the field. */
export class Refused extends Error {
  constructor(status, problem) {
    const words = [problem.detail, problem.hint].filter(Boolean).join(" ");
    const name = problem.field ? `${problem.field}: ` : "";
    super(name && words.startsWith(name) ? words : capital(words));
    this.besideField = capital(words.startsWith(name) ? words.slice(name.length) : words);
    this.status = status;
    this.problem = problem;
  }
}

const capital = (words) => words.charAt(0).toUpperCase() + words.slice(1);

/** No answer at all, or one of a proxy that speaks for a service that is not there. */
export class Away extends Error {
  constructor() {
    super("The service cannot be reached.");
  }
}

export const key = {
  /** "" also where what is kept cannot be sent. */
  read() {
    const kept = store.read(KEY) ?? "";
    return key.unfit(kept) ? "" : kept;
  },
  write: (text) => store.write(KEY, text),
  /** The first character that no header can carry; undefined if all is well. A user and a password go as base64 and may have any. */
  unfit: (text) => (text.includes(":") ? undefined : /[^ -~\u00a0-\u00ff]/u.exec(text)?.[0]),
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
export async function ask(path, { method = "GET", body, headers = {}, ...more } = {}) {
  // made here, so that a fault of ours is not taken for a service that is away
  const request = new Request(path, {
    method,
    headers: { "X-Requested-With": "fetch", ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...credentials(), ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
    ...more,
  });
  let answer;
  try {
    answer = await fetch(request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    reached(false);
    throw new Away();
  }
  const said = answer.ok ? null : await answer.json().catch(() => null);
  // the service gives its reasons; /readyz has them in a form of its own
  const isExplained = answer.ok || typeof said?.detail === "string" || typeof said?.ready === "boolean";
  const isAway = !isExplained && [502, 503, 504].includes(answer.status);
  reached(!isAway);
  if (isAway) throw new Away();
  if (answer.ok) return answer;
  throw new Refused(answer.status, isExplained ? said : { detail: unexplained(answer.status) });
}

const unexplained = (status) =>
  status === 413
    ? "This is too large for the way to the service: something before it does not let so much through."
    : `The service answered ${status} without a reason. Try again; its log may say more.`;

export const json = async (path, options) => (await ask(path, options)).json();
export const models = async () => (await json("alpha/v1/models")).models;

/** The fields of a request by name, from the API's description: their defaults and bounds. */
export async function fields() {
  const text = await (await ask("openapi.json")).text();
  // numbers beyond 2^53 stay text, because JSON.parse would round them
  const { paths, components } = JSON.parse(text.replace(/(: ?)(\d{16,})/g, '$1"$2"'));
  const { $ref } = paths["/alpha/v1/jobs"].post.requestBody.content["application/json"].schema;
  const { properties } = components.schemas[$ref.split("/").pop()];
  // the bounds of a field that may be null are those of its first choice
  return Object.fromEntries(Object.entries(properties).map(([name, field]) => [name, { ...field.anyOf?.[0], ...field }]));
}

/** The names of samplers and schedules, the schedule that "Automatic" means for each sampler, and the source of noise. */
export async function lists() {
  const [samplers, schedulers, options] = await Promise.all(["samplers", "schedulers", "options"].map((each) => json(`sdapi/v1/${each}`)));
  const labels = Object.fromEntries(schedulers.map((each) => [each.name, each.label]));
  return {
    samplers: samplers.map((each) => each.name),
    schedulers: Object.values(labels).filter((each) => each !== "Automatic"),
    automatic: Object.fromEntries(samplers.map((each) => [each.name, labels[each.options.scheduler]])),
    noise: options.randn_source,
  };
}

let unanswered = null; // a request that may have made a job or not: {text, name}

/** Submit a job. Throws `Refused` or `Away`; the same body sent again after `Away` finds the job that the first one made, if it made one. */
export async function submit(body) {
  const text = JSON.stringify(body);
  const sent = unanswered?.text === text ? unanswered : { text, name: freshName() };
  unanswered = sent;
  try {
    const job = await json("alpha/v1/jobs", { method: "POST", body: { ...body, previews: true }, headers: { "Idempotency-Key": sent.name } });
    unanswered = null;
    return job;
  } catch (error) {
    throw error instanceof Refused ? error : new Away();
  }
}

/** No randomUUID: browsers have that over HTTPS only. */
const freshName = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (each) => each.toString(16).padStart(2, "0")).join("");

export const look = (id) => json(`alpha/v1/jobs/${id}`);
export const cancel = (id, options) => json(`alpha/v1/jobs/${id}`, { method: "DELETE", ...options });
/** Whether it can draw: {ready, engines: how each is by its name, problem: what is wrong if that is known}. */
export const readiness = () =>
  json("readyz").catch((error) => {
    if (error.problem?.engines) return error.problem;
    throw error;
  });
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

export const isOver = (job) => ["done", "failed", "cancelled"].includes(job.state);

/** `told` gets a job at each change, until it is over, the connection ends, or `signal` says so. Holds a connection all the while. */
export async function stream(id, told, signal) {
  const answer = await ask(`alpha/v1/jobs/${id}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) told(JSON.parse(data));
    }
  }
}

function credentials() {
  const secret = key.read();
  if (!secret) return {};
  return secret.includes(":") ? { Authorization: `Basic ${base64(secret)}` } : { "X-API-Key": secret };
}

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
