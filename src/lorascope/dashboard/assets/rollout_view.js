// One whole rollout: its roles, what fires at each token, and features highlighted in colour.
import {
  drawContributions, drawLargestKl, isAttributed, isExplained, klNotes, predictionNotes,
} from "./attribution.js";
import { column, core, largest, rolloutData } from "./data.js";
import { verdictOf } from "./effects.js";
import { drawToken, lineEnd } from "./examples.js";
import { drawMessage } from "./feature_view.js";
import { meter, panel } from "./figures.js";
import { button, directionOf, element, three, whole } from "./format.js";
import { drawLayerMap } from "./layer_map.js";
import { drawLink, nameText } from "./related.js";
import { reasonsOf, rolloutStats } from "./rollout_list.js";
import { amend } from "./route.js";
import { drawNumbers, mainRole, mainSite } from "./stats.js";
import { COLORS, colorTokens, colorsOf, shareOf } from "./token_colors.js";
import { watchTokens } from "./tooltip.js";

const area = document.getElementById("rollout-view");
const CHUNK = 2500; // tokens drawn at a time, so that the page stays responsive
const DIRECTION = 200; // tokens that say in which direction a segment is written
const MAX_PAINTED = 4;
const N_AT_TOKEN = 40; // features listed at a token
const N_IN_ROLLOUT = 12; // features listed for the rollout
const N_IN_TOOLTIP = 5; // features in a token's tooltip

let shown = null; // { number, data, nodes, painted, selected, and nodes that are redrawn }

// Shows a rollout, by its number in this page. `query` may name a token and features to highlight.
export async function showRollout(number, query) {
  const data = await rolloutData(number);
  const asked = new URLSearchParams(query ?? "");
  const token = Number(asked.get("token") ?? -1);
  const painted = (asked.get("paint") ?? "").split(",").filter((name) => /^\d{1,9}$/.test(name))
    .map(Number).filter((id) => id < core.n_features).slice(0, MAX_PAINTED);
  const colors = colorsOf(asked.get("color"), data, painted);
  shown = { number, data, nodes: [], painted, selected: -1, colors };
  const body = element("div", "reading", "", { "data-testid": "rollout-text", "data-walk": "" });
  shown.atToken = element("div", "firing-panels");
  shown.paints = element("div", "paints");
  shown.legend = element("div");
  const side = element("div", "feature-side", [shown.atToken, shown.paints]);
  const layout = element("div", "feature-body", [body, side]);
  area.replaceChildren(drawStats(number), ...drawLayerMap(data, goTo), shown.legend, layout);
  area.dataset.rollout = column.kept_rollout[number];
  drawPaints();
  drawFiring(-1);
  await drawTokens(body, token);
  if (token >= 0 && token < shown.nodes.length) {
    selectToken(token);
    shown.nodes[token].scrollIntoView({ block: "center" });
  }
}

function drawStats(number) {
  const rows = rolloutStats(number).filter(([, , , text]) => text);
  const reasons = reasonsOf(number).join(", ");
  const why = "why this rollout is in the page, among all that were read";
  if (reasons) rows.push(["selected for", "reasons", "", reasons, why]);
  return drawNumbers(rows, "rollout");
}

// Draws the tokens in runs of one role, each below the role's name.
async function drawTokens(body, token) {
  const { data, nodes } = shown;
  const started = shown;
  let role = -1;
  let run = null;
  for (let t = 0; t < data.token.length; t++) {
    if (data.role[t] !== role) {
      role = data.role[t];
      run = element("p", "run", "", { dir: directionOf(data.token.subarray(t, t + DIRECTION)) });
      const name = core.roles[role];
      if (name && name !== "special") body.append(element("h3", "role", name));
      if (name === "special") run.classList.add("between");
      body.append(run);
    }
    const node = drawToken(data.token[t], 0, 1);
    node.dataset.at = t;
    delete node.dataset.value;
    node.tabIndex = t === Math.max(0, token) ? 0 : -1;
    nodes.push(node);
    run.append(node, ...lineEnd(node));
    if (t % CHUNK === CHUNK - 1) {
      paint();
      await new Promise((done) => setTimeout(done));
      if (shown !== started) return;
    }
  }
  paint();
}

// Returns [feature, value] of what fires at a token, strongest first.
function firingAt(t) {
  const { data } = shown;
  const pairs = [];
  for (let c = data.codes[t]; c < data.codes[t + 1]; c++) pairs.push([data.latent[c], data.value[c]]);
  return pairs.sort((a, b) => b[1] - a[1]);
}

// Colours the tokens, and draws the switch of colours with its legend.
function paint() {
  const { data, nodes, painted, colors } = shown;
  const ways = Object.entries(COLORS).filter(([name]) => name !== "kl" || isAttributed(data));
  const choice = element("div", "color-choice", [element("span", "", "colour by"),
    ...ways.map(([name, text]) => button(text, () => setColors(name),
      { "data-testid": `color-${name}`, "aria-pressed": name === colors }))],
  { role: "group", "aria-label": "What colours the text" });
  shown.legend.replaceChildren(choice, ...colorTokens(colors, data, nodes, painted));
}

// Changes what colours the text. Features are those at the selected token, or the most active one.
function setColors(name) {
  const { selected } = shown;
  const strongest = selected >= 0 ? firingAt(selected) : mostActive();
  shown.colors = name;
  if (name !== "paint") setPainted([], name);
  else setPainted(strongest.slice(0, 1).map(([id]) => id));
  shown.legend.querySelector(`[data-testid=color-${name}]`).focus();
}

function setPainted(ids, asked = "") {
  shown.painted = ids.slice(-MAX_PAINTED);
  shown.colors = colorsOf(asked, shown.data, shown.painted);
  keepAddress();
  drawPaints();
  paint();
  drawFiring(shown.selected);
}

// Keeps the token and the colours in the address.
function keepAddress() {
  const { number, data, painted, selected, colors } = shown;
  const parts = [selected >= 0 && `token=${selected}`, painted.length && `paint=${painted.join(",")}`,
    colors === "fires" && isAttributed(data) && "color=fires"];
  amend("rollout", column.kept_rollout[number], parts.filter(Boolean).join("&"));
}

function drawPaints() {
  const { painted } = shown;
  const chips = element("div", "chips", painted.map((id, i) => {
    const swatch = element("i", painted.length === 1 ? "heat-6" : `swatch paint-${i + 1}`);
    const off = button("\u00d7", () => setPainted(painted.filter((other) => other !== id)),
      { "aria-label": `Stop highlighting feature ${id}` });
    return element("span", "paint-chip", [swatch, drawLink(id), off], { "data-testid": "painted" });
  }));
  const input = element("input", "", "", { inputmode: "numeric", placeholder: "feature number",
    autocomplete: "off", "aria-label": "Feature to highlight", "data-testid": "paint-number" });
  const form = element("form", "goto", [input, element("button", "", "Highlight")]);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const id = /^\d{1,9}$/.test(input.value.trim()) ? Number(input.value) : -1;
    if (id >= 0 && id < core.n_features && !painted.includes(id)) setPainted([...painted, id]);
  });
  const note = "Up to four features colour the text.";
  const parts = panel("Chosen features", note, [chips, form], { testid: "paints" });
  shown.paints.replaceChildren(parts);
}

// Lists what fires at token t, or in the whole rollout for -1.
function drawFiring(t) {
  shown.selected = t;
  const pairs = t < 0 ? mostActive() : firingAt(t);
  const first = pairs.slice(0, t < 0 ? N_IN_ROLLOUT : N_AT_TOKEN);
  const list = element("ul", "ranked", first.map(([id, value]) => {
    const on = shown.painted.includes(id);
    const paintIt = button(on ? "highlighted" : "highlight", () => {
      setPainted(on ? shown.painted.filter((other) => other !== id) : [...shown.painted, id]);
    }, { "aria-label": `Highlight feature ${id}`, "aria-pressed": on });
    const known = whatIsKnown(id);
    return element("li", "fired", [drawLink(id, three, value),
      meter(t < 0 ? value / pairs[0][1] : value / (largest(id) || value)), paintIt,
      known && element("span", "fired-known", known)], { "data-testid": "fired" });
  }));
  const n = whole(pairs.length);
  const rows = () => [["feature", "label", t < 0 ? "sum" : "activation", "known"],
    ...pairs.map(([id, value]) => [id, nameText(id), value, whatIsKnown(id)])];
  const firing = t < 0
    ? panel("Most active features in this rollout", "By the sum of their activations, each as a " +
      "share of the feature's maximum. Select a token to see what fires there.", list,
    { testid: "firing-panel", rows })
    : panel(`At token ${whole(t)}`, `${n} feature${pairs.length === 1 ? " fires" : "s fire"} ` +
      "here. Bar: activation as a share of the feature's maximum.", list,
    { testid: "firing-panel", rows });
  const { data } = shown;
  if (t < 0) {
    shown.atToken.replaceChildren(...(isAttributed(data) ? [drawLargestKl(data, goTo)] : []), firing);
    return;
  }
  const why = drawContributions(data, t, column.kept_rollout[shown.number], markSource);
  shown.atToken.replaceChildren(...(isExplained(data, t) ? [why, firing] : [firing, why]));
}

// Returns what is known of a feature: where it is written, its role, and its effect.
function whatIsKnown(id) {
  const effect = column.effect_kl?.[id];
  const verdict = verdictOf(id);
  return [mainSite(id), mainRole(id), effect >= 0 && `effect ${three(effect)}`, verdict]
    .filter(Boolean).join(" \u00b7 ");
}

// Returns [feature, sum of its activations] of the rollout, largest first.
function mostActive() {
  const { data } = shown;
  const sums = new Map();
  data.latent.forEach((id, c) => {
    sums.set(id, (sums.get(id) ?? 0) + shareOf(data, c));
  });
  return [...sums].sort((a, b) => b[1] - a[1]);
}

// Selects a token and scrolls to it.
function goTo(t) {
  selectToken(t);
  shown.nodes[t].scrollIntoView({ block: "center" });
  shown.nodes[t].focus({ preventScroll: true });
}

function markSource(t, on) {
  shown.nodes[t]?.classList.toggle("source", on);
}

function selectToken(t) {
  area.querySelector(".selected")?.classList.remove("selected");
  shown.nodes[t].classList.add("selected");
  drawFiring(t);
  keepAddress();
}

// Shows a message instead of a rollout.
export function showNoRollout(message) {
  shown = null;
  area.replaceChildren(drawMessage(message));
  delete area.dataset.rollout;
}

watchTokens(area, (token) => {
  if (!shown || token.dataset.at === undefined) return [];
  const t = Number(token.dataset.at);
  const pairs = firingAt(t);
  const role = core.roles[shown.data.role[t]];
  const lines = [element("span", "tip-note", `token ${whole(t)}${role ? `, ${role}` : ""}`)];
  for (const [id, value] of pairs.slice(0, N_IN_TOOLTIP)) {
    lines.push(element("span", "tip-fired", `feature ${id}: ${three(value)}`));
  }
  const more = pairs.length - N_IN_TOOLTIP;
  if (more > 0) lines.push(element("span", "tip-note", `and ${more} more`));
  lines.push(...klNotes(shown.data, t), ...predictionNotes(shown.data, t));
  return lines;
});
area.addEventListener("click", (event) => {
  const token = event.target.closest(".token[data-at]");
  if (token) selectToken(Number(token.dataset.at));
});
area.addEventListener("keydown", (event) => {
  const token = event.target.closest(".token[data-at]");
  if (!token || (event.key !== "Enter" && event.key !== " ")) return;
  event.preventDefault();
  selectToken(Number(token.dataset.at));
});
