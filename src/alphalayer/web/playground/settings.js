// The form: settings in, the body of a request out, and what was wrong with it beside the field.

const NUMBERS = ["width", "height", "seed", "steps", "cfg_scale", "batch_size"];
const TEXTS = ["prompt", "negative_prompt", "checkpoint", "sampler_name", "scheduler"];
const SILENT = { negative_prompt: "bad, ugly", seed: 12345, batch_size: 1, layerdiffuse_enabled: true };
const input = (name) => document.getElementById(name);

/** The body of a request: what is empty or as the service has it anyway is left out. */
export function read() {
  const body = {};
  for (const name of TEXTS) body[name] = input(name).value;
  for (const name of NUMBERS) body[name] = input(name).value === "" ? "" : Number(input(name).value);
  body.layerdiffuse_enabled = input("layerdiffuse_enabled").checked;
  for (const [name, value] of Object.entries(body)) {
    const said = name === "negative_prompt" || name === "prompt" ? true : value !== "";
    if (!said || SILENT[name] === value) delete body[name];
  }
  return body;
}

/** Put settings into the form; what they do not name goes back to what it is at the start. */
export function write(body) {
  const values = { ...SILENT, prompt: "", ...body };
  for (const name of [...TEXTS, ...NUMBERS]) input(name).value = values[name] ?? "";
  for (const name of ["checkpoint", "sampler_name", "scheduler"]) if (input(name).selectedIndex < 0) input(name).value = "";
  input("layerdiffuse_enabled").checked = values.layerdiffuse_enabled;
}

/** The settings that a picture carries, as the service read them, in the words of a request; null if it carries none. */
export function fromPicture(parameters, models) {
  if (!parameters.Steps) return null;
  const [width, height] = (parameters.Size ?? "").split("x").map(Number);
  const body = {
    prompt: parameters.Prompt,
    negative_prompt: parameters["Negative prompt"] ?? "",
    steps: Number(parameters.Steps),
    seed: Number(parameters.Seed),
    cfg_scale: Number(parameters["CFG scale"]),
    sampler_name: parameters.Sampler,
    scheduler: parameters["Schedule type"],
    checkpoint: models.some((each) => each.name === parameters.Model) ? parameters.Model : "",
    layerdiffuse_enabled: "layerdiffusion_enabled" in parameters,
    ...(width && height ? { width, height } : {}),
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined && !Number.isNaN(value)));
}

/** The models to choose from; the placeholders say what the chosen one takes where a field is empty. */
export function offer(models) {
  const chosen = input("checkpoint").value;
  const usable = models.filter((each) => !each.problem);
  const usual = usable.find((each) => each.is_default);
  fill("checkpoint", usable.map((each) => each.name), usual ? `Usual: ${usual.name}` : "None there");
  input("checkpoint").value = usable.some((each) => each.name === chosen) ? chosen : "";
  const hint = () => {
    const defaults = (usable.find((each) => each.name === input("checkpoint").value) ?? usual)?.defaults;
    for (const name of ["width", "height", "steps", "cfg_scale"]) input(name).placeholder = defaults?.[name] ?? "";
    fill("sampler_name", samplers, defaults ? `Usual: ${defaults.sampler}` : "Usual");
    fill("scheduler", schedulers, defaults ? `Usual: ${defaults.scheduler}` : "Usual");
  };
  input("checkpoint").onchange = hint;
  hint();
}

let samplers = [];
let schedulers = [];

/** The names of samplers and schedules. */
export function name(lists) {
  [samplers, schedulers] = lists;
}

function fill(id, names, usual) {
  const before = input(id).value;
  input(id).replaceChildren(new Option(usual, ""), ...names.map((each) => new Option(each, each)));
  input(id).value = names.includes(before) ? before : "";
}

/** Say what was wrong, beside the field if it is one of the form's. */
export function fault(error) {
  clearFaults();
  const field = error.problem?.field;
  const place = field && input(`${field}-error`);
  (place || input("form-error")).textContent = place ? error.message.replace(`${field}: `, "") : error.message;
  if (!place) return;
  const control = input(field);
  control.setAttribute("aria-invalid", "true");
  const folded = control.closest("details");
  if (folded) folded.open = true;
  control.focus();
}

export function clearFaults() {
  for (const each of document.querySelectorAll("#settings .fault")) each.textContent = "";
  for (const each of document.querySelectorAll("#settings [aria-invalid]")) each.removeAttribute("aria-invalid");
}
