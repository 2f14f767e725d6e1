// Text storage in the browser. If storage is denied or full, the text lasts until the page is left.

const memory = new Map();

/** Return the text that is stored under a name, or null. */
export function read(name) {
  if (memory.has(name)) return memory.get(name);
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

/** Store a text under a name. */
export function write(name, text) {
  try {
    localStorage.setItem(name, text);
    memory.delete(name);
  } catch {
    memory.set(name, text);
  }
}
