// The line under a feature's number: star, label, note; and their export and import.
import { change, exported, imported, isKept, isStarred, labelOf, nNotes, noteOf } from "./notes.js";
import { saveFile } from "./saves.js";
import { whole } from "./text.js";

const byId = (id) => document.getElementById(id);
const [words, star, label] = [byId("words"), byId("star"), byId("label")];
const [note, noteButton, said] = [byId("note"), byId("note-button"), byId("files-said")];

let current = -1;

// Shows what is said of a feature, or nothing for -1.
export function showWords(id) {
  current = id;
  words.hidden = id < 0;
  if (id < 0) return;
  if (label.value !== labelOf(id)) label.value = labelOf(id);
  if (note.value !== noteOf(id)) note.value = noteOf(id);
  openNote(noteOf(id) !== "");
  drawStar();
}

export function toggleStar() {
  if (current < 0) return;
  change(current, { star: !isStarred(current) });
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

function tell(text) {
  said.textContent = text;
}

function warn() {
  if (!isKept()) tell("This browser keeps no labels for this file: export them before you leave.");
}

star.addEventListener("click", toggleStar);
label.addEventListener("input", () => change(current, { label: label.value }));
note.addEventListener("input", () => change(current, { note: note.value }));
for (const field of [label, note]) field.addEventListener("change", warn);
label.addEventListener("keydown", (event) => {
  if (event.key === "Enter") label.blur();
});
noteButton.addEventListener("click", () => {
  if (note.hidden) editNote();
  else openNote(false);
});
byId("save-notes").addEventListener("click", () => {
  saveFile("labels.json", exported(), "application/json");
  tell(`${whole(nNotes())} features with words of yours were saved.`);
});
byId("load-notes").addEventListener("click", () => byId("notes-file").click());
byId("notes-file").addEventListener("change", async (event) => {
  const [file] = event.target.files;
  event.target.value = "";
  if (!file) return;
  try {
    const n = imported(await file.text());
    tell(`Words on ${whole(n)} features were taken over.`);
    warn();
    showWords(current);
  } catch (error) {
    tell(error.message);
  }
});
