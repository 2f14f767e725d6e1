// What this browser keeps for the page. Where it may keep nothing, or has no room, that lasts until the page is left.

const memory = new Map();

/** The text that is kept under a name, or null. */
export function read(name) {
  if (memory.has(name)) return memory.get(name);
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

export function write(name, text) {
  try {
    localStorage.setItem(name, text);
    memory.delete(name);
  } catch {
    memory.set(name, text);
  }
}
