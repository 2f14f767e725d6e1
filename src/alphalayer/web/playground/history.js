// History of generated images with their settings, newest first. All tabs share it.

import * as store from "./store.js";

const STORE = "alphalayer.history";
const MAX_ENTRIES = 100;
const find = (id) => document.getElementById(id);
let cleared = null; // the entries that "Undo" restores

/**
 * Show the history, and return an object to add entries.
 *
 * `address` returns the URL of an image by name. `isGone` checks whether the service removed it.
 * `onSelect` is called with an entry: {name, seed, width, height, settings}.
 * It also has `gone` if the image is removed.
 */
export function start(address, isGone, onSelect) {
  const render = () => {
    const entries = load();
    find("past").hidden = entries.length === 0 && !cleared;
    find("forgotten").textContent = cleared ? "Cleared." : "";
    find("forget").textContent = cleared ? "Undo" : "Clear history";
    find("history").replaceChildren(...entries.map((entry) => item(entry, address(entry.name), () => markGone(entry), onSelect)));
  };
  const markGone = async (entry) => {
    const before = address(entry.name);
    const gone = await isGone(entry.name);
    if (gone) save(load().map((other) => (other.name === entry.name ? { ...other, gone } : other)));
    // the address is new if it had expired
    if (gone || address(entry.name) !== before) render();
  };
  find("forget").addEventListener("click", () => {
    const before = cleared ? null : load();
    // other tabs may have added entries since
    save(cleared ? [...load(), ...cleared].slice(0, MAX_ENTRIES) : []);
    cleared = before;
    render();
  });
  window.addEventListener("storage", (event) => event.key === STORE && render());
  render();
  return {
    add(entry) {
      cleared = null;
      save([entry, ...load()].slice(0, MAX_ENTRIES));
      render();
    },
  };
}

function item(entry, address, onMissing, onSelect) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = `${entry.settings.prompt.slice(0, 200)}, seed ${entry.seed}`;
  button.append(entry.gone ? label(entry) : thumbnail(entry, address, onMissing));
  button.addEventListener("click", () => onSelect(entry));
  const row = document.createElement("li");
  row.append(button);
  return row;
}

function thumbnail(entry, address, onMissing) {
  const image = new Image(112, 112);
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = `${entry.settings.prompt.slice(0, 200)}, seed ${entry.seed}`;
  image.onerror = () => {
    image.replaceWith(label(entry));
    onMissing();
  };
  image.src = address;
  return image;
}

function label(entry) {
  const text = document.createElement("span");
  text.textContent = entry.settings.prompt.slice(0, 200);
  return text;
}

function load() {
  try {
    const entries = JSON.parse(store.read(STORE) ?? "[]");
    return Array.isArray(entries) ? entries.filter((entry) => entry?.name && entry.settings?.prompt) : [];
  } catch {
    return [];
  }
}

const save = (entries) => store.write(STORE, JSON.stringify(entries));
