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
  return drawSection("Strongest examples", "", [drawScale(scale, signed),
    ...examples.map((example, i) => drawCard(example, i + 1, id, scale, "example"))]);
}

export function drawSpecials({ id, specials }, { scale, signed }) {
  const of = core.n_special > 0 ? ` ${whole(core.n_special)}` : "";
  const note = `It fires at ${whole(column.n_special[id])} of the${of} special tokens and template ` +
    "headers. These firings are in no other statistic or example, except by role.";
  return drawSection("At special and template tokens", "at-special", [element("p", "note", note),
    isTemplate(id) && drawScale(scale, signed),
    ...specials.map((one, i) => drawCard(one, i + 1, id, scale, "special-example"))]);
}

export function drawSamples({ id, samples }, { scale }) {
  const note = "Random firings from each fifth of its activations, strongest fifth first.";
  return drawSection("Examples from strong to weak", "samples", [element("p", "note", note),
    ...samples.flatMap((sample, i) => [
      sample.quantile !== samples[i - 1]?.quantile &&
        element("h4", "", `${FIFTHS[sample.quantile] ?? ""} fifth`),
      drawCard(sample, i + 1, id, scale, "sample"),
    ])]);
}

function drawSection(title, testid, parts) {
  return element("section", "examples", [element("h3", "", title), ...parts],
    { "aria-label": title, "data-testid": testid });
}

function drawScale(scale, signed) {
  const note = "activation of this feature at a token, in the SAE's units";
  const low = signed ? `\u2212${short(scale)}` : "0";
  const legend = drawLegend(low, short(scale), note, { testid: "legend", signed });
  legend.append(element("span", "legend-mark", "outlined: the example's token"));
  return legend;
}

function drawCard(example, rank, id, scale, name) {
  const text = drawWindow(example, scale,
    `Tokens of ${name.replace("-", " ")} ${rank}. Arrow keys move between them.`);
  const unfold = example.tokens.length > MAX_TOKENS && drawUnfold(text, example.tokens.length);
  return element("article", "card", [drawHead(example, rank, id, name), text, unfold],
    { "data-testid": name });
}

function drawHead(example, rank, id, name) {
  // The column of bars shows how far the first example may be above the others.
  const share = Math.min(1, Math.abs(example.value) / (Math.abs(largest(id)) || 1));
  const strength = meter(share, { "data-testid": `${name}-share`,
    title: `${percent(Number(share.toPrecision(2)))} of the feature's maximum` });
  const value = element("span", "card-value", short(example.value),
    { "data-testid": `${name}-value`, "data-value": example.value });
  const n = whole(example.repeats);
  const repeats = element("span", "repeats", `\u00d7${n}`, { "data-testid": "repeats", role: "img",
    title: `this token and its neighbours occur ${n} times; shown once`,
    "aria-label": `occurs ${n} times` });
  const address = [["rollout", example.rollout], ["token", example.position], ["row", example.row]];
  const where = address.filter(([, number]) => number >= 0).map(([label, number]) =>
    element("span", "", `${label} ${whole(number)}`,
      { "data-testid": `${name}-${label}`, "data-value": number }));
  const link = element("a", "", "whole rollout", { "data-testid": "open-rollout",
    href: `#/rollout/${example.rollout}?token=${example.position}&paint=${id}` });
  return element("header", "card-head", [element("span", "card-rank", String(rank)), value, strength,
    example.repeats > 1 && repeats,
    element("span", "card-where", [...where, wholeRollouts.has(example.rollout) && link])]);
}

function drawWindow(example, scale, label) {
  const text = element("p", "window", "", { dir: directionOf(example.tokens), role: "group",
    "aria-label": label, "data-testid": "window", "data-walk": "" });
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
  }, { kind: "unfold", "data-testid": "unfold", "aria-expanded": "false" });
  return more;
}

// Returns the node of a token, coloured by its value.
export function drawToken(entry, value, scale) {
  const level = Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / scale));
  const color = value !== 0 ? ` ${value < 0 ? "minus" : "heat"}-${level}` : "";
  const node = element("span", `token${color}`, "",
    { "data-testid": "token", "data-value": value, "data-entry": entry });
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

