// A dropped, pasted or opened image, and the choice what it is for.

import * as images from "./images.js";
import * as outside from "./outside.js";
import * as stage from "./stage.js";
import * as task from "./task.js";

const find = (id) => document.getElementById(id);
const MAX_BYTES = 20_000_000; // limit of the service for an image
const choices = [...document.querySelectorAll(".choice")];
const texts = Object.fromEntries(choices.map((choice) => [choice.value, choice.querySelector("span").textContent]));
let image = null;
let settings = null; // of the image, if it has some

/** Show an image file with its choices. Throws an Error for the user if it cannot be read. */
export async function open(file) {
  image = await images.open(file);
  settings = null;
  find("dropped").src = image.url;
  find("dropped").alt = `Your image: ${image.name}`;
  find("dropped-name").textContent = `${image.name}, ${image.width} × ${image.height}`;
  offer();
  stage.view("choose");
  find("choose-title").focus({ preventScroll: true });
  const opened = image;
  const read = await outside.readSettings(file);
  if (opened !== image) return;
  settings = read;
  offer();
}

/** Enable what is possible with the image, and give the reasons for the rest. */
function offer() {
  for (const choice of choices) {
    const { reason = "", mark = "", text = texts[choice.value] } = describe(choice.value);
    choice.hidden = choice.value === "settings" && !settings && !reason;
    choice.disabled = Boolean(reason);
    choice.querySelector("span").textContent = reason || text;
    choice.querySelector("em").textContent = mark;
    choice.querySelector("em").hidden = !mark;
  }
}

function describe(purpose) {
  if (purpose === "settings" && outside.isTooLarge(image.file)) return { reason: outside.SUPPORTED };
  if (purpose === "settings") return { text: settings ? `“${settings.settings.prompt.slice(0, 80)}”, seed ${settings.settings.seed}` : "" };
  if (purpose === "photo") return {};
  if (image.file.size > MAX_BYTES) return { reason: `The file is larger than ${MAX_BYTES / 1e6} MB.` };
  if (purpose === "foreground" && image.isOpaque) return { reason: "It has no transparency, so nothing behind it can be seen." };
  if (purpose === "whole" || purpose === "part") return {};
  const support = task.support(purpose);
  if (!support) return { reason: "The selected model generates no layers around an image." };
  return { mark: support === "files" ? "needs files" : "" };
}

/** Set the callbacks: of settings, of a photo as the background, and of leaving without a choice. */
export function start({ onSettings, onPhoto, onLeave }) {
  const actions = { settings: () => onSettings(image.name, settings), photo: () => onPhoto(image.file) };
  for (const choice of choices) {
    choice.addEventListener("click", () => {
      if (choice.value !== "part") onLeave();
      (actions[choice.value] ?? (() => task.use(image, choice.value)))();
      if (["whole", "foreground", "background"].includes(choice.value)) find("prompt").focus();
    });
  }
  for (const id of ["leave-choose", "leave-mask"]) find(id).addEventListener("click", onLeave);
  find("other-image").addEventListener("click", () => find("open-image").click());
}
