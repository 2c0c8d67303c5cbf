// One text, read whole: its roles, what fires on each token, and features painted over it.
import { column, core, keptText } from "./data.js";
import { apartNotes, drawApartLegend, drawBehind, drawMostApart, isAttributed, paintApart } from "./apart.js";
import { drawMessage } from "./detail.js";
import { LEVELS, drawToken, lineEnd } from "./examples.js";
import { meter, panel } from "./figures.js";
import { drawLink } from "./related.js";
import { amend } from "./route.js";
import { element, short, whole } from "./text.js";
import { textFacts, whyOf } from "./texts.js";
import { watchTokens } from "./tip.js";

const area = document.getElementById("reader");
const AT_ONCE = 2500; // tokens that are drawn before the page may answer again
const MAX_PAINTED = 4;
const MANY = 40; // features listed at a token
const FEW = 12; // features listed of a text
const AT_POINTER = 5; // features in the note beside the pointer

let shown = null; // { text, kept, nodes, painted, asked, and nodes that are redrawn }

// Shows a text. `query` may name a token to go to and features to paint.
export async function showText(text, query) {
  const kept = await keptText(text);
  const asked = new URLSearchParams(query ?? "");
  const token = Number(asked.get("token") ?? -1);
  const painted = (asked.get("paint") ?? "").split(",").filter((word) => /^\d{1,9}$/.test(word))
    .map(Number).filter((id) => id < core.n_features).slice(0, MAX_PAINTED);
  shown = { text, kept, nodes: [], painted, asked: -1 };
  const body = element("div", "reading");
  body.dataset.testid = "text";
  body.dataset.walk = "";
  const side = element("div", "feature-side");
  shown.at = element("div", "here");
  shown.paints = element("div", "paints");
  shown.legend = element("div");
  side.append(shown.paints, shown.at);
  const layout = element("div", "feature-body");
  layout.append(body, side);
  area.replaceChildren(drawFacts(text), shown.legend, layout);
  area.dataset.text = column.kept_rollout[text];
  drawPaints();
  drawHere(-1);
  await drawTokens(body, token);
  if (token >= 0 && token < shown.nodes.length) {
    pin(token);
    shown.nodes[token].scrollIntoView({ block: "center" });
  }
}

function drawFacts(text) {
  const facts = element("dl", "stats");
  for (const [label, name, value, written, note] of textFacts(text)) {
    if (!written) continue;
    const cell = element("div", "stat");
    const number = element("dd", "stat-value", written);
    number.dataset.testid = `text-${name}`;
    number.dataset.value = String(value);
    cell.append(element("dt", "", label), number, element("dd", "stat-note", note));
    facts.append(cell);
  }
  const why = whyOf(text);
  if (why.length) {
    const cell = element("div", "stat");
    cell.append(element("dt", "", "kept because"), element("dd", "stat-value small", why.join(", ")),
      element("dd", "stat-note", "firing of its kind among all texts that were read"));
    facts.append(cell);
  }
  return facts;
}

// Draws runs of tokens of one role, each under its name.
async function drawTokens(body, token) {
  const { kept, nodes } = shown;
  const mine = shown;
  let role = -1;
  let run = null;
  for (let t = 0; t < kept.token.length; t++) {
    if (kept.role[t] !== role) {
      role = kept.role[t];
      run = element("p", "run");
      run.dir = "auto";
      const name = core.roles[role];
      if (name && name !== "special") body.append(element("h3", "role", name));
      if (name === "special") run.classList.add("between");
      body.append(run);
    }
    const node = drawToken(kept.token[t], 0, 1);
    node.dataset.at = t;
    delete node.dataset.value;
    node.tabIndex = t === Math.max(0, token) ? 0 : -1;
    nodes.push(node);
    run.append(node, ...lineEnd(node));
    if (t % AT_ONCE === AT_ONCE - 1) {
      paint();
      await new Promise((done) => setTimeout(done));
      if (shown !== mine) return;
    }
  }
  paint();
}

function firing(t) {
  const { kept } = shown;
  const found = [];
  for (let c = kept.codes[t]; c < kept.codes[t + 1]; c++) found.push([kept.latent[c], kept.value[c]]);
  return found.sort((a, b) => b[1] - a[1]);
}

// Paints the chosen features: one on the heat ramp, several each in a colour of its own.
function paint() {
  const { kept, nodes, painted } = shown;
  const place = new Map(painted.map((id, i) => [id, i]));
  nodes.forEach((node, t) => {
    node.className = node.className.replace(/ ?\b(heat|paint)-\d\b/g, "");
    delete node.dataset.value;
    delete node.dataset.kl;
    if (!painted.length) return;
    let [best, level, value] = [-1, 0, 0];
    for (let c = kept.codes[t]; c < kept.codes[t + 1]; c++) {
      const i = place.get(kept.latent[c]);
      if (i === undefined) continue;
      const share = kept.value[c] / (column.max[kept.latent[c]] || kept.value[c]);
      if (share > level) [best, level, value] = [i, Math.min(1, share), kept.value[c]];
    }
    node.dataset.value = String(value);
    if (best < 0) return;
    if (painted.length === 1) node.classList.add(`heat-${Math.max(1, Math.ceil(LEVELS * level))}`);
    else node.classList.add(`paint-${best + 1}`);
    node.style.setProperty("--level", `${Math.round(15 + 40 * level)}%`);
  });
  const isApart = !painted.length && isAttributed(kept);
  if (isApart) paintApart(kept, nodes);
  shown.legend.replaceChildren(...(isApart ? [drawApartLegend(kept)] : []));
}

function setPainted(ids) {
  shown.painted = ids.slice(-MAX_PAINTED);
  const query = shown.painted.length ? `paint=${shown.painted.join(",")}` : "";
  amend("text", column.kept_rollout[shown.text], query);
  drawPaints();
  paint();
  drawHere(shown.asked);
}

function drawPaints() {
  const { painted } = shown;
  const chips = element("div", "chips");
  painted.forEach((id, i) => {
    const chip = element("span", "paint-chip");
    chip.dataset.testid = "painted";
    const swatch = element("i", painted.length === 1 ? "heat-6" : `swatch paint-${i + 1}`);
    const off = element("button", "small", "\u00d7");
    off.type = "button";
    off.setAttribute("aria-label", `Stop painting feature ${id}`);
    off.addEventListener("click", () => setPainted(painted.filter((other) => other !== id)));
    chip.append(swatch, drawLink(id), off);
    chips.append(chip);
  });
  const form = element("form", "goto");
  const input = element("input");
  Object.assign(input, { inputMode: "numeric", placeholder: "feature number", autocomplete: "off" });
  input.setAttribute("aria-label", "Feature to paint");
  input.dataset.testid = "paint-number";
  const button = element("button", "", "Paint");
  form.append(input, button);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const id = /^\d{1,9}$/.test(input.value.trim()) ? Number(input.value) : -1;
    if (id >= 0 && id < core.n_features && !painted.includes(id)) setPainted([...painted, id]);
  });
  const note = "Colour by activation, as a share of the feature's largest anywhere. Up to four." +
    (isAttributed(shown.kept) ? " Without any: how far adapter and base are apart." : "");
  shown.paints.replaceChildren(panel("Painted features", note, [chips, form], { testid: "paints" }));
}

// Lists what fires on token t, or in the whole text for -1.
function drawHere(t) {
  shown.asked = t;
  const pairs = t < 0 ? most() : firing(t);
  const list = element("ul", "ranked");
  for (const [id, value] of pairs.slice(0, t < 0 ? FEW : MANY)) {
    const item = element("li", "fired");
    item.dataset.testid = "fired";
    const link = drawLink(id);
    const number = element("span", "meter-value", short(Number(value.toPrecision(3))));
    number.dataset.value = String(value);
    link.append(number);
    const on = shown.painted.includes(id);
    const button = element("button", "small", on ? "painted" : "paint");
    button.type = "button";
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", `Paint feature ${id}`);
    button.addEventListener("click", () => {
      setPainted(on ? shown.painted.filter((other) => other !== id) : [...shown.painted, id]);
    });
    item.append(link, meter(t < 0 ? value / pairs[0][1] : value / (column.max[id] || value)), button);
    list.append(item);
  }
  const n = whole(pairs.length);
  const what = t < 0
    ? panel("Firing most in this text", "Features by the sum of their activations, as shares of " +
      "their largest. Choose a token to see what fires there.", list, { testid: "here" })
    : panel(`On token ${whole(t)}`, `${n} feature${pairs.length === 1 ? " fires" : "s fire"} here. ` +
      "Bar: share of the feature's largest activation.", list, { testid: "here" });
  const { kept } = shown;
  const apart = !isAttributed(kept) ? [] : [
    t < 0 ? drawMostApart(kept, goTo) : drawBehind(kept, t, markSource),
  ];
  shown.at.replaceChildren(...apart, what);
}

function most() {
  const { kept } = shown;
  const sums = new Map();
  kept.latent.forEach((id, c) => {
    const share = kept.value[c] / (column.max[id] || kept.value[c]);
    sums.set(id, (sums.get(id) ?? 0) + share);
  });
  return [...sums].sort((a, b) => b[1] - a[1]);
}

// Pins a token and brings it into view.
function goTo(t) {
  pin(t);
  const paint = shown.painted.length ? `&paint=${shown.painted.join(",")}` : "";
  amend("text", column.kept_rollout[shown.text], `token=${t}${paint}`);
  shown.nodes[t].scrollIntoView({ block: "center" });
  shown.nodes[t].focus({ preventScroll: true });
}

function markSource(t, on) {
  shown.nodes[t]?.classList.toggle("source", on);
}

function pin(t) {
  area.querySelector(".pinned")?.classList.remove("pinned");
  shown.nodes[t].classList.add("pinned");
  drawHere(t);
}

// Shows that there is nothing to read, and why.
export function showNoText(text) {
  shown = null;
  area.replaceChildren(drawMessage(text));
  delete area.dataset.text;
}

watchTokens(area, (token) => {
  if (!shown || token.dataset.at === undefined) return [];
  const t = Number(token.dataset.at);
  const pairs = firing(t);
  const role = core.roles[shown.kept.role[t]];
  const lines = [element("span", "tip-note", `token ${whole(t)}${role ? `, ${role}` : ""}`)];
  for (const [id, value] of pairs.slice(0, AT_POINTER)) {
    lines.push(element("span", "tip-fired", `feature ${id}: ${short(Number(value.toPrecision(3)))}`));
  }
  const more = pairs.length - AT_POINTER;
  if (more > 0) lines.push(element("span", "tip-note", `and ${more} more`));
  lines.push(...apartNotes(shown.kept, t));
  return lines;
});
area.addEventListener("click", (event) => {
  const token = event.target.closest(".token[data-at]");
  if (token) pin(Number(token.dataset.at));
});
area.addEventListener("keydown", (event) => {
  const token = event.target.closest(".token[data-at]");
  if (!token || (event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  pin(Number(token.dataset.at));
});
