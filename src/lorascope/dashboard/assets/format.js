// Formats tokens and numbers for people. Text reaches the page only through textContent.
import { PARTIAL, SPECIAL, column, core } from "./data.js";

const MAX_CHARACTERS = 400; // of one token; the rest of a longer one is cut

// Whitespace, and characters that are invisible or change the direction of the text around them.
// Joiners are not among them, because emoji and scripts need them; nor are Arabic number signs.
const INVISIBLE =
  /(?![\u200c\u200d\u0600-\u0605\u06dd\u070f\u08e2])[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\u00a0]/gu;
const RIGHT_TO_LEFT =
  /[\p{Script=Arabic}\p{Script=Hebrew}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;
const ONLY_JOINERS = /^[\u200c\u200d\ufe00-\ufe0f]+$/;
const MARKS = { "\n": "\u21b5", "\t": "\u21e5", "\r": "CR", "\u00a0": "NBSP" };

// Returns an element with a class, attributes and content: a text, a number, a node, or a list of
// them. What is false, missing or empty in the list is left out.
export function element(tag, className = "", content = "", attributes = {}) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...[content].flat().filter((part) => part || part === 0));
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// Returns a button that does `action`.
export function button(text, action, { kind = "small", ...attributes } = {}) {
  const node = element("button", kind, text, { type: "button", ...attributes });
  node.addEventListener("click", action);
  return node;
}

// Returns the text of a token-table entry.
export function textOf(entry) {
  return core.token_texts[entry];
}

// Returns in which direction tokens are read: that of most of their letters. `dir=auto` would follow
// the first letter, and mirror a text because of one word. (Isolated tokens would break the letters
// of joined scripts, which meet across tokens.)
export function directionOf(entries) {
  let rightToLeft = 0;
  for (const entry of entries) {
    for (const [letter] of core.token_texts[entry].matchAll(/\p{L}/gu)) {
      rightToLeft += RIGHT_TO_LEFT.test(letter) ? 1 : -1;
    }
  }
  return rightToLeft > 0 ? "rtl" : "ltr";
}

// Fills `node` with the text of a token-table entry; its textContent is then exactly that text.
export function writeToken(node, entry) {
  const whole = core.token_texts[entry];
  const text = whole.length > MAX_CHARACTERS ? cut(whole) : whole;
  if (text === "") node.classList.add("continued");
  if (column.token_flags[entry] & SPECIAL) node.classList.add("special");
  if (column.token_flags[entry] & PARTIAL) node.classList.add("partial");
  if (text.length < whole.length) node.classList.add("cut");
  writeText(node, text);
}

// Fills `node` with a text in which invisible characters are marked; its textContent is the text.
export function writeText(node, text) {
  if (ONLY_JOINERS.test(text)) {
    node.append(mark(text));
    return;
  }
  let done = 0;
  for (const match of text.matchAll(INVISIBLE)) {
    if (match.index > done) node.append(text.slice(done, match.index));
    node.append(mark(match[0]));
    done = match.index + match[0].length;
  }
  if (done < text.length) node.append(text.slice(done));
}

// Returns notes about a token-table entry: its id, whether it is special, partial or cut.
export function tokenNotes(entry) {
  const notes = [];
  const flags = column.token_flags[entry];
  const id = column.token_id[entry];
  if (id >= 0) notes.push(`token id ${whole(id)}`);
  if (flags & SPECIAL) notes.push("special token");
  if (flags & PARTIAL) notes.push(`part of a character, bytes ${core.token_bytes[entry]}`);
  const length = core.token_texts[entry].length;
  if (length > MAX_CHARACTERS) {
    notes.push(`${whole(length)} characters, the first ${MAX_CHARACTERS} shown`);
  }
  return notes;
}

// Returns a number with four significant digits. Put the exact number into data-value.
export function short(value) {
  if (!Number.isFinite(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// Returns a number with three digits: effects and scores are not known more precisely.
export function three(value) {
  return short(Number(value.toPrecision(3)));
}

// Returns a number with three digits and its sign.
export function signed(value) {
  return `${value < 0 ? "\u2212" : "+"}${three(Math.abs(value))}`;
}

// Returns a whole number with thousands separators.
export function whole(value) {
  return value.toLocaleString("en-US");
}

export function percent(share) {
  const hundredth = 100 * share;
  return `${hundredth >= 0.001 ? Number(hundredth.toPrecision(3)) : short(hundredth)}\u00a0%`;
}

function mark(text) {
  const code = text.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
  const node = element("span", "mark", text, { "data-mark": MARKS[text] ?? `U+${code}` });
  if (text === "\n" || text === "\t") node.classList.add("space");
  return node;
}

function cut(text) {
  const end = text.charCodeAt(MAX_CHARACTERS - 1) >> 10 === 0x36 ? 1 : 0; // a surrogate pair stays whole
  return text.slice(0, MAX_CHARACTERS - end);
}
