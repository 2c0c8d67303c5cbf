// Labels, notes and stars that the user gives to features. The browser stores them for each SAE.
import { core } from "./data.js";

const KEY = `lorascope:${core.labels_key}`;
const FORMAT = "lorascope labels 1";
const MAX = { label: 200, note: 20000 }; // characters
const HINT = "Choose a file that was written by \u201cExport labels\u201d.";

let annotations = new Map(); // feature -> { label, note, star }
let canStore = true; // whether the browser stores them
let changed = () => {};

try {
  annotations = parseFeatures(JSON.parse(localStorage.getItem(KEY) ?? '{"features": {}}').features);
} catch {
  canStore = false;
}

export function labelOf(id) {
  return annotations.get(id)?.label ?? "";
}

export function noteOf(id) {
  return annotations.get(id)?.note ?? "";
}

export function isStarred(id) {
  return annotations.get(id)?.star ?? false;
}

// Changes a feature's annotation: `annotate(7, { star: true })`.
export function annotate(id, change) {
  const now = { label: "", note: "", star: false, ...annotations.get(id), ...change };
  if (now.label || now.note || now.star) annotations.set(id, now);
  else annotations.delete(id);
  save();
  changed(id);
}

// Calls `action` with the feature whose annotation changes, or with -1 if many change.
export function onAnnotations(action) {
  changed = action;
}

// Returns whether this browser stores annotations. If not, only an export keeps them.
export function isStored() {
  return canStore;
}

export function nAnnotations() {
  return annotations.size;
}

// Returns all annotations as the text of a JSON file.
export function exportAnnotations() {
  const features = Object.fromEntries([...annotations].sort(([a], [b]) => a - b));
  return `${JSON.stringify({ format: FORMAT, sae: core.labels_key, features }, null, 1)}\n`;
}

// Adds the annotations of such a file, which replace existing ones. Returns how many there are.
export function importAnnotations(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error(`This file is not JSON. ${HINT}`);
  }
  if (data?.format !== FORMAT) throw new Error(`This file contains no labels. ${HINT}`);
  if (data.sae !== core.labels_key) {
    throw new Error("These labels belong to another SAE, whose features have different numbers.");
  }
  const imported = parseFeatures(data.features);
  for (const [id, annotation] of imported) annotations.set(id, annotation);
  save();
  changed(-1);
  return imported.size;
}

// Returns the well-formed annotations in data from outside.
function parseFeatures(features) {
  const parsed = new Map();
  for (const [key, entry] of Object.entries(features ?? {})) {
    const id = /^\d{1,15}$/.test(key) ? Number(key) : -1;
    if (id < 0 || id >= core.n_features || typeof entry !== "object" || entry === null) continue;
    const text = (name) => (typeof entry[name] === "string" ? entry[name].slice(0, MAX[name]) : "");
    parsed.set(id, { label: text("label"), note: text("note"), star: entry.star === true });
  }
  return parsed;
}

function save() {
  try {
    localStorage.setItem(KEY, exportAnnotations());
    canStore = true;
  } catch {
    canStore = false;
  }
}
