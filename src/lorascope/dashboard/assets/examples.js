// Examples and samples of one feature: tokens in their context, coloured by activation.
import { column, core, isTemplate, largest } from "./data.js";
import { LEVELS, drawLegend, meter } from "./figures.js";
import { button, directionOf, element, percent, short, whole, writeToken } from "./format.js";

const MAX_TOKENS = 29; // a longer window is folded
const N_NEAR = 10; // tokens on each side of the target that a folded window shows
const FIFTHS = ["weakest", "second weakest", "middle", "second strongest", "strongest"];

const wholeRollouts = new Set(column.kept_rollout);

// Returns the largest size of an activation in the windows, and whether any is negative.
export function scaleOf({ id, examples, samples, specials }) {
  let scale = Math.abs(largest(id)) || 0;
  let signed = false;
  for (const { activations } of [...examples, ...samples, ...specials]) {
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
  section.append(element("h3", "", "Strongest examples"), drawScale(scale, signed));
  examples.forEach((example, i) => section.append(drawCard(example, i + 1, id, scale, "example")));
  return section;
}

export function drawSpecials({ id, specials }, { scale, signed }) {
  const section = element("section", "examples");
  section.dataset.testid = "at-special";
  section.setAttribute("aria-label", "At special and template tokens");
  const of = core.n_special > 0 ? ` ${whole(core.n_special)}` : "";
  const note = `It fires at ${whole(column.n_special[id])} of the${of} special tokens and template ` +
    "headers. These firings are in no other statistic or example, except by role.";
  section.append(element("h3", "", "At special and template tokens"), element("p", "note", note));
  if (isTemplate(id)) section.append(drawScale(scale, signed));
  specials.forEach((one, i) => section.append(drawCard(one, i + 1, id, scale, "special-example")));
  return section;
}

export function drawSamples({ id, samples }, { scale }) {
  const section = element("section", "examples");
  section.dataset.testid = "samples";
  section.setAttribute("aria-label", "Examples from strong to weak");
  section.append(
    element("h3", "", "Examples from strong to weak"),
    element("p", "note", "Random firings from each fifth of its activations, strongest fifth first."),
  );
  let fifth = -1;
  samples.forEach((sample, i) => {
    if (sample.quantile !== fifth) {
      fifth = sample.quantile;
      section.append(element("h4", "", `${FIFTHS[fifth] ?? ""} fifth`));
    }
    section.append(drawCard(sample, i + 1, id, scale, "sample"));
  });
  return section;
}

function drawScale(scale, signed) {
  const note = "activation of this feature at a token, in the SAE's units";
  const low = signed ? `\u2212${short(scale)}` : "0";
  const legend = drawLegend(low, short(scale), note, { testid: "legend", signed });
  legend.append(element("span", "legend-mark", "outlined: the example's token"));
  return legend;
}

function drawCard(example, rank, id, scale, name) {
  const card = element("article", "card");
  card.dataset.testid = name;
  const text = drawWindow(example, scale);
  text.setAttribute("aria-label", `Tokens of ${name.replace("-", " ")} ${rank}. Arrow keys move between them.`);
  card.append(drawHead(example, rank, id, name), text);
  if (example.tokens.length > MAX_TOKENS) card.append(drawUnfold(text, example.tokens.length));
  return card;
}

function drawHead(example, rank, id, name) {
  const head = element("header", "card-head");
  // The column of bars shows how far the first example may be above the others.
  const share = Math.min(1, Math.abs(example.value) / (Math.abs(largest(id)) || 1));
  const strength = meter(share);
  strength.dataset.testid = `${name}-share`;
  strength.title = `${percent(Number(share.toPrecision(2)))} of the feature's maximum`;
  const value = element("span", "card-value", short(example.value));
  value.dataset.testid = `${name}-value`;
  value.dataset.value = String(example.value);
  head.append(element("span", "card-rank", String(rank)), value, strength);
  if (example.repeats > 1) {
    const repeats = element("span", "repeats", `\u00d7${whole(example.repeats)}`);
    repeats.dataset.testid = "repeats";
    repeats.title = `this token and its neighbours occur ${whole(example.repeats)} times; shown once`;
    repeats.setAttribute("role", "img");
    repeats.setAttribute("aria-label", `occurs ${whole(example.repeats)} times`);
    head.append(repeats);
  }
  const where = element("span", "card-where");
  const address = [["rollout", example.rollout], ["token", example.position], ["row", example.row]];
  for (const [label, number] of address) {
    if (number < 0) continue;
    const part = element("span", "", `${label} ${whole(number)}`);
    part.dataset.testid = `${name}-${label}`;
    part.dataset.value = String(number);
    where.append(part);
  }
  if (wholeRollouts.has(example.rollout)) {
    const link = element("a", "", "whole rollout");
    link.href = `#/rollout/${example.rollout}?token=${example.position}&paint=${id}`;
    link.dataset.testid = "open-rollout";
    where.append(link);
  }
  head.append(where);
  return head;
}

function drawWindow(example, scale) {
  const text = element("p", "window");
  text.dir = directionOf(example.tokens);
  text.dataset.testid = "window";
  text.dataset.walk = "";
  text.setAttribute("role", "group");
  const folded = example.tokens.length > MAX_TOKENS;
  if (folded) text.classList.add("folded");
  const { target } = example;
  if (example.position > target || (folded && target > N_NEAR)) text.classList.add("from-inside");
  example.tokens.forEach((entry, at) => {
    const token = drawToken(entry, example.activations[at], scale);
    token.tabIndex = at === target ? 0 : -1; // Tab stops here; arrow keys move on
    if (at === target) {
      token.classList.add("target");
      token.dataset.target = "true";
    }
    const parts = [token, ...lineEnd(token)];
    if (folded && Math.abs(at - target) > N_NEAR) {
      for (const part of parts) part.classList.add("far");
    }
    text.append(...parts);
  });
  return text;
}

function drawUnfold(text, n) {
  const more = button(`Show all ${n} tokens`, () => {
    const folded = text.classList.toggle("folded");
    more.setAttribute("aria-expanded", String(!folded));
    more.textContent = folded ? `Show all ${n} tokens` : "Show fewer tokens";
  }, { kind: "unfold", testid: "unfold" });
  more.setAttribute("aria-expanded", "false");
  return more;
}

// Returns the node of a token, coloured by its value.
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

// Returns a line break for a token that ends with a newline. Inside the token, the newline would
// leave an empty coloured piece on the next line.
export function lineEnd(token) {
  if (token.lastChild?.dataset?.mark !== "\u21b5") return [];
  token.lastChild.classList.add("flat");
  return [element("br")];
}

