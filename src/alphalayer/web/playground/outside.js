// The settings in image files.

import * as images from "./images.js";
import { fromParameters } from "./infotext.js";
import * as service from "./service.js";
import * as settings from "./settings.js";

const TYPES = ["image/png", "image/webp", "image/avif"];
const MAX_BYTES = 11_000_000; // as base64 below the service's limit for a request

/** Return whether an image may have settings but is too large to be read. */
export const isTooLarge = (file) => TYPES.includes(file.type) && file.size > MAX_BYTES;

/** Hint for users: the files that are read. */
export const SUPPORTED = `Settings are read from PNG, WebP and AVIF files up to ${MAX_BYTES / 1e6} MB.`;

/** Read the settings of an image file: {settings, missing}, or null. */
export async function readSettings(file) {
  if (!TYPES.includes(file.type) || isTooLarge(file)) return null;
  try {
    return fromParameters(await fetchParameters(file), settings.choices());
  } catch (error) {
    // the service rejects some images that the browser can show
    if (error.status === 422) return null;
    throw error;
  }
}

/** Return the settings in the file of an image of the service, or {} if they cannot be loaded. */
export async function settingsOf(name) {
  try {
    const parameters = await fetchParameters(await service.download(name, { format: "png" }));
    return { ...fromParameters(parameters, settings.choices())?.settings, checkpoint: parameters.Model };
  } catch {
    return {};
  }
}

const PROMPTS = ["Prompt", "Negative prompt"];

async function fetchParameters(file) {
  const { info, parameters } = await service.json("sdapi/v1/png-info", { method: "POST", body: { image: await images.dataUrl(file) } });
  // the service adds the values that AUTOMATIC1111 assumes for other keys
  return Object.fromEntries(Object.entries(parameters).filter(([key]) => PROMPTS.includes(key) || info.includes(`${key}: `)));
}
