// The list of features: filtered, sorted, and drawn only where it is visible.
import { column, core, hasExample, isTemplate } from "./data.js";
import { isStarred, labelOf } from "./annotations.js";
import { verdictOf } from "./effects.js";
import { meter } from "./figures.js";
import { categoryOf, kindOf, nameOf, scoreText } from "./labels.js";
import { element, percent, short, three, whole, writeToken } from "./format.js";

const ROW = 46; // pixels; page.css has the same height

const list = document.getElementById("list");
const rows = document.getElementById("rows");
const drawn = new Map(); // index in the list -> row element
let choose = () => {};

let order = new Uint32Array(0); // features in the list, in its order
let indexOf = new Map(); // feature -> index in the list
let current = -1; // feature
let sortedBy = "id";

// Fills the list with features in the given order; each row shows what they are sorted by.
export function fill(ids, sort) {
  order = ids;
  sortedBy = sort;
  indexOf = new Map();
  ids.forEach((id, at) => indexOf.set(id, at));
  rows.style.height = `${ids.length * ROW}px`;
  redraw();
}

// Redraws the rows, after labels change.
export function redraw() {
  for (const node of drawn.values()) node.remove();
  drawn.clear();
  draw();
}

// Returns the features in the list, in its order.
export function listed() {
  return order;
}

// Returns a feature's index in the list, -1 if a filter hides it.
export function listIndex(id) {
  return indexOf.get(id) ?? -1;
}

// Marks a feature as selected and scrolls to it.
export function select(id) {
  current = id;
  const at = listIndex(id);
  if (at >= 0) {
    const top = at * ROW;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + ROW > list.scrollTop + list.clientHeight) {
      list.scrollTop = top + ROW - list.clientHeight;
    }
  }
  draw();
}

// Calls `action` with the feature that the user selects.
export function onChoose(action) {
  choose = action;
}

function draw() {
  const from = Math.max(0, Math.floor(list.scrollTop / ROW) - 4);
  const to = Math.min(order.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4);
  for (const [at, node] of drawn) {
    if (at < from || at >= to) {
      node.remove();
      drawn.delete(at);
    }
  }
  for (let at = from; at < to; at++) {
    if (!drawn.has(at)) {
      const node = row(at);
      drawn.set(at, node);
      rows.append(node);
    }
  }
  list.removeAttribute("aria-activedescendant");
  for (const node of drawn.values()) {
    const selected = Number(node.dataset.feature) === current;
    node.setAttribute("aria-selected", String(selected));
    if (selected) list.setAttribute("aria-activedescendant", node.id);
  }
}

function row(at) {
  const id = order[at];
  const token = element("span", "row-token");
  const name = nameOf(id);
  if (name) {
    token.classList.add("label");
    if (!labelOf(id)) token.classList.add(kindOf(id) === "unclear" ? "unclear" : "given");
    token.textContent = name;
    token.title = name;
  } else if (hasExample(id)) {
    writeToken(token, column.top_token[id]);
  }
  const number = element("span", "row-id", isStarred(id) ? `\u2605 ${id}` : String(id));
  const notes = element("span", "row-note", note(id));
  const badge = isTemplate(id) ? "template" : verdictOf(id) === "specific" ? "specific" : "";
  if (badge && badge !== notes.textContent) {
    notes.prepend(element("span", `chip row-badge verdict-${badge}`, badge), " ");
  }
  const node = element("div", "row", [number, token, notes, meter(logDensity(id))], {
    id: `row-${id}`, "data-testid": "row", "data-feature": id, role: "option",
    "aria-setsize": order.length, "aria-posinset": at + 1,
  });
  node.style.top = `${at * ROW}px`;
  return node;
}

// What a row shows, by what the list is sorted by; the bar shows how often the feature fires.
const number = (values) => (id) => (
  values?.[id] > -Infinity ? three(values[id]) : "\u2014");
const VALUES = {
  often: frequency,
  rare: frequency,
  max: number(column.max),
  mean: number(column.mean),
  stable: number(column.stability),
  verdict: number(column.effect_kl),
  effect: number(column.effect_kl),
  each: number(column.effect_each),
  specific: number(column.effect_excess_low),
  role: (id) => core.roles[column.main_role[id]] ?? "\u2014",
  site: (id) => core.sites?.[column.main_site[id]]?.join(".") ?? "\u2014",
  category: categoryOf,
};

// Returns the value that the list is sorted by, or else the score of the page's label.
function note(id) {
  if (VALUES[sortedBy]) return VALUES[sortedBy](id);
  if (!labelOf(id) && scoreText(id)) return scoreText(id);
  return frequency(id);
}

function frequency(id) {
  if (isTemplate(id)) return "template";
  const n = column.n_active[id];
  if (n === 0) return "dead";
  if (n > 0) return core.n_eligible ? percent(n / core.n_eligible) : whole(n);
  return column.n_examples[id] ? `max ${short(column.max[id])}` : "no example";
}

// Returns a bar length: 0 for a feature that never fires, 1 for one that fires at every token; for
// a template feature, at every special token.
function logDensity(id) {
  const [n, total] = isTemplate(id)
    ? [column.n_special[id], core.n_special] : [column.n_active[id], core.n_eligible];
  if (!(n > 0) || !(total > 1)) return 0;
  return Math.max(0.02, Math.log(n) / Math.log(total));
}

list.addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
new ResizeObserver(draw).observe(list);

rows.addEventListener("click", (event) => {
  const node = event.target.closest(".row");
  if (node) choose(Number(node.dataset.feature));
});

list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const at = Math.max(0, listIndex(current));
  const to = {
    ArrowDown: at + 1,
    ArrowUp: at - 1,
    PageDown: at + page,
    PageUp: at - page,
    Home: 0,
    End: order.length - 1,
  }[event.key];
  if (to === undefined || event.ctrlKey || event.metaKey || event.altKey || !order.length) return;
  event.preventDefault();
  choose(order[Math.min(order.length - 1, Math.max(0, to))]);
});
