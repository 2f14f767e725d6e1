// Pictures that come from outside: their settings go into the form, or they lie behind what is drawn.

import { fromPicture } from "./infotext.js";
import * as service from "./service.js";
import * as settings from "./settings.js";
import * as stage from "./stage.js";

const MAY_CARRY = ["image/png", "image/webp", "image/avif"];
const MOST_BYTES = 11_000_000; // as base64 under the service's limit for a request

/** Whether a picture may carry settings and is too large to be looked into. */
export const isTooLarge = (file) => MAY_CARRY.includes(file.type) && file.size > MOST_BYTES;

/** Which files are looked into, in words. */
export const LOOKED_INTO = `Settings are looked for in PNG, WebP and AVIF up to ${MOST_BYTES / 1e6} MB.`;

/** What a picture brings: {settings, missing} where it carries settings, else null. Throws an Error that says why it cannot be read. */
export async function carriedBy(file) {
  await check(file);
  if (!MAY_CARRY.includes(file.type) || isTooLarge(file)) return null;
  try {
    return fromPicture(await parametersOf(file), settings.choices());
  } catch (error) {
    // what the service cannot read is still a picture
    if (error.status === 422) return null;
    throw error;
  }
}

/** The settings that a picture of the service was drawn with, as its file says it; {} where that cannot be had. */
export async function drawnWith(name) {
  try {
    const parameters = await parametersOf(await service.download(name, { format: "png" }));
    return { ...fromPicture(parameters, settings.choices())?.settings, checkpoint: parameters.Model };
  } catch {
    return {};
  }
}

const parametersOf = async (file) =>
  (await service.json("sdapi/v1/png-info", { method: "POST", body: { image: await base64(file) } })).parameters;

/** Lay a picture behind. Throws as above. */
export async function behind(file) {
  await check(file);
  stage.layBehind(file);
}

async function check(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await image.decode();
  } catch {
    throw new Error(`${file.name} is not a picture that this browser can show. Take a PNG, JPEG or WebP.`);
  } finally {
    URL.revokeObjectURL(image.src);
  }
}

const base64 = (file) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read. Is it still there?`));
    reader.readAsDataURL(file);
  });
