// Figures of one feature: histograms, densities by role and position, and a grid of its sites.
import { copyMenu } from "./copying.js";
import { column, core } from "./data.js";
import { element, percent, short, whole } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT] = [320, 96]; // of a bar figure, in SVG units
export const LEVELS = 9; // of the heat ramps in colors.css, evenly spaced in lightness

export function svg(tag, attributes = {}, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  return node;
}

// Returns a panel with a title, a definition, a drawing, and a menu that copies it: `rows` returns
// its numbers, the names of the columns first; `file` names its SVG.
export function panel(title, note, drawing, { testid = "", file = "", rows = null } = {}) {
  const head = element("div", "panel-head", element("h3", "", title));
  const figure = element("figure", "panel", [head, element("figcaption", "", note), drawing].flat(),
    { "data-testid": testid });
  if (rows || file) head.append(copyMenu(title, figure, rows, file));
  return figure;
}

export function drawHistogram({ id, histogram: all }) {
  const { edges } = column;
  const histogram = all.subarray(0, usedBins());
  const top = histogram.reduce((a, b) => Math.max(a, b), 1);
  const bars = Array.from(histogram, (n, i) => ({
    share: n / top,
    tip: `${short(edges[i])} to ${short(edges[i + 1])}: ${whole(n)} tokens`,
  }));
  const ticks = [0, 1, 2, 3, 4].map((i) => {
    const at = Math.round((i * histogram.length) / 4);
    return [at, short(edges[at])];
  });
  const drawing = drawBars(bars, ticks, `Histogram of the activations of feature ${id}`);
  const note = `Tokens by activation (logarithmic axis). Tallest bar: ${whole(top)} tokens.`;
  return panel("How strongly it fires", note, drawing, {
    testid: "histogram", file: `feature-${id}-activations`,
    rows: () => [["from", "to", "tokens"],
      ...Array.from(histogram, (n, i) => [edges[i], edges[i + 1], n])],
  });
}

// Returns the number of bins up to the largest activation of any feature; the others are empty.
function usedBins() {
  const { edges, max } = column;
  const largest = max.reduce((a, b) => (b > a ? b : a), 0);
  let n = edges.length - 1;
  while (largest && n > 1 && edges[n - 1] > largest) n -= 1;
  return n;
}

export function drawPositions({ id, byPosition }) {
  const shares = Array.from(byPosition, (n, i) => ratio(n, core.n_by_position[i]));
  const top = Math.max(...shares) || 1;
  const bars = shares.map((share, i) => ({
    share: share / top,
    tip: `${10 * i} to ${10 * i + 10} % of the rollout: fires at ${percent(share)} of tokens`,
  }));
  const ticks = [[0, "start"], [5, "middle"], [10, "end"]];
  const drawing = drawBars(bars, ticks, `Density of feature ${id} by position in the rollout`);
  const note = `Density in each tenth of a rollout. Tallest bar: ${percent(Math.max(...shares))}.`;
  return panel("Where in a rollout", note, drawing, {
    testid: "positions", file: `feature-${id}-positions`,
    rows: () => [["tenth of the rollout", "density"], ...shares.map((share, i) => [i + 1, share])],
  });
}

export function drawRoles({ byRole }) {
  const table = element("div", "meter-rows", "", { "data-walk": "" });
  const shares = Array.from(byRole, (n, i) => ratio(n, core.n_by_role[i]));
  const top = Math.max(...shares) || 1;
  shares.forEach((share, i) => {
    if (!core.n_by_role[i]) return;
    const tokens = `${whole(byRole[i])} of ${whole(core.n_by_role[i])} tokens`;
    const number = element("span", "meter-value", percent(share),
      { "data-testid": `role-${core.roles[i]}`, "data-value": share });
    table.append(element("div", "meter-row",
      [element("span", "meter-name", core.roles[i]), meter(share / top), number],
      { "data-tip": `${core.roles[i]}: fires at ${tokens}`, tabindex: table.childElementCount ? -1 : 0 }));
  });
  return panel("By role", "Density among the tokens of each role.", table, {
    testid: "roles",
    rows: () => [["role", "firings", "tokens", "density"], ...shares
      .map((share, i) => [core.roles[i], byRole[i], core.n_by_role[i], share]).filter((row) => row[2])],
  });
}

// Returns a heat ramp between the names of its ends, and what it shows. A `signed` one begins with
// the colours of values below zero.
export function drawLegend(low, high, note, { testid, signed = false }) {
  const ramp = element("span", "ramp");
  for (let i = signed ? -LEVELS : 1; i <= LEVELS; i++) {
    if (i) ramp.append(element("i", i < 0 ? `minus-${-i}` : `heat-${i}`));
  }
  return element("div", "legend", [element("span", "", low), ramp, element("span", "", high),
    element("span", "legend-note", note)], { "data-testid": testid });
}

// Returns a list of facts: [label, name, number, text for people, definition] of each.
export function drawFacts(facts, prefix, kind = "") {
  return element("dl", `effect-facts ${kind}`, facts.map(([label, name, value, text, note]) =>
    element("div", "effect-fact", [element("dt", "", label),
      element("dd", "", text, { "data-testid": `${prefix}-${name}`, "data-value": value }),
      note && element("dd", "effect-note", note)])));
}

// Returns the same facts as rows of a table to copy.
export function rowsOfFacts(facts) {
  return [["number", "value", "meaning"], ...facts.map(([label, , value, , note]) => [label, value, note])];
}

export function meter(share, attributes = {}) {
  const fill = element("span", "meter-fill");
  fill.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return element("span", "meter", fill, attributes);
}

// Draws the share of a feature's write at each site.
export function drawFingerprint({ id, shares }) {
  const names = core.sites.map(([layer, projection]) =>
    (layer < 0 ? projection : `${layer}.${projection}`));
  const tips = Array.from(shares, (share) => `${percent(share)} of its write`);
  const label = `Share of the write of feature ${id} at each layer and projection`;
  const grid = drawSiteGrid(core.sites, shares, tips, label);
  const order = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, 3);
  const largest = order.filter((site) => shares[site] > 0)
    .map((site) => `${names[site]} ${percent(shares[site])}`);
  const most = element("p", "figure-note", largest.length ? `Largest: ${largest.join(", ")}` : "None",
    { "data-testid": "fingerprint-most" });
  const note = "Share of its write at each layer (across) and projection (down).";
  return panel("Where it acts", note, [grid, most], {
    testid: "fingerprint", file: `feature-${id}-sites`,
    rows: () => [["site", "share of its write"], ...names.map((name, i) => [name, shares[i]])],
  });
}

// Draws a value for each site, [layer, projection]: layers across, projections down.
export function drawSiteGrid(sites, values, tips, label) {
  const layers = [...new Set(sites.map(([layer]) => layer))].sort((a, b) => a - b);
  const projections = [...new Set(sites.map(([, projection]) => projection))];
  const [left, cell] = [46, 274 / layers.length];
  const tall = Math.max(13, Math.min(17, cell));
  const height = tall * projections.length;
  const grid = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${height + 16}`, role: "group", "aria-label": label, "data-walk": "",
  });
  grid.append(svg("rect", { x: left, y: 0, width: 274, height, class: "grid-back" }));
  projections.forEach((name, row) => {
    const at = { x: left - 5, y: (row + 0.5) * tall + 3, class: "tick end" };
    grid.append(svg("text", at, name.replace(/_proj$/, "").slice(0, 9)));
  });
  const step = Math.max(1, Math.ceil(layers.length / 8));
  layers.forEach((layer, i) => {
    if (i % step) return;
    const at = { x: left + (i + 0.5) * cell, y: height + 12, class: "tick middle" };
    grid.append(svg("text", at, layer < 0 ? "\u2013" : String(layer)));
  });
  const top = values.reduce((a, b) => Math.max(a, b), 0);
  const best = values.indexOf(top);
  sites.forEach(([layer, projection], site) => {
    if (!(values[site] > 0)) return;
    const level = Math.max(1, Math.ceil((LEVELS * values[site]) / top));
    const name = layer < 0 ? projection : `layer ${layer}, ${projection}`;
    grid.append(svg("rect", {
      x: left + layers.indexOf(layer) * cell, y: projections.indexOf(projection) * tall,
      width: Math.max(0.5, cell - 0.6), height: tall - 0.8, class: `heat-${level}`,
      tabindex: site === best ? 0 : -1, "data-tip": `${name}: ${tips[site]}`,
    }));
  });
  return grid;
}

function drawBars(bars, ticks, label) {
  const plot = HEIGHT - 18;
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": label, "data-walk": "",
  });
  const step = WIDTH / bars.length;
  let hasStop = false; // Tab stops at the first bar only
  bars.forEach(({ share, tip }, i) => {
    const height = share > 0 ? Math.max(1.5, (plot - 2) * share) : 0;
    const at = { x: i * step, y: 0, width: step, height: plot, class: "bar-space" };
    const space = svg("rect", { ...at, tabindex: share > 0 && !hasStop ? 0 : -1, "data-tip": tip });
    if (share > 0) hasStop = true;
    const width = Math.max(0.5, step - Math.min(2, 0.16 * step));
    const shape = { x: i * step + (step - width) / 2, y: plot - height, width, height };
    drawing.append(svg("rect", { ...shape, class: "bar-fig" }), space);
  });
  drawing.append(svg("line", { x1: 0, x2: WIDTH, y1: plot, y2: plot, class: "base" }));
  for (const [at, text] of ticks) {
    const anchor = at === 0 ? "start" : at === bars.length ? "end" : "middle";
    const shape = { x: at * step, y: HEIGHT - 4, class: `tick ${anchor}` };
    drawing.append(svg("text", shape, text));
  }
  return drawing;
}

function ratio(n, total) {
  return n >= 0 && total > 0 ? n / total : 0;
}
