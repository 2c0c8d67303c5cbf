// Labels, notes and stars that people give to features: kept by this browser, for this SAE.
import { core } from "./data.js";

const KEY = `lorascope:${core.key}`;
const FORMAT = "lorascope labels 1";
const MAX = { label: 200, note: 20000 }; // characters

let kept = new Map(); // feature -> { label, note, star }
let keeps = true; // whether the browser keeps them
let changed = () => {};

try {
  kept = checked(JSON.parse(localStorage.getItem(KEY) ?? '{"features": {}}').features);
} catch {
  keeps = false;
}

export function labelOf(id) {
  return kept.get(id)?.label ?? "";
}

export function noteOf(id) {
  return kept.get(id)?.note ?? "";
}

export function isStarred(id) {
  return kept.get(id)?.star ?? false;
}

// Changes what is said of a feature: `change(7, { star: true })`.
export function change(id, said) {
  const now = { label: "", note: "", star: false, ...kept.get(id), ...said };
  if (now.label || now.note || now.star) kept.set(id, now);
  else kept.delete(id);
  save();
  changed(id);
}

// Calls `action` with the feature whose words change, or -1 for many.
export function onNotes(action) {
  changed = action;
}

// Returns whether this browser keeps them; if not, only an export does.
export function isKept() {
  return keeps;
}

export function nNotes() {
  return kept.size;
}

// Returns all of them as the text of a JSON file.
export function exported() {
  const features = Object.fromEntries([...kept].sort(([a], [b]) => a - b));
  return `${JSON.stringify({ format: FORMAT, sae: core.key, features }, null, 1)}\n`;
}

// Takes over what such a file says; the file has the last word where both say something.
export function imported(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("This file is no JSON; choose one that \u201cExport labels\u201d wrote.");
  }
  if (data?.format !== FORMAT) {
    throw new Error("This file has no labels; choose one that \u201cExport labels\u201d wrote.");
  }
  if (data.sae !== core.key) {
    throw new Error("These labels are of another SAE, whose features have other numbers.");
  }
  const found = checked(data.features);
  for (const [id, said] of found) kept.set(id, said);
  save();
  changed(-1);
  return found.size;
}

// Returns what is well formed among words that come from outside.
function checked(features) {
  const found = new Map();
  for (const [key, said] of Object.entries(features ?? {})) {
    const id = /^\d{1,15}$/.test(key) ? Number(key) : -1;
    if (id < 0 || id >= core.n_features || typeof said !== "object" || said === null) continue;
    const words = (name) => (typeof said[name] === "string" ? said[name].slice(0, MAX[name]) : "");
    found.set(id, { label: words("label"), note: words("note"), star: said.star === true });
  }
  return found;
}

function save() {
  try {
    localStorage.setItem(KEY, exported());
    keeps = true;
  } catch {
    keeps = false;
  }
}
