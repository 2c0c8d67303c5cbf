// One feature: its numbers, its histogram, and its examples as a heat map over tokens.
import { column, core } from "./data.js";
import { element, percent, short, whole, writeToken } from "./text.js";

const LEVELS = 9; // of the heat ramp in page.css, evenly spaced in lightness
const SVG = "http://www.w3.org/2000/svg";

// Returns the nodes that show a feature.
export function drawFeature(record) {
  const { id, examples } = record;
  const parts = [drawStats(id)];
  if (record.histogram.length && column.n_active[id] > 0) parts.push(drawHistogram(id, record));
  if (!examples.length) {
    const why = column.n_active[id] === 0
      ? `Feature ${id} is dead: it fires on none of the tokens that were read.`
      : `No example of feature ${id} was kept.`;
    return [drawMessage(why, "no-examples"), ...parts];
  }
  let scale = Math.abs(column.max[id]) || 0;
  let signed = false;
  for (const example of examples) {
    for (const value of example.activations) {
      if (Math.abs(value) > scale) scale = Math.abs(value);
      if (value < 0) signed = true;
    }
  }
  const section = element("section", "examples");
  section.append(element("h3", "", "Examples"), drawLegend(scale, signed));
  examples.forEach((example, i) => section.append(drawExample(example, i, scale)));
  return [...parts, section];
}

export function drawMessage(text, testid = "message") {
  const node = element("p", "message", text);
  node.dataset.testid = testid;
  return node;
}

function drawStats(id) {
  const n = column.n_active[id];
  const eligible = core.n_eligible;
  const max = column.max[id];
  const rows = [
    ["fires on", "n_active", n, n >= 0 && whole(n), "tokens with an activation above zero"],
    [
      "density", "density", n / eligible, n >= 0 && eligible > 0 && percent(n / eligible),
      `share of the ${whole(eligible || 0)} eligible tokens`,
    ],
    [
      "rollouts", "n_rollouts", column.n_rollouts[id],
      column.n_rollouts[id] >= 0 && whole(column.n_rollouts[id]),
      "texts in which it fires at least once",
    ],
    ["max", "max", max, !Number.isNaN(max) && short(max), "largest activation on any token"],
    [
      "mean", "mean", column.mean[id], !Number.isNaN(column.mean[id]) && short(column.mean[id]),
      "average activation over the tokens on which it fires",
    ],
    [
      "std", "std", column.std[id], !Number.isNaN(column.std[id]) && short(column.std[id]),
      "standard deviation over the same tokens",
    ],
    [
      "examples", "n_examples", column.n_examples[id],
      String(column.n_examples[id]), `strongest tokens kept, of ${core.top_k} at most`,
    ],
  ];
  const stats = element("dl", "stats");
  stats.dataset.testid = "stats";
  for (const [label, name, value, text, note] of rows) {
    if (!text) continue;
    const cell = element("div", "stat");
    const number = element("dd", "stat-value", text);
    number.dataset.testid = `stat-${name}`;
    number.dataset.value = String(value);
    cell.append(element("dt", "", label), number, element("dd", "stat-note", note));
    stats.append(cell);
  }
  return stats;
}

function drawHistogram(id, { histogram }) {
  const figure = element("figure", "histogram");
  const n = histogram.length;
  const top = histogram.reduce((a, b) => Math.max(a, b), 1);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${n} 40`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `Histogram of the activations of feature ${id}`);
  histogram.forEach((count, i) => {
    if (!count) return;
    const height = Math.max(0.8, (38 * count) / top);
    const bar = document.createElementNS(SVG, "rect");
    const title = document.createElementNS(SVG, "title");
    bar.setAttribute("x", i + 0.08);
    bar.setAttribute("y", 40 - height);
    bar.setAttribute("width", 0.84);
    bar.setAttribute("height", height);
    const range = `${short(column.edges[i])} to ${short(column.edges[i + 1])}`;
    title.textContent = `${range}: ${whole(count)} tokens`;
    bar.append(title);
    svg.append(bar);
  });
  const axis = element("div", "axis");
  axis.setAttribute("aria-hidden", "true");
  const ticks = Math.min(4, n);
  for (let i = 0; i <= ticks; i++) {
    axis.append(element("span", "", short(column.edges[Math.round((i * n) / ticks)])));
  }
  const caption = element(
    "figcaption", "",
    "How strongly it fires: number of tokens " +
      `(tallest bar ${whole(top)}) by activation, on a logarithmic axis.`,
  );
  figure.append(caption, svg, axis);
  return figure;
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

function drawExample(example, i, scale) {
  const card = element("article", "card");
  card.dataset.testid = "example";
  const head = element("header", "card-head");
  const value = element("span", "card-value", short(example.value));
  value.dataset.testid = "example-value";
  value.dataset.value = String(example.value);
  const where = element("span", "card-where");
  const places = [["rollout", example.rollout], ["token", example.position], ["row", example.row]];
  for (const [name, number] of places) {
    if (number < 0) continue;
    const part = element("span", "", `${name} ${whole(number)}`);
    part.dataset.testid = `example-${name}`;
    part.dataset.value = String(number);
    where.append(part);
  }
  head.append(element("span", "card-rank", String(i + 1)), value, where);
  const text = element("p", "window");
  text.dir = "auto";
  text.dataset.testid = "window";
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `Tokens of example ${i + 1}; arrow keys move between them`);
  if (example.position > example.target) text.classList.add("from-inside");
  example.tokens.forEach((entry, at) => {
    const token = drawToken(example, entry, at, scale);
    text.append(token);
    // The last newline of a token breaks the line behind the token, not inside: the piece of it
    // that would stand on the next line has no text, but would be painted.
    if (token.lastChild?.dataset?.mark === "\u21b5") {
      token.lastChild.classList.add("flat");
      text.append(element("br"));
    }
  });
  card.append(head, text);
  return card;
}

function drawToken(example, entry, at, scale) {
  const value = example.activations[at];
  const node = element("span", "token");
  const level = Math.min(LEVELS, Math.ceil((LEVELS * Math.abs(value)) / scale));
  if (value !== 0) node.classList.add(`${value < 0 ? "minus" : "heat"}-${level}`);
  node.dataset.testid = "token";
  node.dataset.value = String(value);
  node.dataset.entry = entry;
  node.tabIndex = at === example.target ? 0 : -1; // one stop for Tab, arrow keys go on from there
  writeToken(node, entry);
  if (at === example.target) {
    node.classList.add("target");
    node.dataset.target = "true";
  }
  return node;
}
