// Searches feature numbers, labels, notes, and the tokens of all windows. Labels and notes need all
// words of the query, in any order; tokens need it as it is.
//
// 1. Check every entry of the token table once: does it contain the query, or could the query begin
//    in it and continue in the next tokens?
// 2. Read the windows block by block. Join tokens only where the query may begin.
// Tokens stay in memory (4 bytes each), so that the next letter needs no decoding.
import { core, searchable } from "./data.js";
import { labelOf, noteOf } from "./annotations.js";
import { givenName } from "./labels.js";

const CONTAINS = 1;
const BEGINS = 2;
const PAUSE = 120; // milliseconds between two reports

const blocks = []; // block number -> Promise of what is searched in it
let lower = null; // texts of the token table in lower case
let latest = 0;

// Finds features. `where` is "fires" to search firing tokens, "context" to search whole windows.
// Calls `report(found, share)` with a flag for each feature; the last call has a share of 1.
export async function search(query, where, report) {
  const request = ++latest;
  const wanted = query.toLowerCase();
  const found = new Uint8Array(core.n_features);
  const number = /^#?\d{1,15}$/.test(wanted.trim()) ? Number(wanted.trim().replace("#", "")) : -1;
  for (let id = 0; id < core.n_features; id++) {
    const words = [labelOf(id), noteOf(id), givenName(id)].filter(Boolean);
    if (id === number || (words.length && hasAll(words.join("\n").toLowerCase(), wanted))) {
      found[id] = 1;
    }
  }
  const marks = marksOf(wanted);
  const n = Math.ceil(core.n_features / core.block);
  let reported = performance.now();
  for (let block = 0; block < n; block++) {
    blocks[block] ??= searchable(block);
    let part;
    try {
      part = await blocks[block];
    } catch {
      delete blocks[block]; // damage is reported when the block is shown
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

// Stops the current search.
export function stopSearch() {
  latest++;
}

function marksOf(wanted) {
  lower ??= core.token_texts.map((text) => text.toLowerCase());
  return Uint8Array.from(lower, (text) => {
    let mark = text.includes(wanted) ? CONTAINS : 0;
    for (let n = Math.min(text.length, wanted.length - 1); n > 0; n--) {
      if (text.endsWith(wanted.slice(0, n))) return mark | BEGINS;
    }
    return mark;
  });
}

function searchBlock(part, first, wanted, marks, where, found) {
  const { counts, token, length, fires, ranked, sentences } = part;
  sentences.forEach((text, i) => {
    if (text && hasAll(text, wanted)) found[first + i] = 1;
  });
  let window = 0;
  let at = 0;
  for (const owners of counts) {
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
    const each = entries.length / counts[0].length;
    entries.forEach((entry, i) => {
      if (entry && marks[entry - 1] & CONTAINS) found[first + Math.floor(i / each)] = 1;
    });
  });
}

// Returns whether a text has all words of a query.
function hasAll(text, wanted) {
  return wanted.split(/\s+/).every((word) => text.includes(word));
}

function isIn(token, fires, from, to, wanted, marks, where) {
  for (let t = from; t < to; t++) {
    const mark = marks[token[t]];
    if (mark & CONTAINS && (where !== "fires" || fires[t])) return true;
    if (mark & BEGINS && joins(token, fires, t, to, wanted, where)) return true;
  }
  return false;
}

// Returns whether the query begins in token t and continues in the next tokens.
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
