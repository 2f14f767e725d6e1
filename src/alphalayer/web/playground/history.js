// The pictures drawn on this page, newest first, with all that made each; kept in this browser, in all its tabs alike.

import * as store from "./store.js";

const STORE = "alphalayer.history";
const MOST = 100;
const find = (id) => document.getElementById(id);
let forgotten = null;

/** `address` gives the address of a picture's name, `isGone` asks whether the service keeps it no longer, and `chosen` is called with an
 * entry: {name, seed, width, height, settings}, and `gone` where its picture is no longer kept. */
export function start(address, isGone, chosen) {
  const draw = () => {
    const entries = load();
    find("past").hidden = entries.length === 0 && !forgotten;
    find("forgotten").textContent = forgotten ? "Forgotten." : "";
    find("forget").textContent = forgotten ? "Undo" : "Forget all";
    find("history").replaceChildren(...entries.map((entry) => item(entry, address(entry.name), () => lost(entry), chosen)));
  };
  const lost = async (entry) => {
    if (!(await isGone(entry.name))) return;
    save(load().map((each) => (each.name === entry.name ? { ...each, gone: true } : each)));
    draw();
  };
  find("forget").addEventListener("click", () => {
    const before = forgotten ? null : load();
    // others may have drawn meanwhile, in other tabs
    save(forgotten ? [...load(), ...forgotten].slice(0, MOST) : []);
    forgotten = before;
    draw();
  });
  window.addEventListener("storage", (event) => event.key === STORE && draw());
  draw();
  return {
    add(entry) {
      forgotten = null;
      save([entry, ...load()].slice(0, MOST));
      draw();
    },
  };
}

function item(entry, address, lost, chosen) {
  const button = document.createElement("button");
  button.type = "button";
  button.title = `${entry.settings.prompt.slice(0, 200)}, seed ${entry.seed}`;
  button.append(entry.gone ? words(entry) : thumbnail(entry, address, lost));
  button.addEventListener("click", () => chosen(entry));
  const row = document.createElement("li");
  row.append(button);
  return row;
}

function thumbnail(entry, address, lost) {
  const image = new Image(112, 112);
  image.loading = "lazy";
  image.decoding = "async";
  image.alt = `${entry.settings.prompt.slice(0, 200)}, seed ${entry.seed}`;
  image.onerror = () => {
    image.replaceWith(words(entry));
    lost();
  };
  image.src = address;
  return image;
}

function words(entry) {
  const text = document.createElement("span");
  text.textContent = entry.settings.prompt.slice(0, 200);
  return text;
}

function load() {
  try {
    const kept = JSON.parse(store.read(STORE) ?? "[]");
    return Array.isArray(kept) ? kept.filter((each) => each?.name && each.settings?.prompt) : [];
  } catch {
    return [];
  }
}

const save = (entries) => store.write(STORE, JSON.stringify(entries));
