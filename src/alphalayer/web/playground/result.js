// A finished image: its settings and its downloads.

import * as images from "./images.js";
import * as layers from "./layers.js";
import * as service from "./service.js";
import { describeExtra } from "./settings.js";
import * as stage from "./stage.js";

const find = (id) => document.getElementById(id);
const NAMES = {
  source: "From",
  checkpoint: "Model",
  size: "Size",
  steps: "Steps",
  cfg_scale: "Guidance",
  sampler_name: "Sampler",
  scheduler: "Schedule",
  seed: "Seed",
  negative_prompt: "Negative prompt",
  extra: "Also",
};
let shown = null;

/** Return the shown entry of the history, or null. */
export const current = () => shown;

/** Show an entry of the history. */
export function present(entry) {
  shown = entry;
  const { settings } = entry;
  find("actions").hidden = find("details").hidden = false;
  find("caption").textContent = find("caption").title = settings.prompt;
  const facts = { ...settings, size: `${entry.width} × ${entry.height}`, extra: describeExtra(settings) };
  if (!settings.layerdiffuse_enabled) facts.extra = ["opaque background", facts.extra].filter(Boolean).join(", ");
  const visible = Object.entries(NAMES).filter(([name]) => facts[name] !== undefined && facts[name] !== "");
  find("facts").replaceChildren(...visible.map(([name, title]) => fact(title, facts[name])));
  find("downloads").hidden = find("use").hidden = Boolean(entry.layers);
  const showRemoved = () => {
    find("downloads").hidden = find("use").hidden = true;
    stage.blank("The service has removed this image. You can still use its settings.");
  };
  if (entry.gone) return showRemoved();
  const showUnreachable = () => stage.blank("This image cannot be loaded now. Select it again when the service is back.");
  const onMissing = async () => ((await service.isGone(entry.name)) ? showRemoved() : showUnreachable());
  if (entry.layers) return layers.present(entry, onMissing);
  stage.show(service.fileAddress(entry.name), { alt: settings.prompt, width: entry.width, height: entry.height, isFinal: true, onMissing });
}

/** Hide the image's settings and downloads, for the preview of a job. */
export function hide() {
  find("actions").hidden = true;
  find("details").hidden = true;
}

function fact(title, value) {
  const pair = document.createElement("div");
  const [term, text] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = title;
  text.textContent = text.title = value;
  pair.append(term, text);
  return pair;
}

/** Download the image as a file. Throws `Refused` or `Away`. */
export async function save(format) {
  const { name } = shown;
  const blob = await service.download(name, { format, trim: find("trimmed").checked, padding: find("padding").value || 0 });
  images.save(blob, name.replace(/\.\w+$/, `.${format}`));
}

/** Return the image as a File. Throws `Refused` or `Away`. */
export async function file() {
  const blob = await service.download(shown.name, { format: "png" });
  return new File([blob], shown.name, { type: blob.type });
}

find("trimmed").addEventListener("change", (event) => (find("margin").hidden = !event.target.checked));
