// The list of texts that are kept whole: sorted by why they were kept, and searched.
import { column, core, keptText } from "./data.js";
import { element, percent, short, whole } from "./text.js";

const byId = (id) => document.getElementById(id);
const [list, search, order] = [byId("texts"), byId("text-query"), byId("text-order")];
const WHY = [[1, "most firing"], [2, "rarest"], [4, "strangest"], [8, "random"]];
const AROUND = 30; // characters of a text on each side of what was searched
const PAUSE = 80; // milliseconds after the last letter

export const nTexts = column.kept_rollout.length;
let latest = 0;
let timer = 0;
let current = -1;
let first = -1; // text at the top of the list

// What is known of a text: [label, name, number, text for people, definition].
export function textFacts(text) {
  const [l0, fvu, rarity] = [column.kept_l0[text], column.kept_fvu[text], column.kept_rarity[text]];
  return [
    ["tokens", "length", column.kept_length[text], whole(column.kept_length[text]),
      "tokens in this text"],
    ["L0", "l0", l0, !Number.isNaN(l0) && short(l0), "features that fire on a token, on average"],
    ["unexplained", "fvu", fvu, !Number.isNaN(fvu) && percent(fvu),
      "share of its variance that the SAE leaves unexplained (FVU)"],
    ["rarity", "rarity", rarity, !Number.isNaN(rarity) && short(rarity),
      "mean of \u2212log\u2081\u2080 density of what fires: 3 is one token in a thousand"],
  ];
}

// Returns why a text was kept, in words.
export function whyOf(text) {
  return WHY.filter(([bit]) => column.kept_why[text] & bit).map(([, word]) => word);
}

// Returns the text at the top of the list, -1 when it is empty.
export function firstText() {
  return first;
}

// Marks the text that is shown.
export function markText(text) {
  current = text;
  for (const link of list.querySelectorAll("a")) {
    if (Number(link.dataset.text) === text) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function arranged() {
  const why = Number(order.value);
  const measure = { 1: column.kept_l0, 2: column.kept_rarity, 4: column.kept_fvu }[why];
  const texts = Array.from({ length: nTexts }, (_, text) => text);
  const kept = texts.filter((text) => !why || column.kept_why[text] & why);
  if (measure) kept.sort((a, b) => measure[b] - measure[a] || a - b);
  return kept;
}

async function refill() {
  const request = ++latest;
  const wanted = search.value.trim() ? search.value.toLowerCase() : "";
  const hits = [];
  for (const text of arranged()) {
    const hit = wanted ? await find(text, wanted) : { token: -1, around: "" };
    if (request !== latest) return;
    if (hit) hits.push([text, hit]);
  }
  first = hits.length ? hits[0][0] : -1;
  list.replaceChildren(...hits.map(([text, hit]) => row(text, hit)));
  byId("text-count").textContent =
    `${whole(hits.length)} of ${whole(nTexts)} texts that are kept whole`;
  markText(current);
}

// Returns where a text has what is searched: its first token and some characters around.
async function find(text, wanted) {
  let kept;
  try {
    kept = await keptText(text);
  } catch {
    return null; // a damaged text is told of when it is shown
  }
  const parts = Array.from(kept.token, (entry) => core.texts[entry]);
  const joined = parts.join("").toLowerCase();
  const at = joined.indexOf(wanted);
  if (at < 0) return null;
  let end = 0;
  const token = parts.findIndex((part) => (end += part.length) > at);
  const around = joined.slice(Math.max(0, at - AROUND), at + wanted.length + AROUND);
  return { token, around: around.replace(/\s+/g, " ") };
}

function row(text, { token, around }) {
  const item = element("div", "text-row");
  item.setAttribute("role", "listitem");
  const link = element("a");
  const rollout = column.kept_rollout[text];
  link.href = `#/text/${rollout}${token >= 0 ? `?token=${token}` : ""}`;
  link.dataset.text = text;
  link.dataset.testid = "text-row";
  link.append(element("span", "text-name", `Rollout ${whole(rollout)}`));
  const facts = textFacts(text).filter(([, , , written]) => written);
  const said = facts.map(([label, , , written]) => `${written} ${label}`).join(" \u00b7 ");
  link.append(element("span", "text-note", said));
  const why = element("span", "text-why");
  for (const word of whyOf(text)) why.append(element("span", "chip", word));
  link.append(why);
  if (around) link.append(element("span", "text-around", `\u2026${around}\u2026`));
  item.append(link);
  return item;
}

order.addEventListener("change", refill);
search.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(refill, PAUSE);
});
refill();
