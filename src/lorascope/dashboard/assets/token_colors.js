// Colours the tokens of a rollout: by what fires, by how far adapter and base differ, or by features
// that the user chooses.
import { colorByKl, drawKlLegend, isAttributed } from "./attribution.js";
import { largest } from "./data.js";
import { LEVELS, drawLegend } from "./figures.js";

// Ways to colour, by their names in the address.
export const COLORS = { fires: "what fires", kl: "where adapter and base differ",
  paint: "chosen features" };

// Returns the way to colour a rollout that an address asks for, or the best of those it has.
export function colorsOf(asked, data, painted) {
  if (painted.length) return "paint";
  if (asked === "fires" || !isAttributed(data)) return "fires";
  return "kl";
}

// Colours the nodes of a rollout's tokens, and returns the nodes of a legend.
export function colorTokens(how, data, nodes, painted) {
  for (const node of nodes) {
    node.className = node.className.replace(/ ?\b(heat|paint)-\d\b/g, "");
    for (const name of ["value", "kl", "share"]) delete node.dataset[name];
  }
  if (how === "kl") {
    colorByKl(data, nodes);
    return [drawKlLegend(data)];
  }
  if (how === "fires") colorByShare(data, nodes);
  else colorByFeatures(data, nodes, painted);
  if (painted.length > 1) return [];
  const of = how === "fires" ? "the feature that fires most strongly there" : "the chosen feature";
  return [drawLegend("0", "100\u00a0%", `activation of ${of}, as a share of its maximum`,
    { testid: "share-legend" })];
}

// Returns a firing's activation as a share of its feature's maximum.
export function shareOf(data, c) {
  return Math.min(1, data.value[c] / (largest(data.latent[c]) || data.value[c]));
}

// Colours each token by the largest share of what fires there.
function colorByShare(data, nodes) {
  nodes.forEach((node, t) => {
    let share = 0;
    for (let c = data.codes[t]; c < data.codes[t + 1]; c++) share = Math.max(share, shareOf(data, c));
    node.dataset.share = String(share);
    if (share > 0) node.classList.add(`heat-${heatOf(share)}`);
  });
}

// Colours tokens by the chosen features: one on the heat ramp, several in one colour each.
function colorByFeatures(data, nodes, painted) {
  const colorOf = new Map(painted.map((id, i) => [id, i]));
  nodes.forEach((node, t) => {
    let [best, level, value] = [-1, 0, 0];
    for (let c = data.codes[t]; c < data.codes[t + 1]; c++) {
      const i = colorOf.get(data.latent[c]);
      const share = i === undefined ? 0 : shareOf(data, c);
      if (share > level) [best, level, value] = [i, share, data.value[c]];
    }
    node.dataset.value = String(value);
    if (best < 0) return;
    node.classList.add(painted.length === 1 ? `heat-${heatOf(level)}` : `paint-${best + 1}`);
    node.style.setProperty("--level", `${Math.round(15 + 40 * level)}%`);
  });
}

function heatOf(share) {
  return Math.max(1, Math.ceil(LEVELS * share));
}
