// The form: settings in, the body of a request out, and errors beside their fields.

import { LAYERS } from "./infotext.js";

const NUMBERS = ["width", "height", "seed", "steps", "cfg_scale", "batch_size"];
const TEXTS = ["prompt", "negative_prompt", "checkpoint", "sampler_name", "scheduler"];
const CARRIED = [...Object.keys(LAYERS), "subseed", "subseed_strength"];
const ENABLED = "layerdiffuse_enabled";
const BUILT_IN = "alphalayer-mini";
const input = (name) => document.getElementById(name);

let models = [];
let fields = {}; // defaults and bounds by name; empty until the service has sent them
let lists = { samplers: [], schedulers: [] };
let carried = {}; // settings of an image that the form has no field for

/** The body of a request. Empty fields and defaults are left out. */
export function read() {
  const body = {};
  for (const name of TEXTS) body[name] = input(name).value;
  for (const name of NUMBERS) body[name] = number(input(name).value.trim());
  body[ENABLED] = input(ENABLED).checked;
  for (const [name, value] of Object.entries(body)) {
    // an empty negative prompt is a choice, once the form has shown its default
    const isSet = value !== "" || name === "prompt" || (name === "negative_prompt" && fields[name]);
    if (!isSet || value === fields[name]?.default) delete body[name];
  }
  return { ...body, ...carried };
}

/** Whole numbers beyond 2^53 stay text, which the service reads exactly. */
const number = (text) => (text === "" || (/^\d+$/.test(text) && !Number.isSafeInteger(Number(text))) ? text : Number(text));

/** Put settings into the form; other fields get their defaults. Returns the names of choices that are not here; their default is chosen. */
export function write(settings) {
  const values = { ...defaults(), prompt: "", ...settings };
  const missing = [];
  const choose = (name, word) => select(name, values[name]) || missing.push(`${word} ${values[name]}`);
  choose("checkpoint", "model");
  hint();
  for (const name of ["prompt", "negative_prompt", ...NUMBERS]) input(name).value = values[name] ?? "";
  choose("sampler_name", "sampler");
  choose("scheduler", "schedule");
  input(ENABLED).checked = values[ENABLED] ?? true;
  carry(Object.fromEntries(CARRIED.filter((name) => values[name] !== undefined).map((name) => [name, values[name]])));
  return missing;
}

/** The values that the service uses for `body`: those of the model where the body has none. */
export function resolve(body) {
  const { sampler: sampler_name, ...own } = defaultsOf(body.checkpoint) ?? {};
  return { ...defaults(), ...own, sampler_name, checkpoint: usual()?.name, ...body };
}

/** The defaults of the form's fields that do not depend on the model. */
function defaults() {
  const names = [...TEXTS, ...NUMBERS, ENABLED].filter((name) => (fields[name]?.default ?? null) !== null);
  return Object.fromEntries(names.map((name) => [name, fields[name].default]));
}

/** The form in a few words. */
export function brief() {
  const { width, height, steps, seed } = resolve(read());
  const size = width && height && `${width} × ${height}`;
  return [size, steps && `${steps} steps`, seed !== undefined && `seed ${seed}`].filter(Boolean).join(", ");
}

function carry(settings) {
  carried = settings;
  const words = extra(settings);
  input("carried").hidden = !words;
  input("carried-words").textContent = `Also: ${words}.`;
}

/** Settings without a field in the form, in words. */
export const extra = (settings) =>
  CARRIED.filter((name) => settings[name] !== undefined)
    .map((name) => `${LAYERS[name] ?? { subseed: "variation seed", subseed_strength: "variation strength" }[name]} ${settings[name]}`)
    .join(", ");

// --- choices, defaults and bounds

const usable = () => models.filter((each) => !each.problem);
const usual = () => usable().find((each) => each.is_default);
const defaultsOf = (checkpoint) => (usable().find((each) => each.name === checkpoint) ?? usual())?.defaults;

/** The models, the fields, and the result of `service.lists`. What is chosen stays chosen. */
export function offer(all) {
  ({ models, fields, ...lists } = all);
  for (const name of [...TEXTS, ...NUMBERS]) describe(input(name), fields[name]);
  describe(input("padding"), fields.trim_padding);
  input(ENABLED).defaultChecked = fields[ENABLED].default;
  fill("checkpoint", usable().map((each) => each.name), usual()?.name);
  hint();
}

/** Set an input's bounds and default. A value that the user has typed stays. */
function describe(control, { minimum, maximum, maxLength, default: value }) {
  if (control.tagName === "SELECT") return;
  if (minimum !== undefined) [control.min, control.max] = [minimum, maximum];
  if (maxLength !== undefined) control.maxLength = maxLength;
  if (value !== undefined && value !== null) control.defaultValue = value;
}

/** All that `offer` got. */
export const choices = () => ({ models: usable(), fields, ...lists });

/** Show the chosen model's values in empty fields. */
function hint() {
  const defaults = defaultsOf(input("checkpoint").value);
  input("checkpoint-help").hidden = (input("checkpoint").value || usual()?.name) !== BUILT_IN;
  for (const name of ["width", "height", "steps", "cfg_scale"]) input(name).placeholder = defaults?.[name] ?? "";
  fill("sampler_name", lists.samplers, defaults?.sampler);
  fill("scheduler", lists.schedulers, defaults?.scheduler);
}

/** Fill a list. The default is first and has the empty value. */
function fill(id, names, usual) {
  const before = input(id).value;
  const others = names.filter((each) => each !== usual).map((each) => new Option(each, each));
  input(id).replaceChildren(group("Default", [new Option(usual ?? "Default", "")]), ...(others.length ? [group("Others", others)] : []));
  select(id, before);
}

function group(label, options) {
  const element = document.createElement("optgroup");
  element.label = label;
  element.append(...options);
  return element;
}

/** Choose by name; the default without a name or for an unknown one. Returns whether it is known. */
function select(id, name) {
  const option = [...input(id).options].find((each) => each.text === name);
  input(id).value = option?.value ?? "";
  return Boolean(option || !name);
}

input("checkpoint").addEventListener("change", hint);
input("drop-carried").addEventListener("click", () => {
  carry({});
  input(ENABLED).focus();
});

// --- errors

/** Whether all fields are valid. Shows errors beside the fields and focuses the first. */
export function check() {
  const wrong = [...NUMBERS, "prompt"].filter((name) => !isRight(name)).map((name) => input(name));
  for (const control of wrong) mark(control, expected(control));
  // sorted as in the form
  wrong.sort((a, b) => (a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1))[0]?.focus();
  return wrong.length === 0;
}

function isRight(name) {
  const { value, validity, min, max } = input(name);
  if (name === "prompt") return value.trim() !== "";
  // without bounds the service checks
  if (name === "seed") return value.trim() === "" || (/^(-1|\d+)$/.test(value.trim()) && (!max || BigInt(value) <= BigInt(max)));
  if (value === "") return !validity.badInput;
  const isWithin = !max || (Number(value) >= Number(min) && Number(value) <= Number(max));
  return isWithin && (name === "cfg_scale" || Number.isInteger(Number(value)));
}

function expected({ id, min, max }) {
  if (id === "prompt") return "The prompt is empty. Say what to draw, for instance “an apple, high quality”.";
  if (id === "seed") return `A whole number up to ${max}, or −1 for another each time.`;
  return `${id === "cfg_scale" ? "A number" : "A whole number"} from ${min} to ${max}.`;
}

/** Show an error of the service, beside its field if the form has it. */
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
