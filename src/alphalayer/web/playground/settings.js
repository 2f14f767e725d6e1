// The form: settings in, the body of a request out, and what was wrong with it beside the field.

import { LAYERS } from "./infotext.js";

const NUMBERS = ["width", "height", "seed", "steps", "cfg_scale", "batch_size"];
const TEXTS = ["prompt", "negative_prompt", "checkpoint", "sampler_name", "scheduler"];
const CARRIED = [...Object.keys(LAYERS), "subseed", "subseed_strength"];
const SILENT = { negative_prompt: "bad, ugly", seed: 12345, batch_size: 1, layerdiffuse_enabled: true };
const BUILT_IN = "alphalayer-mini";
const MOST_SEED = 2n ** 63n - 1n;
const input = (name) => document.getElementById(name);

let models = [];
let lists = { samplers: [], schedulers: [] };
let carried = {}; // what a picture brought that the form has no field for

/** The body of a request: what is empty or as the service has it anyway is left out. */
export function read() {
  const body = {};
  for (const name of TEXTS) body[name] = input(name).value;
  for (const name of NUMBERS) body[name] = number(input(name).value.trim());
  body.layerdiffuse_enabled = input("layerdiffuse_enabled").checked;
  for (const [name, value] of Object.entries(body)) {
    const isSaid = name === "negative_prompt" || name === "prompt" || value !== "";
    if (!isSaid || SILENT[name] === value) delete body[name];
  }
  return { ...body, ...carried };
}

/** Whole numbers beyond 2^53 stay text, which the service reads as exactly that number. */
const number = (text) => (text === "" || (/^\d+$/.test(text) && !Number.isSafeInteger(Number(text))) ? text : Number(text));

/** Put settings into the form; what they do not name goes back to what it is at the start. Gives the names of what is not here, for which
 * the default is chosen. */
export function write(settings) {
  const values = { ...SILENT, prompt: "", ...settings };
  const missing = [];
  const choose = (name, word) => select(name, values[name]) || missing.push(`${word} ${values[name]}`);
  choose("checkpoint", "model");
  hint();
  for (const name of ["prompt", "negative_prompt", ...NUMBERS]) input(name).value = values[name] ?? "";
  choose("sampler_name", "sampler");
  choose("scheduler", "schedule");
  input("layerdiffuse_enabled").checked = values.layerdiffuse_enabled;
  carry(Object.fromEntries(CARRIED.filter((name) => values[name] !== undefined).map((name) => [name, values[name]])));
  return missing;
}

/** What the service draws with when it is sent `body`: the model's own values where the body has none. */
export function resolve(body) {
  const { sampler: sampler_name, ...defaults } = defaultsOf(body.checkpoint) ?? {};
  return { ...SILENT, ...defaults, sampler_name, checkpoint: usual()?.name, ...body };
}

/** The form in a few words. */
export function brief() {
  const { width, height, steps, seed } = resolve(read());
  return [width && height && `${width} × ${height}`, steps && `${steps} steps`, `seed ${seed}`].filter(Boolean).join(", ");
}

function carry(settings) {
  carried = settings;
  const words = extra(settings);
  input("carried").hidden = !words;
  input("carried-words").textContent = `Also: ${words}.`;
}

/** What settings say beyond the form's fields, in words. */
export const extra = (settings) =>
  CARRIED.filter((name) => settings[name] !== undefined)
    .map((name) => `${LAYERS[name] ?? { subseed: "variation seed", subseed_strength: "variation strength" }[name]} ${settings[name]}`)
    .join(", ");

// --- what there is to choose from

const usable = () => models.filter((each) => !each.problem);
const usual = () => usable().find((each) => each.is_default);
const defaultsOf = (checkpoint) => (usable().find((each) => each.name === checkpoint) ?? usual())?.defaults;

/** The models, and what `service.lists` gives. What is chosen stays chosen. */
export function offer(all) {
  ({ models, ...lists } = all);
  fill("checkpoint", usable().map((each) => each.name), usual()?.name);
  hint();
}

/** All that `offer` got. */
export const choices = () => ({ models: usable(), ...lists });

/** Where a field is empty, it shows what the chosen model takes. */
function hint() {
  const defaults = defaultsOf(input("checkpoint").value);
  input("checkpoint-help").hidden = (input("checkpoint").value || usual()?.name) !== BUILT_IN;
  for (const name of ["width", "height", "steps", "cfg_scale"]) input(name).placeholder = defaults?.[name] ?? "";
  fill("sampler_name", lists.samplers, defaults?.sampler);
  fill("scheduler", lists.schedulers, defaults?.scheduler);
}

/** The one that is taken unless another is chosen stands first and has the empty value. */
function fill(id, names, usual) {
  const before = input(id).value;
  const others = names.filter((each) => each !== usual).map((each) => new Option(each, each));
  input(id).replaceChildren(group("Default", [new Option(usual ?? "Default", "")]), ...(others.length ? [group("Others", others)] : []));
  select(id, before);
}

function group(label, options) {
  const made = document.createElement("optgroup");
  made.label = label;
  made.append(...options);
  return made;
}

/** Choose by name, or the default for none and for one that is not there; gives whether it is there. */
function select(id, name) {
  const found = [...input(id).options].find((each) => each.text === name);
  input(id).value = found?.value ?? "";
  return Boolean(found || !name);
}

input("checkpoint").addEventListener("change", hint);
input("drop-carried").addEventListener("click", () => {
  carry({});
  input("layerdiffuse_enabled").focus();
});

// --- what is wrong

/** Whether all fields can be sent; says beside each what it takes if not, and goes to the first. */
export function check() {
  const wrong = [...NUMBERS, "prompt"].filter((name) => !isRight(name)).map((name) => input(name));
  for (const control of wrong) mark(control, expected(control));
  // in the order of the form
  wrong.sort((a, b) => (a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1))[0]?.focus();
  return wrong.length === 0;
}

function isRight(name) {
  const { value, validity, min, max } = input(name);
  if (name === "prompt") return value.trim() !== "";
  if (name === "seed") return value.trim() === "" || (/^(-1|\d+)$/.test(value.trim()) && BigInt(value) <= MOST_SEED);
  if (value === "") return !validity.badInput;
  return Number(value) >= min && Number(value) <= max && (name === "cfg_scale" || Number.isInteger(Number(value)));
}

function expected({ id, min, max }) {
  if (id === "prompt") return "The prompt is empty. Say what to draw, for instance “an apple, high quality”.";
  if (id === "seed") return `A whole number up to ${MOST_SEED}, or −1 for another each time.`;
  return `${id === "cfg_scale" ? "A number" : "A whole number"} from ${min} to ${max}.`;
}

/** Say what the service found wrong, beside the field if it is one of the form's. */
export function fault(error) {
  const field = error.problem?.field;
  const place = field && input(`${field}-error`);
  if (!place) return void (input("form-error").textContent = error.message);
  mark(input(field), error.besideField);
  input(field).focus();
}

function mark(control, words) {
  input(`${control.id}-error`).textContent = words;
  control.setAttribute("aria-invalid", "true");
  const folded = control.closest("details");
  if (folded) folded.open = true;
}

export function clearFaults() {
  for (const each of document.querySelectorAll("#settings .fault")) each.textContent = "";
  for (const each of document.querySelectorAll("#settings [aria-invalid]")) each.removeAttribute("aria-invalid");
}
