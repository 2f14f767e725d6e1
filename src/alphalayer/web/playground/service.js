// HTTP client of the service.
// URLs are relative to the page, so it works with any host name and path prefix.

import * as store from "./store.js";

const KEY = "alphalayer.key";

/**
 * An error response. `problem` is its JSON (title, detail, hint, code, field).
 * `besideField` is its text without the field.
 */
export class Refused extends Error {
  constructor(status, problem) {
    const text = [problem.detail, problem.hint].filter(Boolean).join(" ");
    const name = problem.field ? `${problem.field}: ` : "";
    super(name && text.startsWith(name) ? text : capitalize(text));
    this.besideField = capitalize(text.startsWith(name) ? text.slice(name.length) : text);
    this.status = status;
    this.problem = problem;
  }
}

const capitalize = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** No response, or a proxy's response for a service that does not run. */
export class Away extends Error {
  constructor() {
    super("The service cannot be reached.");
  }
}

export const key = {
  /** Return the stored key, or "" if there is none or it cannot be sent. */
  read() {
    const text = store.read(KEY) ?? "";
    return key.invalidCharacter(text) ? "" : text;
  },
  write: (text) => store.write(KEY, text),
  /**
   * Return the first character that is not valid in a header, or undefined.
   * user:password is sent as base64 and may have any character.
   */
  invalidCharacter: (text) => (text.includes(":") ? undefined : /[^ -~\u00a0-\u00ff]/u.exec(text)?.[0]),
};

let isReachable = true;
let reachListener = () => {};

/** Set the listener. It is called with false if the service is lost, with true if it is back. */
export const onReach = (listener) => (reachListener = listener);

function setReachable(value) {
  if (value === isReachable) return;
  isReachable = value;
  reachListener(value);
}

/** Send a request, and return a Response with a 2xx status. Throws `Refused` or `Away`. */
export async function send(path, { method = "GET", body, headers = {}, ...options } = {}) {
  // outside of the try block: an invalid request must not count as an unreachable service
  const request = new Request(path, {
    method,
    headers: { "X-Requested-With": "fetch", ...(body === undefined ? {} : { "Content-Type": "application/json" }), ...credentials(), ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
    ...options,
  });
  let response;
  try {
    response = await fetch(request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    setReachable(false);
    throw new Away();
  }
  const problem = response.ok ? null : await response.json().catch(() => null);
  // errors of the service have details; /readyz has its own format
  const isOurs = response.ok || typeof problem?.detail === "string" || typeof problem?.ready === "boolean";
  const isAway = !isOurs && [502, 503, 504].includes(response.status);
  setReachable(!isAway);
  if (isAway) throw new Away();
  if (response.ok) return response;
  throw new Refused(response.status, isOurs ? problem : { detail: describeStatus(response.status) });
}

const describeStatus = (status) =>
  status === 413
    ? "A proxy before the service refused this request as too large."
    : `The service answered ${status} without a reason. Try again. Its log may have the reason.`;

export const json = async (path, options) => (await send(path, options)).json();
export const models = async () => (await json("alpha/v1/models")).models;

/** Return the defaults and bounds of a request's fields by name, from /openapi.json. */
export async function fields() {
  const text = await (await send("openapi.json")).text();
  // numbers beyond 2^53 stay text, because JSON.parse would round them
  const { paths, components } = JSON.parse(text.replace(/(: ?)(\d{16,})/g, '$1"$2"'));
  const { $ref } = paths["/alpha/v1/jobs"].post.requestBody.content["application/json"].schema;
  const { properties } = components.schemas[$ref.split("/").pop()];
  // the bounds of a field that may be null are those of its first choice
  return Object.fromEntries(Object.entries(properties).map(([name, field]) => [name, { ...field.anyOf?.[0], ...field }]));
}

/** Return the names of samplers and schedules, the "Automatic" schedules, and the noise source. */
export async function lists() {
  const [samplers, schedulers, options] = await Promise.all(["samplers", "schedulers", "options"].map((name) => json(`sdapi/v1/${name}`)));
  const labels = Object.fromEntries(schedulers.map((scheduler) => [scheduler.name, scheduler.label]));
  return {
    samplers: samplers.map((sampler) => sampler.name),
    schedulers: Object.values(labels).filter((label) => label !== "Automatic"),
    automatic: Object.fromEntries(samplers.map((sampler) => [sampler.name, labels[sampler.options.scheduler]])),
    noise: options.randn_source,
  };
}

let unanswered = null; // a request without a response, which may have created a job: {text, key}

/**
 * Submit a job to a path. Throws `Refused` or `Away`.
 * After `Away`, the same body returns the job of the first request, if it created one.
 */
export async function submit(path, body) {
  const text = path + JSON.stringify(body);
  const submission = unanswered?.text === text ? unanswered : { text, key: randomKey() };
  unanswered = submission;
  try {
    const job = await jobOf(path, { method: "POST", body: { ...body, previews: true }, headers: { "Idempotency-Key": submission.key } });
    unanswered = null;
    return job;
  } catch (error) {
    throw error instanceof Refused ? error : new Away();
  }
}

/** Return a random key. Browsers have randomUUID only over HTTPS. */
const randomKey = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

export const fetchJob = (id) => jobOf(`alpha/v1/jobs/${id}`);
export const cancel = (id, options) => json(`alpha/v1/jobs/${id}`, { method: "DELETE", ...options });
/** Return the readiness: {ready, engines: state by name, problem: the reason if it is known}. */
export const readiness = () =>
  json("readyz").catch((error) => {
    if (error.problem?.engines) return error.problem;
    throw error;
  });

const signatures = new Map(); // the query of each signed URL, by file name

/** Keep the signatures of a job's URLs, and return the job. */
function learn(job) {
  for (const url of [job.preview_url, ...job.images.map((image) => image.url)].filter(Boolean)) {
    signatures.set(nameOf(url), new URL(url, document.baseURI).search);
  }
  for (const [kind, url] of Object.entries(job.documents[0] ?? {})) {
    signatures.set(documentName(job.id, kind), new URL(url, document.baseURI).search);
  }
  return job;
}

const jobOf = async (path, options) => learn(await json(path, options));

const documentName = (id, kind) => `${id}/layers.${kind}`;

/** Return the address of a file with all layers of a job's set: psd, ora, tiff or zip. */
export function documentAddress(id, kind, set) {
  const query = new URLSearchParams(signatures.get(documentName(id, kind)));
  if (set > 1) query.set("set", set);
  return `alpha/v1/jobs/${documentName(id, kind)}?${query}`;
}

let renewing = null;

/** Fetch new signatures of the newest jobs. Several calls at once send one request. */
function renew() {
  renewing ??= json("alpha/v1/jobs?limit=200")
    .then(({ jobs }) => jobs.forEach(learn), () => {})
    .finally(() => (renewing = null));
  return renewing;
}

export const fileAddress = (name) => `alpha/v1/file/${encodeURIComponent(name)}${signatures.get(name) ?? ""}`;

/**
 * Return whether the service removed an image, in contrast to an unreachable service.
 * If its address has expired, `fileAddress` has a new one afterwards.
 */
export async function isGone(name) {
  try {
    await send(fileAddress(name));
  } catch (error) {
    if (error.status === 403) await renew();
    return error.status === 404;
  }
  return false;
}

/** Return the name of a file: the last part of its URL. */
export const nameOf = (url) => decodeURIComponent(new URL(url, document.baseURI).pathname.split("/").pop());

/** Download a finished image as a Blob, optionally in another format or trimmed. */
export async function download(name, { format, trim, padding }) {
  const query = new URLSearchParams(trim ? { format, trim, trim_padding: padding } : { format });
  const signature = (signatures.get(name) ?? "").replace("?", "&");
  const path = format === "png" && !trim ? fileAddress(name) : `alpha/v1/convert/${encodeURIComponent(name)}?${query}${signature}`;
  return (await send(path)).blob();
}

export const isFinished = (job) => ["done", "failed", "cancelled"].includes(job.state);

/**
 * Call `onJob` at each change of a job, over one open connection.
 * It ends if the job is finished, the connection ends, or `signal` aborts.
 */
export async function stream(id, onJob, signal) {
  const response = await send(`alpha/v1/jobs/${id}/events`, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (data) onJob(learn(JSON.parse(data)));
    }
  }
}

function credentials() {
  const secret = key.read();
  if (!secret) return {};
  return secret.includes(":") ? { Authorization: `Basic ${base64(secret)}` } : { "X-API-Key": secret };
}

const base64 = (text) => btoa(String.fromCharCode(...new TextEncoder().encode(text)));
