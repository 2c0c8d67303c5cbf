// The list of rollouts that are in the page as a whole, by the reason they were selected for.
import { column, core, rolloutData } from "./data.js";
import { element, percent, three, whole } from "./format.js";

const byId = (id) => document.getElementById(id);
const [list, search, reason] = [byId("rollouts"), byId("rollout-query"), byId("rollout-reason")];
const REASONS = [[1, "highest L0"], [2, "rarest features"], [4, "worst reconstructed"],
  [8, "at random"], [16, "explained predictions"]];
const explained = new Set(core.effects?.attribution?.rollouts ?? []);
const CONTEXT = 30; // characters on each side of a search result
const PAUSE = 80; // milliseconds after the last letter before a search begins

export const nRollouts = column.kept_rollout.length;
let latest = 0;
let timer = 0;
let current = -1;
let listed = []; // rollouts in the list, in its order
let refilled = () => {};

// Returns a rollout's statistics: [label, name, number, text for people, definition] of each.
export function rolloutStats(at) {
  const [l0, fvu, rarity] = [column.kept_l0[at], column.kept_fvu[at], column.kept_rarity[at]];
  return [
    ["tokens", "length", column.kept_length[at], whole(column.kept_length[at]),
      "tokens in this rollout"],
    ["L0", "l0", l0, !Number.isNaN(l0) && three(l0),
      "average number of features that fire at a token"],
    ["FVU", "fvu", fvu, !Number.isNaN(fvu) && percent(fvu),
      "share of its variance that the SAE leaves unexplained"],
    ["rarity", "rarity", rarity, !Number.isNaN(rarity) && three(rarity),
      "average of \u2212log\u2081\u2080 density of the features that fire; 3 is one token in a thousand"],
  ];
}

// Returns the reasons that a rollout was selected for, and whether its predictions are explained.
export function reasonsOf(at) {
  return REASONS.filter(([bit]) => why(at) & bit).map(([, name]) => name);
}

function why(at) {
  return column.kept_why[at] | (explained.has(column.kept_rollout[at]) ? 16 : 0);
}

// Returns the rollout at the top of the list, -1 if the list is empty.
export function firstRollout() {
  return listed[0] ?? -1;
}

// Returns the rollouts in the list, in its order.
export function listedRollouts() {
  return listed;
}

// Calls `action` when the list has other rollouts.
export function onRefilled(action) {
  refilled = action;
}

// Marks the rollout that is shown.
export function markRollout(at) {
  current = at;
  for (const link of list.querySelectorAll("a")) {
    if (Number(link.dataset.rollout) === at) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

// Returns the rollouts of the chosen reason, those that fit it best first; of any reason, those
// with explained predictions first.
function sorted() {
  const bit = Number(reason.value);
  const score = { 1: column.kept_l0, 2: column.kept_rarity, 4: column.kept_fvu }[bit];
  const all = Array.from({ length: nRollouts }, (_, at) => at);
  const chosen = all.filter((at) => !bit || why(at) & bit);
  if (!bit) chosen.sort((a, b) => (why(b) & 16) - (why(a) & 16) || a - b);
  if (score) chosen.sort((a, b) => score[b] - score[a] || a - b);
  return chosen;
}

async function refill() {
  const request = ++latest;
  const wanted = search.value.trim() ? search.value.toLowerCase() : "";
  const hits = [];
  for (const at of sorted()) {
    const hit = wanted ? await find(at, wanted) : { token: -1 };
    if (request !== latest) return;
    if (hit) hits.push([at, hit]);
  }
  listed = hits.map(([at]) => at);
  list.replaceChildren(...hits.map(([at, hit]) => drawRow(at, hit)));
  byId("rollout-count").textContent = `${whole(hits.length)} of ${whole(nRollouts)} rollouts`;
  markRollout(current);
  refilled();
}

// Returns where a rollout contains the searched text: the first token, and some text around it.
async function find(at, wanted) {
  let data;
  try {
    data = await rolloutData(at);
  } catch {
    return null; // damage is reported when the rollout is shown
  }
  const parts = Array.from(data.token, (entry) => core.token_texts[entry]);
  const text = parts.join("");
  const start = text.toLowerCase().indexOf(wanted);
  if (start < 0) return null;
  let end = 0;
  const token = parts.findIndex((part) => (end += part.length) > start);
  const stop = start + wanted.length;
  const context = [text.slice(Math.max(0, start - CONTEXT), start), text.slice(start, stop),
    text.slice(stop, stop + CONTEXT)].map((part) => part.replace(/\s+/g, " "));
  return { token, context };
}

function drawRow(at, { token, context }) {
  const id = column.kept_rollout[at];
  const stats = rolloutStats(at).filter(([, , , text]) => text);
  const notes = stats.map(([label, name, , text]) => (
    name === "length" ? `${text} ${label}` : `${label} ${text}`
  ));
  const [before, hit, after] = context ?? [];
  const link = element("a", "", [
    element("span", "rollout-name", `Rollout ${whole(id)}`),
    element("span", "rollout-note", notes.join(" \u00b7 ")),
    element("span", "rollout-why", reasonsOf(at).map((name) => element("span", "chip", name))),
    context && element("span", "rollout-context",
      [`\u2026${before}`, element("mark", "", hit), `${after}\u2026`]),
  ], { href: `#/rollout/${id}${token >= 0 ? `?token=${token}` : ""}`,
    "data-rollout": at, "data-testid": "rollout-row" });
  return element("div", "rollout-row", link, { role: "listitem" });
}

for (const [bit, name] of REASONS) {
  if (bit !== 16 || explained.size) reason.append(element("option", "", name, { value: bit }));
}
reason.addEventListener("change", refill);
search.addEventListener("input", () => {
  clearTimeout(timer);
  timer = setTimeout(refill, PAUSE);
});
refill();
