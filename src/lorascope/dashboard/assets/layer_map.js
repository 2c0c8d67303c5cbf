// A map of one rollout: tokens across, layers down, dark where features fire that write there.
import { column, core } from "./data.js";
import { LEVELS, svg } from "./figures.js";
import { element, whole } from "./format.js";
import { shareOf } from "./token_colors.js";

const MAX_CELLS = 240; // across; a longer rollout has several tokens in a cell
const CELL = 4; // width, in SVG units
const [TALLEST, HEIGHT] = [12, 128]; // of a layer and of all of them, in pixels

// Returns [layers, for each of them the sum at each token] of what fires in a rollout: activations
// as shares of their features' maxima, each at the layer to which its feature writes most.
function firingByLayer(data) {
  const layers = [...new Set((core.sites ?? []).map(([layer]) => layer))].sort((a, b) => a - b);
  const rowOf = new Map(layers.map((layer, i) => [layer, i]));
  const sums = layers.map(() => new Float32Array(data.token.length));
  for (let t = 0; t < data.token.length; t++) {
    for (let c = data.codes[t]; c < data.codes[t + 1]; c++) {
      const site = core.sites?.[column.main_site[data.latent[c]]];
      if (site) sums[rowOf.get(site[0])][t] += shareOf(data, c);
    }
  }
  return [layers, sums];
}

// Returns the map, in a list; `goTo(t)` is called with the token of a cell that is clicked. The list
// is empty if there are no layers to tell apart.
export function drawLayerMap(data, goTo) {
  const [layers, sums] = firingByLayer(data);
  if (layers.length < 2) return [];
  const n = data.token.length;
  const step = Math.max(1, Math.ceil(n / MAX_CELLS));
  const nCells = Math.ceil(n / step);
  const top = sums.reduce((most, row) => row.reduce((a, b) => Math.max(a, b), most), 0) || 1;
  const tall = Math.min(TALLEST, HEIGHT / layers.length);
  const [width, height] = [nCells * CELL, layers.length * tall];
  const map = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, height, preserveAspectRatio: "none", class: "layer-map",
    role: "img", "aria-label": "Layers and tokens at which features fire",
  });
  map.append(svg("rect", { width, height, class: "grid-back" }));
  layers.forEach((layer, i) => {
    for (let cell = 0; cell < nCells; cell++) {
      const from = cell * step;
      const most = sums[i].subarray(from, from + step).reduce((a, b) => Math.max(a, b), 0);
      if (!most) continue;
      const at = from + sums[i].subarray(from, from + step).indexOf(most);
      map.append(svg("rect", {
        x: cell * CELL, y: i * tall, width: CELL - 0.4, height: 0.93 * tall,
        class: `heat-${Math.max(1, Math.ceil((LEVELS * most) / top))}`, "data-at": at,
        "data-tip": `layer ${layer < 0 ? "\u2013" : layer}, token ${whole(at)}`,
      }));
    }
  });
  map.addEventListener("click", ({ target }) => {
    if (target.dataset.at !== undefined) goTo(Number(target.dataset.at));
  });
  const named = Math.max(1, Math.ceil(layers.length / 8));
  const names = element("div", "layer-names", layers.filter((_, i) => i % named === 0)
    .map((layer) => element("span", "", layer < 0 ? "\u2013" : String(layer))));
  names.style.height = `${height}px`;
  const note = "Layers (down) and tokens (across) at which features fire, each at the layer to which " +
    `it writes most.${step > 1 ? ` A cell stands for ${step} tokens.` : ""} Select a cell to go there.`;
  return [element("figure", "layer-frame", [names, map, element("figcaption", "", note)],
    { "data-testid": "layer-map" })];
}
