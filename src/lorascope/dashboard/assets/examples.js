// Examples and samples of one feature: tokens in their context, painted by activation.
import { column } from "./data.js";
import { element, short, whole, writeToken } from "./text.js";

export const LEVELS = 9; // of the heat ramp in colors.css, evenly spaced in lightness
const LONG = 29; // tokens of a window above which it is folded
const NEAR = 10; // tokens on each side of the target that a folded window shows
const FIFTHS = ["weakest", "second weakest", "middle", "second strongest", "strongest"];

const keptAt = new Map(Array.from(column.kept_rollout, (rollout, text) => [rollout, text]));

// Returns the largest activation that the windows show, and whether any is below zero.
export function scaleOf({ id, examples, samples }) {
  let scale = Math.abs(column.max[id]) || 0;
  let signed = false;
  for (const { activations } of [...examples, ...samples]) {
    for (const value of activations) {
      if (Math.abs(value) > scale) scale = Math.abs(value);
      if (value < 0) signed = true;
    }
  }
  return { scale, signed };
}

export function drawExamples({ id, examples }, { scale, signed }) {
  const section = element("section", "examples");
  section.setAttribute("aria-label", "Strongest examples");
  section.append(element("h3", "", "Strongest examples"), drawLegend(scale, signed));
  examples.forEach((example, i) => section.append(drawCard(example, i + 1, id, scale)));
  return section;
}

export function drawSamples({ id, samples }, { scale }) {
  const section = element("section", "examples");
  section.dataset.testid = "samples";
  section.setAttribute("aria-label", "Samples across its strength");
  section.append(
    element("h3", "", "Across its strength"),
    element("p", "note", "Drawn at random from each fifth of its firings, strongest fifth first."),
  );
  let fifth = -1;
  samples.forEach((sample, i) => {
    if (sample.quantile !== fifth) {
      fifth = sample.quantile;
      section.append(element("h4", "", `${FIFTHS[fifth] ?? ""} fifth`));
    }
    section.append(drawCard(sample, i + 1, id, scale));
  });
  return section;
}

function drawLegend(scale, signed) {
  const legend = element("div", "legend");
  legend.dataset.testid = "legend";
  const ramp = element("span", "ramp");
  const steps = Array.from({ length: LEVELS }, (_, i) => i + 1);
  if (signed) for (const i of [...steps].reverse()) ramp.append(element("i", `minus-${i}`));
  for (const i of steps) ramp.append(element("i", `heat-${i}`));
  legend.append(
    element("span", "", signed ? `\u2212${short(scale)}` : "0"),
    ramp,
    element("span", "", short(scale)),
    element("span", "legend-note", "activation of this feature on a token, in the SAE's units"),
    element("span", "legend-mark", "outlined: the token of the example"),
  );
  return legend;
}

function drawCard(example, rank, id, scale) {
  const card = element("article", "card");
  const name = example.quantile < 0 ? "example" : "sample";
  card.dataset.testid = name;
  const text = drawWindow(example, scale);
  text.setAttribute("aria-label", `Tokens of ${name} ${rank}; arrow keys move between them`);
  card.append(drawHead(example, rank, id, name), text);
  if (example.tokens.length > LONG) card.append(drawUnfold(text, example.tokens.length));
  return card;
}

function drawHead(example, rank, id, name) {
  const head = element("header", "card-head");
  const value = element("span", "card-value", short(example.value));
  value.dataset.testid = `${name}-value`;
  value.dataset.value = String(example.value);
  head.append(element("span", "card-rank", String(rank)), value);
  if (example.alike > 1) {
    const alike = element("span", "alike", `\u00d7${whole(example.alike)}`);
    alike.dataset.testid = "alike";
    alike.title = `the same tokens stand in ${whole(example.alike)} places; shown once`;
    const said = `in ${whole(example.alike)} places`;
    alike.setAttribute("role", "img");
    alike.setAttribute("aria-label", said);
    head.append(alike);
  }
  const where = element("span", "card-where");
  const places = [["rollout", example.rollout], ["token", example.position], ["row", example.row]];
  for (const [label, number] of places) {
    if (number < 0) continue;
    const part = element("span", "", `${label} ${whole(number)}`);
    part.dataset.testid = `${name}-${label}`;
    part.dataset.value = String(number);
    where.append(part);
  }
  if (keptAt.has(example.rollout)) {
    const link = element("a", "", "whole text");
    link.href = `#/text/${example.rollout}?token=${example.position}&paint=${id}`;
    link.dataset.testid = "open-text";
    where.append(link);
  }
  head.append(where);
  return head;
}

function drawWindow(example, scale) {
  const text = element("p", "window");
  text.dir = "auto";
  text.dataset.testid = "window";
  text.dataset.walk = "";
  text.setAttribute("role", "group");
  const folded = example.tokens.length > LONG;
  if (folded) text.classList.add("folded");
  const { target } = example;
  if (example.position > target || (folded && target > NEAR)) text.classList.add("from-inside");
  example.tokens.forEach((entry, at) => {
    const token = drawToken(entry, example.activations[at], scale);
    token.tabIndex = at === target ? 0 : -1; // one stop for Tab, arrow keys go on from there
    if (at === target) {
      token.classList.add("target");
      token.dataset.target = "true";
    }
    const parts = [token, ...lineEnd(token)];
    if (folded && Math.abs(at - target) > NEAR) {
      for (const part of parts) part.classList.add("far");
    }
    text.append(...parts);
  });
  return text;
}

function drawUnfold(text, n) {
  const more = element("button", "unfold", `Show all ${n} tokens`);
  more.type = "button";
  more.dataset.testid = "unfold";
  more.setAttribute("aria-expanded", "false");
  more.addEventListener("click", () => {
    const folded = text.classList.toggle("folded");
    more.setAttribute("aria-expanded", String(!folded));
    more.textContent = folded ? `Show all ${n} tokens` : "Show fewer tokens";
  });
  return more;
}

// Returns a token's node, painted by its value.
export function drawToken(entry, value, scale) {
  const node = element("span", "token");
  const level = Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / scale));
  if (value !== 0) node.classList.add(`${value < 0 ? "minus" : "heat"}-${level}`);
  node.dataset.testid = "token";
  node.dataset.value = String(value);
  node.dataset.entry = entry;
  writeToken(node, entry);
  return node;
}

// The last newline of a token breaks the line behind the token, not inside: the piece of it that
// would stand on the next line has no text, but would be painted.
export function lineEnd(token) {
  if (token.lastChild?.dataset?.mark !== "\u21b5") return [];
  token.lastChild.classList.add("flat");
  return [element("br")];
}

