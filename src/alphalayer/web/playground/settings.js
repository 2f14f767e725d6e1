// The form: its values, the body of a request, and the errors beside the fields.

import { HIRES, LAYERS } from "./infotext.js";

const NUMBERS = ["width", "height", "seed", "steps", "cfg_scale", "batch_size"];
const TEXTS = ["prompt", "negative_prompt", "checkpoint", "sampler_name", "scheduler"];
const LABELS = { ...LAYERS, ...HIRES, subseed: "variation seed", subseed_strength: "variation strength" };
const EXTRA = Object.keys(LABELS);
const ENABLED = "layerdiffuse_enabled";
const BUILT_IN = "alphalayer-mini";
const input = (name) => document.getElementById(name);

let models = [];
let fields = {}; // defaults and bounds by name; empty until the service has sent them
let lists = { samplers: [], schedulers: [] };
let imageSize = {}; // the default size if the request has an image: {width, height}
let carried = {}; // settings of an image that have no field in the form

/** Return the fields of a request, without empty values and defaults of the service. */
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

/** Integers beyond 2^53 stay text, because the service reads text exactly. */
const number = (text) => (text === "" || (/^\d+$/.test(text) && !Number.isSafeInteger(Number(text))) ? text : Number(text));

/**
 * Write settings into the form, and defaults into the other fields.
 * Returns the names of what is not available here. The default replaces it.
 */
export function write(settings) {
  const values = { ...defaults(), prompt: "", ...settings };
  const missing = [];
  const choose = (name, label) => select(name, values[name]) || missing.push(`${label} ${values[name]}`);
  choose("checkpoint", "model");
  hint();
  for (const name of ["prompt", "negative_prompt", ...NUMBERS]) input(name).value = values[name] ?? "";
  choose("sampler_name", "sampler");
  choose("scheduler", "schedule");
  input(ENABLED).checked = values[ENABLED] ?? true;
  carry(Object.fromEntries(EXTRA.filter((name) => values[name] !== undefined).map((name) => [name, values[name]])));
  return missing;
}

/** Return the settings that the service uses for `body`, with the defaults of the model. */
export function resolve(body) {
  const { sampler: sampler_name, ...own } = defaultsOf(body.checkpoint) ?? {};
  return { ...defaults(), ...own, sampler_name, checkpoint: defaultModel()?.name, ...body };
}

/** Return the defaults of the form's fields that do not depend on the model. */
function defaults() {
  const names = [...TEXTS, ...NUMBERS, ENABLED].filter((name) => (fields[name]?.default ?? null) !== null);
  return Object.fromEntries(names.map((name) => [name, fields[name].default]));
}

/** Return a short summary of the form. */
export function brief() {
  const { width, height, steps, seed } = resolve({ ...imageSize, ...read() });
  const size = width && height && `${width} × ${height}`;
  return [size, steps && `${steps} steps`, seed !== undefined && `seed ${seed}`].filter(Boolean).join(", ");
}

function carry(settings) {
  carried = settings;
  const text = describeExtra(settings);
  input("carried").hidden = !text;
  input("carried-words").textContent = `Also: ${text}.`;
}

/** Describe the settings that have no field in the form. */
export const describeExtra = (settings) =>
  EXTRA.filter((name) => settings[name] !== undefined)
    .map((name) => `${LABELS[name]} ${settings[name]}`)
    .join(", ");

// --- choices, defaults and bounds

const usable = () => models.filter((model) => !model.problem);
const defaultModel = () => usable().find((model) => model.is_default);
const defaultsOf = (checkpoint) => (usable().find((model) => model.name === checkpoint) ?? defaultModel())?.defaults;

/** Set the available models, the fields, and the lists of `service.lists`. The selection does not change. */
export function setChoices(all) {
  ({ models, fields, ...lists } = all);
  for (const name of [...TEXTS, ...NUMBERS]) describe(input(name), fields[name]);
  describe(input("padding"), fields.trim_padding);
  input(ENABLED).defaultChecked = fields[ENABLED].default;
  fill("checkpoint", usable().map((model) => model.name), defaultModel()?.name);
  hint();
}

/** Set an input's bounds and default. A value that the user has typed stays. */
function describe(control, { minimum, maximum, maxLength, default: value }) {
  if (control.tagName === "SELECT") return;
  if (minimum !== undefined) [control.min, control.max] = [minimum, maximum];
  if (maxLength !== undefined) control.maxLength = maxLength;
  if (value !== undefined && value !== null) control.defaultValue = value;
}

/** Return the layers that the selected model can generate: [{given, want, pull}]. */
export const layerChoices = () => (usable().find((model) => model.name === input("checkpoint").value) ?? defaultModel())?.layers ?? [];

/** Return the available models, fields and lists. */
export const choices = () => ({ models: usable(), fields, ...lists });

/** Set the size of the request's image, or {}. */
export function setImageSize(size) {
  imageSize = size;
  hint();
}

/** Show the defaults of the selected model in empty fields. */
function hint() {
  const defaults = defaultsOf(input("checkpoint").value);
  input("checkpoint-help").hidden = (input("checkpoint").value || defaultModel()?.name) !== BUILT_IN;
  for (const name of ["width", "height", "steps", "cfg_scale"]) input(name).placeholder = imageSize[name] ?? defaults?.[name] ?? "";
  fill("sampler_name", lists.samplers, defaults?.sampler);
  fill("scheduler", lists.schedulers, defaults?.scheduler);
}

/** Fill a select element. The default comes first and has the empty value. */
function fill(id, names, defaultName) {
  const before = input(id).value;
  const others = names.filter((name) => name !== defaultName).map((name) => new Option(name, name));
  input(id).replaceChildren(group("Default", [new Option(defaultName ?? "Default", "")]), ...(others.length ? [group("Others", others)] : []));
  select(id, before);
}

function group(label, options) {
  const element = document.createElement("optgroup");
  element.label = label;
  element.append(...options);
  return element;
}

/** Select by name, or the default. Returns false if the name is not available. */
function select(id, name) {
  const option = [...input(id).options].find(({ text }) => text === name);
  input(id).value = option?.value ?? "";
  return Boolean(option || !name);
}

input("checkpoint").addEventListener("change", hint);
input("drop-carried").addEventListener("click", () => {
  carry({});
  input(ENABLED).focus();
});

// --- errors

/** Return whether all fields are valid. Show the errors beside the others, and focus the first. */
export function check() {
  const invalid = [...NUMBERS, "prompt"].filter((name) => !isValid(name)).map((name) => input(name));
  for (const control of invalid) mark(control, describeValid(control));
  // in the order of the form
  invalid.sort((a, b) => (a.compareDocumentPosition(b) & Node.DOCUMENT_POSITION_FOLLOWING ? -1 : 1))[0]?.focus();
  return invalid.length === 0;
}

function isValid(name) {
  const { value, validity, min, max } = input(name);
  if (name === "prompt") return value.trim() !== "";
  // without bounds the service checks
  if (name === "seed") return value.trim() === "" || (/^(-1|\d+)$/.test(value.trim()) && (!max || BigInt(value) <= BigInt(max)));
  if (value === "") return !validity.badInput;
  const isWithin = !max || (Number(value) >= Number(min) && Number(value) <= Number(max));
  return isWithin && (name === "cfg_scale" || Number.isInteger(Number(value)));
}

function describeValid({ id, min, max }) {
  if (id === "prompt") return "The prompt is empty. Describe an image, for instance “an apple, high quality”.";
  if (id === "seed") return `A whole number up to ${max}, or −1 for a different image each time.`;
  return `${id === "cfg_scale" ? "A number" : "A whole number"} from ${min} to ${max}.`;
}

/** Return an error of a field of the form, as the service would. */
export const fieldError = (field, text) => Object.assign(new Error(text), { besideField: text, problem: { field } });

/** Show an error of the service, beside its field if the form has it. */
export function showError(error) {
  const name = error.problem?.field;
  const field = name === "image" ? "init" : name;
  const hasField = field && input(`${field}-error`);
  if (!hasField) return void (input("form-error").textContent = error.message);
  mark(input(field), error.besideField);
  input(field).focus();
}

function mark(control, text) {
  input(`${control.id}-error`).textContent = text;
  control.setAttribute("aria-invalid", "true");
  const folded = control.closest("details");
  if (folded) folded.open = true;
}

export function clearErrors() {
  for (const message of document.querySelectorAll("#settings .error")) message.textContent = "";
  for (const control of document.querySelectorAll("#settings [aria-invalid]")) control.removeAttribute("aria-invalid");
}
