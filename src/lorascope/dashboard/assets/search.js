// Search over numbers, labels, notes, and the texts of all windows.
//
// 1. Every entry of the text table is looked at once: does it hold the query, or may the query
//    begin in it and go on in the next tokens?
// 2. Windows are read block by block; only where an entry may begin the query are texts joined.
// What is read is kept (4 bytes a token), so that the next letter costs no decoding.
import { core, searchable } from "./data.js";
import { labelOf, noteOf } from "./notes.js";

const HOLDS = 1;
const BEGINS = 2;
const PAUSE = 120; // milliseconds between two reports

const read = []; // block number -> Promise of what is searched of it
let lower = null; // texts in lower case
let latest = 0;

// Finds features. `where` is "fires" for tokens on which they fire, "context" for all of a window.
// Calls `report(found, share)` with flags by feature, first at once, and at last with a share of 1.
export async function search(query, where, report) {
  const request = ++latest;
  const wanted = query.toLowerCase();
  const found = new Uint8Array(core.n_features);
  const number = /^#?\d{1,15}$/.test(wanted.trim()) ? Number(wanted.trim().replace("#", "")) : -1;
  for (let id = 0; id < core.n_features; id++) {
    const words = labelOf(id) || noteOf(id) ? `${labelOf(id)}\n${noteOf(id)}`.toLowerCase() : "";
    if (id === number || (words && words.includes(wanted))) found[id] = 1;
  }
  const marks = marksOf(wanted);
  const n = Math.ceil(core.n_features / core.block);
  let reported = performance.now();
  for (let block = 0; block < n; block++) {
    read[block] ??= searchable(block);
    let part;
    try {
      part = await read[block];
    } catch {
      delete read[block]; // a damaged block is told of when it is shown
      continue;
    }
    if (request !== latest) return;
    searchBlock(part, block * core.block, wanted, marks, where, found);
    if (performance.now() - reported > PAUSE && block < n - 1) {
      report(found, (block + 1) / n);
      await new Promise((done) => setTimeout(done));
      if (request !== latest) return;
      reported = performance.now();
    }
  }
  report(found, 1);
}

// Drops a search that is under way.
export function stopSearch() {
  latest++;
}

function marksOf(wanted) {
  lower ??= core.texts.map((text) => text.toLowerCase());
  return Uint8Array.from(lower, (text) => {
    let mark = text.includes(wanted) ? HOLDS : 0;
    for (let n = Math.min(text.length, wanted.length - 1); n > 0; n--) {
      if (text.endsWith(wanted.slice(0, n))) return mark | BEGINS;
    }
    return mark;
  });
}

function searchBlock(part, first, wanted, marks, where, found) {
  const { counts, sampleCounts, token, length, fires, ranked } = part;
  let window = 0;
  let at = 0;
  for (const owners of [counts, sampleCounts]) {
    owners.forEach((n, i) => {
      for (let k = 0; k < n; k++, window++) {
        const end = at + length[window];
        if (!found[first + i] && isIn(token, fires, at, end, wanted, marks, where)) {
          found[first + i] = 1;
        }
        at = end;
      }
    });
  }
  ranked.slice(0, where === "fires" ? 2 : 4).forEach((entries) => {
    const each = entries.length / counts.length;
    entries.forEach((entry, i) => {
      if (entry && marks[entry - 1] & HOLDS) found[first + Math.floor(i / each)] = 1;
    });
  });
}

function isIn(token, fires, from, to, wanted, marks, where) {
  for (let t = from; t < to; t++) {
    const mark = marks[token[t]];
    if (mark & HOLDS && (where !== "fires" || fires[t])) return true;
    if (mark & BEGINS && joins(token, fires, t, to, wanted, where)) return true;
  }
  return false;
}

// Whether the query begins in token t and goes on in the tokens behind it.
function joins(token, fires, t, to, wanted, where) {
  const own = lower[token[t]].length;
  let text = "";
  let fired = false;
  for (let u = t; u < to && text.length < own + wanted.length; u++) {
    text += lower[token[u]];
    fired ||= fires[u] !== 0;
    const at = text.indexOf(wanted);
    if (at >= 0) return at < own && (where !== "fires" || fired);
  }
  return false;
}
