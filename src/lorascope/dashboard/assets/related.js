// What is related to a feature: tokens by four rankings, similar and co-firing features.
import { column, hasExample } from "./data.js";
import { meter, panel } from "./figures.js";
import { nameOf } from "./labels.js";
import { element, percent, textOf, three, writeToken } from "./format.js";

const RANKED = [
  ["mean", "Strongest tokens", "tokens by its mean activation", three],
  ["lift", "Most specific tokens", "how many times more often than average it fires there (lift)",
    (score) => `${three(score)}\u00d7`],
  ["before", "Tokens before", "tokens right before its firings, by share of firings", percent],
  ["after", "Tokens after", "tokens right after its firings, by share of firings", percent],
];

// Returns a panel for each ranking of tokens that the page has.
export function drawRankings({ ranked }) {
  return RANKED.filter(([name]) => ranked[name].length).map(([name, title, note, write]) =>
    panel(title, note, drawTokens(ranked[name], write), {
      testid: `ranked-${name}`,
      rows: () => [["token", "score"], ...ranked[name].map(([entry, score]) => [textOf(entry), score])],
    }));
}

// Returns a list of tokens, each with a bar and its score as `write` says it.
export function drawTokens(pairs, write, kind = "") {
  const top = Math.max(...pairs.map(([, score]) => Math.abs(score))) || 1;
  return element("ol", "ranked", pairs.map(([entry, score]) => element("li", `meter-row ${kind}`,
    [drawEntry(entry), meter(Math.abs(score) / top), drawNumber(write, score)])), { "data-testid": kind });
}

// Returns panels of links to features that write alike and to features that fire together.
export function drawNeighbours({ similar, cofiring }) {
  const kinds = [
    [similar, "Similar features", "cosine of decoder rows", "similar", three],
    [cofiring, "Co-firing features", "tokens with both / tokens with either (Jaccard index)",
      "cofiring", percent],
  ];
  return kinds.filter(([pairs]) => pairs.length).map(([pairs, title, note, testid, write]) => {
    const list = element("ul", "ranked",
      pairs.map(([id, score]) => element("li", "", drawLink(id, write, score))));
    return panel(title, note, list, {
      testid,
      rows: () => [["feature", "label", "score"], ...pairs.map(([id, score]) => [id, nameText(id), score])],
    });
  });
}

// Returns a link to a feature: its number, its label or its strongest token, and what `write` says of
// a value, if there is one.
export function drawLink(id, write = null, value = NaN) {
  return element("a", "feature-link",
    [element("span", "link-id", String(id)), drawName(id), write && drawNumber(write, value)],
    { href: `#/feature/${id}`, "data-feature": id });
}

function drawNumber(write, value) {
  return element("span", "meter-value", write(value), { "data-value": value });
}

// Returns a feature's label or strongest token as text, for a table.
export function nameText(id) {
  return nameOf(id) || (hasExample(id) ? textOf(column.top_token[id]) : "");
}

// Returns a feature's label, or its strongest token.
export function drawName(id) {
  const name = nameOf(id);
  if (name) return element("span", "name", name);
  return hasExample(id) ? drawEntry(column.top_token[id]) : element("span", "ranked-token");
}

export function drawEntry(entry) {
  const token = element("span", "ranked-token");
  writeToken(token, entry);
  return token;
}
