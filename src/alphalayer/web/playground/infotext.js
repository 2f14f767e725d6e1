// The settings that a picture carries, in the words of a request.

/** LayerDiffuse's own settings and what they are called. */
export const LAYERS = {
  layerdiffuse_method: "LayerDiffuse method",
  layerdiffuse_weight: "LayerDiffuse weight",
  layerdiffuse_stop_at: "LayerDiffuse until",
};
// of no consequence for the picture, or already in another one
const SILENT = /^(Prompt|Negative prompt|Version|Size|Model|Model hash|.* hashes|VAE hash|layerdiffusion_.*)$/;
const SEEDS = { Seed: "seed", "Variation seed": "subseed" };
const NUMBERS = { Steps: "steps", "CFG scale": "cfg_scale", "Variation seed strength": "subseed_strength" };

/** `parameters` as the service read them, and what there is to choose from. Gives {settings, missing}, where `missing` names what cannot
 * be taken; null if the picture carries no settings. */
export function fromPicture(parameters, choices) {
  if (!parameters.Steps) return null;
  const missing = [];
  const checkpoint = model(parameters, choices.models, missing);
  const settings = { prompt: parameters.Prompt ?? "", negative_prompt: parameters["Negative prompt"] ?? "", checkpoint };
  // programs that draw noise on the GPU do not say so
  for (const [key, value] of Object.entries({ RNG: "GPU", ...parameters })) {
    if (SEEDS[key]) settings[SEEDS[key]] = Number.isSafeInteger(Number(value)) ? Number(value) : value;
    else if (NUMBERS[key]) settings[NUMBERS[key]] = Number(value);
    else if (!SILENT.test(key) && !TAKEN[key]?.(value, settings, { ...choices, parameters })) missing.push(`${lower(key)} ${value}`);
  }
  const [width, height] = (parameters.Size ?? "").split("x").map(Number);
  if (width && height) Object.assign(settings, { width, height });
  return { settings: { ...settings, ...layers(parameters, choices.fields, missing) }, missing };
}

/** What else a picture names; each says whether it is here, and takes it. */
const TAKEN = {
  Sampler(value, settings, { samplers, schedulers }) {
    // older tools write the two as one: "DPM++ 2M SDE Karras"
    const scheduler = schedulers.find((each) => value.endsWith(` ${each}`));
    const sampler = scheduler ? value.slice(0, -scheduler.length - 1) : value;
    if (scheduler) settings.scheduler ??= scheduler;
    if (!samplers.includes(sampler)) return false;
    settings.sampler_name = sampler;
    return true;
  },
  "Schedule type"(value, settings, { schedulers, automatic, parameters }) {
    const meant = value === "Automatic" ? automatic[parameters.Sampler] : value;
    if (schedulers.includes(meant)) settings.scheduler = meant;
    return schedulers.includes(meant);
  },
  "Clip skip": (value) => value === "1",
  RNG: (value, _settings, { noise }) => portable(value) === portable(noise),
};

/** The model with the picture's hash, else the one of its name. A title has the hash once it is known. */
function model({ Model: name, "Model hash": hash }, models, missing) {
  const same = models.find((each) => hash && each.title === `${each.name} [${hash}]`);
  const called = models.find((each) => each.name === name);
  const mayBeSame = called && (!hash || called.title === called.name);
  if ((name || hash) && !same && !mayBeSame) missing.push(["model", name, (called || !name) && `[${hash}]`].filter(Boolean).join(" "));
  return (same ?? called)?.name;
}

/** The settings of LayerDiffuse that differ from the defaults of `fields`. */
function layers(parameters, fields, missing) {
  if (parameters.layerdiffusion_enabled !== "True") return { layerdiffuse_enabled: false };
  const label = parameters.layerdiffusion_method ?? "";
  const method = [/Attention Injection/, /Conv Injection/].map((each) => each.test(label));
  if (label && !method.includes(true)) missing.push(`LayerDiffuse ${label}`);
  // nothing tells what the service is set to
  const decode = parameters.layerdiffusion_decode;
  if (decode) missing.push(`LayerDiffuse decode ${decode} (unless the service is set to it)`);
  const values = {
    layerdiffuse_method: method[1] ? "conv" : "attention",
    layerdiffuse_weight: Number(parameters.layerdiffusion_weight ?? 1),
    layerdiffuse_stop_at: Number(parameters.layerdiffusion_ending_step ?? 1),
  };
  return Object.fromEntries(Object.entries(values).filter(([name, value]) => value !== fields[name].default));
}

/** NV is the noise of the GPU, made anywhere. */
const portable = (source) => (source === "GPU" ? "NV" : source);
const lower = (key) => (/^[A-Z][a-z]/.test(key) ? key[0].toLowerCase() + key.slice(1) : key);
