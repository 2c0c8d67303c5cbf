// Labels, notes and stars that the user gives to features: the form below a feature's number, and
// their export and import. The browser stores them for each SAE.
import { saveFile } from "./copying.js";
import { core } from "./data.js";
import { whole } from "./format.js";

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
function annotate(id, change) {
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

export function nAnnotations() {
  return annotations.size;
}

// Returns all annotations as the text of a JSON file.
function exportAnnotations() {
  const features = Object.fromEntries([...annotations].sort(([a], [b]) => a - b));
  return `${JSON.stringify({ format: FORMAT, sae: core.labels_key, features }, null, 1)}\n`;
}

// Adds the annotations of such a file, which replace existing ones. Returns how many there are.
function importAnnotations(text) {
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

const byId = (id) => document.getElementById(id);
const [form, star, label] = [byId("annotation"), byId("star"), byId("label")];
const [note, noteButton, status] = [byId("note"), byId("note-button"), byId("files-status")];

let current = -1;

// Shows the annotation of a feature, or nothing for -1.
export function showAnnotations(id) {
  current = id;
  form.hidden = id < 0;
  if (id < 0) return;
  if (label.value !== labelOf(id)) label.value = labelOf(id);
  if (note.value !== noteOf(id)) note.value = noteOf(id);
  openNote(noteOf(id) !== "");
  drawStar();
}

export function toggleStar() {
  if (current < 0) return;
  annotate(current, { star: !isStarred(current) });
  drawStar();
}

export function editLabel() {
  if (current >= 0) label.focus();
}

export function editNote() {
  if (current < 0) return;
  openNote(true);
  note.focus();
}

function drawStar() {
  const on = isStarred(current);
  star.setAttribute("aria-pressed", String(on));
  star.textContent = on ? "\u2605" : "\u2606";
}

function openNote(open) {
  note.hidden = !open;
  noteButton.setAttribute("aria-expanded", String(open));
}

function warnIfNotStored() {
  if (canStore) return;
  status.textContent = "This browser cannot store labels for this file. Export them before you close it.";
}

star.addEventListener("click", toggleStar);
label.addEventListener("input", () => annotate(current, { label: label.value }));
note.addEventListener("input", () => annotate(current, { note: note.value }));
for (const field of [label, note]) field.addEventListener("change", warnIfNotStored);
label.addEventListener("keydown", (event) => {
  if (event.key === "Enter") label.blur();
});
noteButton.addEventListener("click", () => {
  if (note.hidden) editNote();
  else openNote(false);
});
byId("export-labels").addEventListener("click", () => {
  saveFile("hand-labels.json", exportAnnotations(), "application/json");
  status.textContent = `Exported labels, notes and stars for ${features(nAnnotations())}.`;
});
byId("import-labels").addEventListener("click", () => byId("labels-file").click());
byId("labels-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const n = importAnnotations(await file.text());
    status.textContent = `Imported labels, notes and stars for ${features(n)}.`;
    warnIfNotStored();
    showAnnotations(current);
  } catch (error) {
    status.textContent = error.message;
  }
});

function features(n) {
  return `${whole(n)} feature${n === 1 ? "" : "s"}`;
}
