// The settings in an image file, as fields of a request.

/** Settings of LayerDiffuse, and their labels. */
export const LAYERS = {
  layerdiffuse_method: "LayerDiffuse method",
  layerdiffuse_weight: "LayerDiffuse weight",
  layerdiffuse_stop_at: "LayerDiffuse until",
};
/** Settings of a second pass, and their labels. */
export const HIRES = {
  hires_scale: "second pass, factor",
  hires_upscaler: "its upscaler",
  hires_steps: "its steps",
  hires_strength: "its strength",
};
// keys without an effect on the image, or whose value is also in another key
const IGNORED = /^(Prompt|Negative prompt|Version|Size|Model|Model hash|.* hashes|VAE hash|layerdiffusion_.*)$/;
const SEEDS = { Seed: "seed", "Variation seed": "subseed" };
const NUMBERS = {
  Steps: "steps",
  "CFG scale": "cfg_scale",
  "Variation seed strength": "subseed_strength",
  "Hires upscale": "hires_scale",
  "Hires steps": "hires_steps",
};

/**
 * Convert the `parameters` of an image, as the service parsed them, for the available choices.
 * Returns {settings, missing}, where `missing` names what is not available here.
 * Returns null if the image has no settings.
 */
export function fromParameters(parameters, choices) {
  if (!parameters.Steps) return null;
  const missing = [];
  const checkpoint = model(parameters, choices.models, missing);
  const settings = { prompt: parameters.Prompt ?? "", negative_prompt: parameters["Negative prompt"] ?? "", checkpoint };
  // programs with GPU noise do not write this key
  for (const [key, value] of Object.entries({ RNG: "GPU", ...parameters })) {
    if (SEEDS[key]) settings[SEEDS[key]] = Number.isSafeInteger(Number(value)) ? Number(value) : value;
    else if (NUMBERS[key]) settings[NUMBERS[key]] = Number(value);
    else if (!IGNORED.test(key) && !READERS[key]?.(value, settings, { ...choices, parameters })) missing.push(`${lower(key)} ${value}`);
  }
  const [width, height] = (parameters.Size ?? "").split("x").map(Number);
  if (width && height) Object.assign(settings, { width, height });
  return { settings: { ...settings, ...layers(parameters, choices.fields, missing) }, missing };
}

/** Readers of further keys. Each stores its value and returns whether it is available here. */
const READERS = {
  Sampler(value, settings, { samplers, schedulers }) {
    // older tools write both in one value: "DPM++ 2M SDE Karras"
    const scheduler = schedulers.find((name) => value.endsWith(` ${name}`));
    const sampler = scheduler ? value.slice(0, -scheduler.length - 1) : value;
    if (scheduler) settings.scheduler ??= scheduler;
    if (!samplers.includes(sampler)) return false;
    settings.sampler_name = sampler;
    return true;
  },
  "Schedule type"(value, settings, { schedulers, automatic, parameters }) {
    const scheduler = value === "Automatic" ? automatic[parameters.Sampler] : value;
    if (schedulers.includes(scheduler)) settings.scheduler = scheduler;
    return schedulers.includes(scheduler);
  },
  "Clip skip": (value) => value === "1",
  "Hires upscaler"(value, settings) {
    settings.hires_upscaler = value;
    return true;
  },
  // an image that was made from another one has it, too
  "Denoising strength"(value, settings, { parameters }) {
    if (parameters["Hires upscaler"]) settings.hires_strength = Number(value);
    return "hires_strength" in settings;
  },
  RNG: (value, _settings, { noise }) => portable(value) === portable(noise),
};

/** Return the model with the same hash, else with the same name. A title may include the hash. */
function model({ Model: name, "Model hash": hash }, models, missing) {
  const byHash = models.find((candidate) => hash && candidate.title === `${candidate.name} [${hash}]`);
  const byName = models.find((candidate) => candidate.name === name);
  const mayBeSame = byName && (!hash || byName.title === byName.name);
  if ((name || hash) && !byHash && !mayBeSame) missing.push(["model", name, (byName || !name) && `[${hash}]`].filter(Boolean).join(" "));
  return (byHash ?? byName)?.name;
}

/** The settings of LayerDiffuse that differ from the defaults of `fields`. */
function layers(parameters, fields, missing) {
  if (parameters.layerdiffusion_enabled !== "True") return { layerdiffuse_enabled: false };
  const label = parameters.layerdiffusion_method ?? "";
  const method = [/Attention Injection/, /Conv Injection/].map((pattern) => pattern.test(label));
  if (label && !method.includes(true)) missing.push(`LayerDiffuse ${label}`);
  // the API does not return the setting of the service
  const decode = parameters.layerdiffusion_decode;
  if (decode) missing.push(`LayerDiffuse decode ${decode} (unless the service is set to it)`);
  const settings = {
    layerdiffuse_method: method[1] ? "conv" : "attention",
    layerdiffuse_weight: Number(parameters.layerdiffusion_weight ?? 1),
    layerdiffuse_stop_at: Number(parameters.layerdiffusion_ending_step ?? 1),
  };
  return Object.fromEntries(Object.entries(settings).filter(([name, value]) => value !== fields[name].default));
}

/** NV computes the same noise as the GPU, on any machine. */
const portable = (source) => (source === "GPU" ? "NV" : source);
const lower = (key) => (/^[A-Z][a-z]/.test(key) ? key[0].toLowerCase() + key.slice(1) : key);
