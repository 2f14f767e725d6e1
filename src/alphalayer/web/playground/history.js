// The pictures drawn on this page, newest first, with the settings of each; kept in this browser.

const STORE = "alphalayer.history";
const MOST = 100;
const list = document.getElementById("history");
const section = document.getElementById("past");

let entries = load();

/** `chosen` is called with an entry: {name, seed, width, height, body}. */
export function start(address, chosen) {
  const draw = () => {
    section.hidden = entries.length === 0;
    list.replaceChildren(...entries.map((entry) => item(entry, address(entry.name), chosen)));
  };
  document.getElementById("forget").addEventListener("click", () => {
    entries = [];
    save();
    draw();
  });
  draw();
  return { add: (entry) => {
    entries = [entry, ...entries].slice(0, MOST);
    save();
    draw();
  } };
}

function item(entry, address, chosen) {
  const image = new Image();
  image.loading = "lazy";
  image.alt = `${entry.body.prompt}, seed ${entry.seed}`;
  image.src = address;
  const button = document.createElement("button");
  button.type = "button";
  button.title = image.alt;
  button.append(image);
  button.addEventListener("click", () => chosen(entry));
  const row = document.createElement("li");
  row.append(button);
  return row;
}

function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE) ?? "[]");
    return Array.isArray(kept) ? kept.filter((each) => each?.name && each.body?.prompt) : [];
  } catch {
    return [];
  }
}

function save() {
  localStorage.setItem(STORE, JSON.stringify(entries));
}
