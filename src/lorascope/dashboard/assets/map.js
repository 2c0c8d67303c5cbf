// The map: every feature is a dot, close to features that fire with it; groups have names.
import { saveFile } from "./copying.js";
import { UNKNOWN, column, core } from "./data.js";
import { listIndex } from "./feature_list.js";
import { LEVELS } from "./figures.js";
import { labelOf } from "./annotations.js";
import { categoryOf, hasLabels, nameOf } from "./labels.js";
import { drawName } from "./related.js";
import { density, mainRole, mainSite } from "./stats.js";
import { button, element, percent, short } from "./format.js";
import { onTheme } from "./theme.js";
import { hideTooltip, showTooltipAt } from "./tooltip.js";

const WIDTH = UNKNOWN - 1;
const NEAR = 14; // pixels: the pointer selects a feature within this distance
const KINDS = 7; // category colours in colors.css; further categories share the last one
const N_NAMED = 5; // features of a group from which its name is on the map
const MAX_NAME = [26, 48]; // characters, on a narrow and on a wide map
const MIN_EFFECT = 1e-4; // share of the largest effect that has the lowest colour

const area = document.getElementById("map");
const canvas = element("canvas", "canvas", "", { tabindex: 0, role: "application",
  "aria-label": "Map of features. Arrow keys move, plus and minus zoom.", "data-testid": "canvas" });
const legend = element("div", "map-legend");
const color = element("select", "", "", { "data-testid": "map-color" });
const onMap = [];
for (let id = 0; id < core.n_features; id++) if (column.x[id] !== UNKNOWN) onMap.push(id);

export const hasMap = onMap.length > 0;

let view = { x: 0.5, y: 0.5, zoom: 1 }; // x and y of the centre, in widths of the map
let hovered = -1;
let current = -1;
let dragging = null;
let isScheduled = false; // whether a frame is requested
let open = () => {};

// Calls `action` with the feature that the user opens.
export function onOpen(action) {
  open = action;
}

// Draws the map, with feature `id` marked on it.
export function showMap(id = current) {
  current = id;
  if (!isScheduled) requestAnimationFrame(draw);
  isScheduled = true;
}

function size() {
  return Math.min(canvas.clientWidth, canvas.clientHeight) * 0.94;
}

// Returns the function from positions on the map to pixels. It measures the canvas once, which is slow.
function projection() {
  const width = size() * view.zoom;
  const left = canvas.clientWidth / 2 - view.x * width;
  const top = canvas.clientHeight / 2 - view.y * width;
  return (x, y) => [left + (x / WIDTH) * width, top + (y / WIDTH) * width];
}

function toScreen(id, pointOf = projection()) {
  return pointOf(column.x[id], column.y[id]);
}

function toMap([x, y]) {
  const width = size() * view.zoom;
  return [
    (view.x + (x - canvas.clientWidth / 2) / width) * WIDTH,
    (view.y + (y - canvas.clientHeight / 2) / width) * WIDTH,
  ];
}

const densityLevel = (id) => {
  const share = density(id);
  if (!(share > 0)) return 1;
  return Math.max(1, Math.min(LEVELS, Math.round(LEVELS + 1.8 * Math.log10(share))));
};

// Returns the colour level of a feature's effect, on a logarithmic scale from the noise level on.
function effectLevel() {
  const known = column.effect_kl.filter((kl) => kl > 0);
  const top = known.reduce((a, b) => Math.max(a, b), 1e-30);
  const least = Math.max(known.reduce((a, b) => Math.min(a, b), top), top * MIN_EFFECT);
  return (id) => (column.effect_kl[id] > 0
    ? rampLevel(Math.log(column.effect_kl[id] / least), Math.log(top / least)) : 0);
}

function rampLevel(part, whole) {
  return Math.max(1, Math.min(LEVELS, Math.ceil((LEVELS * part) / (whole || 1))));
}

// Returns the ways to colour dots: name -> [categories or null, colour number of a feature, and
// without categories the names of both ends of the ramp]. The first one is shown first.
function colorings() {
  const choices = {};
  const byName = (names, valueOf) => [
    names, (id) => Math.min(KINDS, names.indexOf(valueOf(id)) + 1),
  ];
  if (core.groups.length > 1) {
    const names = core.groups.slice(0, KINDS - 1);
    if (core.groups.length > names.length) names.push("other groups");
    choices.group = [names, (id) => (column.group[id] === UNKNOWN ? 0
      : Math.min(KINDS, column.group[id] + 1))];
  }
  const roles = core.roles.filter((_, i) => core.n_by_role?.[i] > 0);
  if (roles.length) choices.role = byName(roles, mainRole);
  if (column.effect_kl) choices.effect = [null, effectLevel(), "little effect", "large effect"];
  if (core.sites) {
    const layers = core.sites.map(([layer]) => layer);
    const [first, last] = [Math.min(...layers), Math.max(...layers)];
    choices.layer = [null, (id) => rampLevel(core.sites[column.main_site[id]]?.[0] - first + 1, last - first + 1) || 0,
      `layer ${first}`, `layer ${last}`];
    const projections = [...new Set(core.sites.map(([, projection]) => projection))];
    choices.projection = byName(projections, (id) => core.sites[column.main_site[id]]?.[1]);
  }
  if (hasLabels) choices.category = byName(core.labels.categories, categoryOf);
  choices.density = [null, densityLevel, "rare", "frequent"];
  return choices;
}
const COLORINGS = colorings();

function draw() {
  isScheduled = false;
  if (!canvas.clientWidth) return;
  const ratio = devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  const style = getComputedStyle(canvas);
  const ink = (name) => style.getPropertyValue(name).trim();
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.fillStyle = ink("--panel");
  pen.fillRect(0, 0, width, height);
  const [kinds, kindOf, ...ends] = COLORINGS[color.value];
  const colors = Array.from({ length: 10 }, (_, i) => ink(kinds ? `--kind-${i}` : `--deep-${i}`));
  const [soft, line] = [ink("--soft"), ink("--line")];
  const pointOf = projection();
  const few = Math.sqrt(4000 / Math.max(1, onMap.length));
  const radius = Math.max(1, Math.min(5, 3.4 * few * Math.sqrt(view.zoom)));
  const dots = [[], []]; // hidden by the filters, and listed
  for (const id of onMap) dots[listIndex(id) >= 0 ? 1 : 0].push(id);
  dots.forEach((ids, listed) => {
    pen.globalAlpha = listed ? 0.9 : 0.5;
    for (const id of ids) {
      const [x, y] = toScreen(id, pointOf);
      if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
      pen.fillStyle = listed ? colors[kindOf(id)] || soft : line;
      if (radius < 2) pen.fillRect(x - radius, y - radius, 2 * radius, 2 * radius);
      else {
        pen.beginPath();
        pen.arc(x, y, radius, 0, 7);
        pen.fill();
      }
    }
  });
  pen.globalAlpha = 1;
  pen.lineWidth = 2;
  for (const [id, shade] of [[current, "--accent"], [hovered, "--ink"]]) {
    if (id < 0 || column.x[id] === UNKNOWN) continue;
    const [x, y] = toScreen(id, pointOf);
    pen.strokeStyle = ink(shade);
    pen.beginPath();
    pen.arc(x, y, radius + 4, 0, 7);
    pen.stroke();
  }
  drawGroupNames(pen, ink, width, height, pointOf);
  drawLabels(pen, ink, width, height, pointOf);
  drawLegend(kinds, ends);
}

// Returns where each group is: the median position of its features, for those of `N_NAMED` or more.
function centres() {
  const members = core.groups.map(() => []);
  for (const id of onMap) if (column.group[id] !== UNKNOWN) members[column.group[id]].push(id);
  const middle = (values) => values.sort((a, b) => a - b)[values.length >> 1];
  return members.map((ids, group) => ({ group, n: ids.length,
    x: middle(ids.map((id) => column.x[id])), y: middle(ids.map((id) => column.y[id])) }))
    .filter(({ n }) => n >= N_NAMED).sort((a, b) => b.n - a.n);
}
let named = null; // centres, once they are needed

// Writes the names of groups where they do not cover each other, those of most features first.
function drawGroupNames(pen, ink, width, height, pointOf) {
  named ??= centres();
  pen.font = "500 11.5px system-ui, sans-serif";
  pen.textAlign = "center";
  const taken = [];
  const drawn = [];
  for (const { group, x: mapX, y: mapY } of named) {
    const name = shortName(core.groups[group]);
    const half = pen.measureText(name).width / 2 + 4;
    const [x, y] = pointOf(mapX, mapY);
    if (x < 0 || y < 0 || x > width || y > height) continue;
    const at = Math.min(Math.max(x, half), width - half); // all of the name is on the canvas
    const isCovered = taken.some(([x0, x1, y0]) => at - half < x1 && at + half > x0 && Math.abs(y - y0) < 17);
    if (isCovered) continue;
    taken.push([at - half, at + half, y]);
    drawn.push(group);
    pen.globalAlpha = 0.82;
    pen.fillStyle = ink("--panel");
    pen.fillRect(at - half, y - 8, 2 * half, 16);
    pen.globalAlpha = 1;
    pen.fillStyle = ink("--ink");
    pen.fillText(name, at, y + 4);
  }
  pen.textAlign = "start";
  canvas.dataset.named = drawn.join();
}

function shortName(name) {
  const most = MAX_NAME[Number(canvas.clientWidth > 600)];
  return name.length > most ? `${name.slice(0, most - 1)}\u2026` : name;
}

function drawLabels(pen, ink, width, height, pointOf) {
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = ink("--ink");
  for (const id of onMap) {
    if (!labelOf(id)) continue;
    const [x, y] = toScreen(id, pointOf);
    if (x > 0 && y > 0 && x < width && y < height) pen.fillText(labelOf(id).slice(0, 40), x + 7, y + 4);
  }
}

function drawLegend(kinds, [low, high] = []) {
  if (kinds) {
    legend.replaceChildren(...kinds.map((name, i) => element("span", "legend-kind",
      [swatch(`--kind-${Math.min(KINDS, i + 1)}`), name.replace(/_proj$/, "")])));
    return;
  }
  const ramp = Array.from({ length: LEVELS }, (_, i) => swatch(`--deep-${i + 1}`));
  legend.replaceChildren(element("span", "", low), element("span", "ramp", ramp), element("span", "", high));
}

function swatch(color) {
  const node = element("i");
  node.style.background = `var(${color})`;
  return node;
}

// Returns the listed feature nearest to a point, -1 if none is within a distance in pixels.
function nearest([x, y], within) {
  let [best, least] = [-1, within * within];
  const pointOf = projection();
  for (const id of onMap) {
    const [px, py] = toScreen(id, pointOf);
    const far = (px - x) ** 2 + (py - y) ** 2;
    // Only listed features can be selected.
    if (far < least && listIndex(id) >= 0) [best, least] = [id, far];
  }
  return best;
}

// Marks feature `id` and shows its tooltip at a point; -1 marks none.
function hover(id, x, y) {
  hovered = id;
  canvas.dataset.hovered = id;
  if (id < 0) hideTooltip();
  else {
    const box = canvas.getBoundingClientRect();
    const head = element("span", "tip-value", `Feature ${id}`);
    const share = density(id);
    const notes = [core.groups[column.group[id]], mainSite(id), mainRole(id), Number.isNaN(share) ? "" : percent(share),
      Number.isNaN(column.max[id]) ? "" : `max ${short(column.max[id])}`].filter(Boolean);
    const lines = [head, drawName(id), element("span", "tip-note", notes.join(" \u00b7 "))];
    showTooltipAt(box.left + x, box.top + y, lines);
    canvas.setAttribute("aria-label", `Map of features. Feature ${id} ${nameOf(id)}. ` +
      "Enter opens it, arrow keys move, plus and minus zoom.");
  }
  showMap();
}

function zoom(by, [x, y] = [canvas.clientWidth / 2, canvas.clientHeight / 2]) {
  const before = toMap([x, y]);
  view.zoom = Math.max(0.5, Math.min(200, view.zoom * by));
  const after = toMap([x, y]);
  view.x += (before[0] - after[0]) / WIDTH;
  view.y += (before[1] - after[1]) / WIDTH;
  showMap();
}

function pan(dx, dy) {
  view.x -= dx / (size() * view.zoom);
  view.y -= dy / (size() * view.zoom);
  showMap();
}

function reset() {
  view = { x: 0.5, y: 0.5, zoom: 1 };
  showMap();
}

const at = (event) => [event.offsetX, event.offsetY];

canvas.addEventListener("wheel", (event) => {
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / 400), at(event));
}, { passive: false });
canvas.addEventListener("pointerdown", (event) => {
  // One finger scrolls the page.
  if (event.pointerType === "touch") {
    dragging = { from: at(event), moved: false, isTouch: true };
    return;
  }
  canvas.setPointerCapture(event.pointerId);
  dragging = { from: at(event), moved: false };
});
canvas.addEventListener("pointercancel", () => (dragging = null));
canvas.addEventListener("pointermove", (event) => {
  if (dragging?.isTouch) return undefined;
  if (!dragging) return hover(nearest(at(event), NEAR), ...at(event));
  const [dx, dy] = [event.offsetX - dragging.from[0], event.offsetY - dragging.from[1]];
  if (!dragging.moved && Math.hypot(dx, dy) < 4) return undefined;
  dragging.moved = true;
  hideTooltip();
  dragging.from = at(event);
  return pan(dx, dy);
});
canvas.addEventListener("pointerup", (event) => {
  const { moved } = dragging ?? {};
  dragging = null;
  if (moved === false) {
    const id = nearest(at(event), NEAR);
    if (id >= 0) open(id);
  }
  showMap();
});
canvas.addEventListener("pointerleave", () => !dragging && hover(-1, 0, 0));
canvas.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 60;
  const act = {
    ArrowLeft: () => pan(step, 0), ArrowRight: () => pan(-step, 0), ArrowUp: () => pan(0, step),
    ArrowDown: () => pan(0, -step), "+": () => zoom(1.5), "=": () => zoom(1.5),
    "-": () => zoom(1 / 1.5), 0: reset,
    Enter: () => hovered >= 0 && open(hovered),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  event.stopPropagation();
  act();
  if (event.key !== "Enter") hoverCentre();
});
canvas.addEventListener("focus", () => canvas.matches(":focus-visible") && hoverCentre());
canvas.addEventListener("blur", () => hover(-1, 0, 0));

// With the keyboard, the feature nearest to the centre is selected.
function hoverCentre() {
  const middle = [canvas.clientWidth / 2, canvas.clientHeight / 2];
  const id = nearest(middle, Infinity);
  hover(id, ...(id < 0 ? middle : toScreen(id)));
}

function build() {
  color.append(...Object.keys(COLORINGS).map((name) => element("option", "", name)));
  color.addEventListener("change", () => showMap());
  const save = button("PNG", () => canvas.toBlob((image) => saveFile("map.png", image)),
    { "data-testid": "save-map", "aria-label": "Save the map as PNG" });
  const tools = element("div", "map-tools", [
    element("label", "line", ["colour by", color]),
    button("+", () => zoom(1.5), { "data-testid": "zoom-in", "aria-label": "Zoom in" }),
    button("\u2212", () => zoom(1 / 1.5), { "data-testid": "zoom-out", "aria-label": "Zoom out" }),
    button("Whole map", reset, { "data-testid": "zoom-all" }),
    save,
  ]);
  const note = element("p", "note", "Each dot is a feature. Features that fire together are close to " +
    "each other, and groups of them have names; distances between groups mean nothing. Drag to move, " +
    "scroll to zoom, click a dot to open its feature. With a finger, use the buttons.");
  area.append(tools, canvas, legend, note);
}

build();
onTheme(() => showMap());
new ResizeObserver(() => showMap()).observe(canvas);
