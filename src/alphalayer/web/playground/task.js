// What the form generates: an image, a change of an image, or layers; with the images that it needs.

import * as images from "./images.js";
import * as mask from "./mask.js";
import * as settings from "./settings.js";

const find = (id) => document.getElementById(id);
const VERBS = { image: "Generate", img2img: "Change", layers: "Generate layers" };
const PATHS = { image: ["txt2img", "jobs"], img2img: ["img2img", "jobs/img2img"], layers: ["layers", "jobs/layers"] };
const WANTS = { layers: "All layers", foreground: "Foreground", background: "Background", blended: "Blended image" };
const GIVEN = ["foreground", "background"];
// fields of the form that layers do not have
const OPAQUE_LAYERS = ["layerdiffuse_enabled", "layerdiffuse_method"];
const sources = {}; // images by role: init, foreground, background
let onChange = () => {};

/** Set the listener. It is called if the task or one of its images changes. */
export const start = (listener) => (onChange = listener);

const current = () => document.querySelector("[name=task]:checked").value;
const hasMask = () => document.querySelector("[name=extent]:checked").value === "part";

/** Return the label of the button. */
export const verb = () => VERBS[current()];

/** Return the paths below alpha/v1 of the request and of its job. */
export const paths = () => PATHS[current()];

/** Select a task. */
function select(name) {
  document.querySelector(`[name=task][value=${name}]`).checked = true;
  update();
}

/** Use an image as "whole" or "part" to change, as "foreground" or as "background". */
export function use(image, purpose) {
  if (GIVEN.includes(purpose)) {
    put(purpose, image);
    return select("layers");
  }
  put("init", image);
  document.querySelector(`[name=extent][value=${purpose}]`).checked = true;
  select("img2img");
  if (purpose === "part") mask.open(image);
}

/** Return whether the model can generate the layers around an image: "ready", "files" or nothing. */
export function support(role) {
  const all = settings.layerChoices().find((choice) => String(choice.given) === role && choice.want === "layers");
  return all && (all.pull.length ? "files" : "ready");
}

/** Return whether the task has what it needs. Otherwise show the errors. */
export function check() {
  if (current() !== "img2img") return true;
  if (!sources.init) settings.showError(settings.fieldError("image", "Choose the image to change."));
  else if (hasMask() && mask.isEmpty(sources.init)) {
    mask.open(sources.init);
    settings.showError(settings.fieldError("mask", "Nothing is painted. Paint the part to change."));
  } else return true;
  return false;
}

/** Return the fields of the task, without images. */
function fields() {
  if (current() === "layers") return { want: find("want").value };
  if (current() !== "img2img") return {};
  const own = { strength: Number(find("strength").value) };
  if (find("keep-outline").checked && find("layerdiffuse_enabled").checked) own.alpha = "keep";
  return hasMask() ? { ...own, mask_blur: Number(find("mask_blur").value) } : own;
}

/** Return the roles of the images that the request has, by field. */
function roles() {
  if (current() === "img2img") return { image: "init" };
  if (current() === "layers") return Object.fromEntries(GIVEN.filter((role) => sources[role]).map((role) => [role, role]));
  return {};
}

/** Return the body of the request without its images. */
export function read() {
  const body = { ...settings.read(), ...fields() };
  if (current() === "layers") for (const name of OPAQUE_LAYERS) delete body[name];
  return body;
}

/** Return the images of the request as data URLs. Throws an Error for the user. */
export async function readImages() {
  const files = {};
  for (const [field, role] of Object.entries(roles())) if (sources[role]) files[field] = await images.dataUrl(sources[role].file);
  if (current() === "img2img" && hasMask()) files.mask = mask.read();
  return files;
}

/** Return the names of the files of the request by field. */
export function fileNames() {
  const files = Object.fromEntries(Object.entries(roles()).map(([field, role]) => [field, sources[role]?.name ?? "image.png"]));
  return current() === "img2img" && hasMask() ? { ...files, mask: "mask.png" } : files;
}

/** Return the images of the request. */
const used = () => Object.values(roles()).map((role) => sources[role]).filter(Boolean);

/** Return the default size of the request if it has images: that of the first. */
function size() {
  const [first] = used();
  return first ? { width: first.width, height: first.height } : {};
}

/** Return what the page shows of a request besides its fields: the size and names of its images. */
export function describe() {
  const names = used().map(({ name }) => name).join(", ");
  return names ? { ...size(), source: current() === "img2img" && hasMask() ? `${names}, a part` : names } : {};
}

/** Offer to change an opaque image without transparency, if that is what the service refused. */
export function offerOpaque(error) {
  find("go-opaque").hidden = !(error.problem?.field === "image" && sources.init?.isOpaque && find("layerdiffuse_enabled").checked);
}

function put(role, image) {
  sources[role] = image;
  const row = document.querySelector(`.refs[data-role=${role}]`);
  const [thumbnail, name, remove] = [row.querySelector("img"), row.querySelector(".name"), row.querySelector("button")];
  thumbnail.hidden = remove.hidden = !image;
  if (image) thumbnail.src = image.url;
  name.textContent = name.title = image?.name ?? "none";
  find("go-opaque").hidden = true;
  update();
}

/** Show the parts of the form that the task has, and what the model can generate. */
export function update() {
  for (const part of document.querySelectorAll("[data-task]")) part.hidden = part.dataset.task !== current();
  find("part").hidden = !hasMask();
  find("open-mask").disabled = !sources.init;
  find("mask_blur-value").textContent = `${find("mask_blur").value} px`;
  find("strength-value").textContent = find("strength").value;
  find("layerdiffuse_enabled").parentElement.hidden = current() === "layers";
  find("keep-outline").disabled = !find("layerdiffuse_enabled").checked;
  settings.setImageSize(size());
  updateWants();
  onChange();
}

function updateWants() {
  const roles = GIVEN.filter((role) => sources[role]);
  const choices = settings.layerChoices().filter((choice) => String(choice.given) === String(roles));
  const before = find("want").value;
  find("want").replaceChildren(
    ...choices.map(({ want, pull }) => {
      const option = new Option(pull.length ? `${WANTS[want]} (files are missing)` : WANTS[want], want);
      option.disabled = pull.length > 0;
      return option;
    }),
  );
  const ready = choices.filter(({ pull }) => !pull.length).map(({ want }) => want);
  find("want").value = ready.includes(before) ? before : ready[0] ?? "";
  const pulls = [...new Set(choices.flatMap(({ pull }) => pull))];
  const names = roles.join(" and ") || "the prompt alone";
  find("want-help").textContent = describeOthers();

  function describeOthers() {
    if (!choices.length) return `This model generates no layers from ${names}.`;
    if (pulls.length) return `For the others, run: alphalayer models pull ${pulls.join(" ")}`;
    return choices.some(({ want }) => want === "layers") ? "" : "This model cannot generate the others.";
  }
}

for (const role of ["init", ...GIVEN]) {
  find(role).addEventListener("change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    settings.clearErrors();
    try {
      put(role, await images.open(file));
    } catch (error) {
      settings.showError(settings.fieldError(role === "init" ? "image" : role, error.message));
    }
  });
  document.querySelector(`.refs[data-role=${role}] button`).addEventListener("click", () => {
    put(role, null);
    find(role).focus();
  });
}
for (const name of ["task", "extent"]) {
  for (const radio of document.querySelectorAll(`[name=${name}]`)) radio.addEventListener("change", update);
}
for (const id of ["strength", "mask_blur", "layerdiffuse_enabled", "checkpoint"]) find(id).addEventListener("input", update);
find("open-mask").addEventListener("click", () => mask.open(sources.init));
