// The star, label and note below a feature's number, and their export and import.
import {
  annotate, exportAnnotations, importAnnotations, isStarred, isStored, labelOf, nAnnotations, noteOf,
} from "./annotations.js";
import { saveFile } from "./copying.js";
import { whole } from "./format.js";

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

function showStatus(text) {
  status.textContent = text;
}

function warnIfNotStored() {
  if (isStored()) return;
  showStatus("This browser cannot store labels for this file. Export them before you close it.");
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
  showStatus(`Exported labels, notes and stars for ${features(nAnnotations())}.`);
});
byId("import-labels").addEventListener("click", () => byId("labels-file").click());
byId("labels-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const n = importAnnotations(await file.text());
    showStatus(`Imported labels, notes and stars for ${features(n)}.`);
    warnIfNotStored();
    showAnnotations(current);
  } catch (error) {
    showStatus(error.message);
  }
});

function features(n) {
  return `${whole(n)} feature${n === 1 ? "" : "s"}`;
}
