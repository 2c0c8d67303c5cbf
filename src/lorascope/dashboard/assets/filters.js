// Chooses which features are in the list, and their order: the search field and the filters.
import { UNKNOWN, column, core, hasExample, isTemplate } from "./data.js";
import { isStarred, labelOf, nAnnotations, noteOf } from "./annotations.js";
import { verdictOf } from "./effects.js";
import { fill, listed } from "./feature_list.js";
import { element, whole } from "./format.js";
import { categoryOf, hasLabels, kindOf, labelScore, nameOf } from "./labels.js";
import { search, stopSearch } from "./search.js";
import { density } from "./stats.js";

// Name in the address -> the value without a filter. The controls of the form have these names.
const NONE = {
  q: "", in: "fires", sort: column.effect_kl ? "verdict" : "id", full: false, dead: false, ranked: false,
  template: false, role: "", layer: "", projection: "",
  mark: "", dmin: "", dmax: "", amin: "", amax: "", nmin: "", smin: "",
  kind: "", category: "", lmin: "",
};

const LEAST = -Infinity;
const VERDICTS = ["specific", "not distinguishable", "too few firings", ""];
const STEP = 1e6; // nats; every effect is smaller
const BY_EFFECT = ["verdict", "effect", "each", "specific"];
const SORTS = {
  verdict: (id) => STEP * VERDICTS.indexOf(verdictOf(id)) - (column.effect_kl?.[id] || 0),
  often: (id) => -column.n_active[id],
  rare: (id) => column.n_active[id],
  max: (id) => -(Number.isNaN(column.max[id]) ? LEAST : column.max[id]),
  mean: (id) => -(Number.isNaN(column.mean[id]) ? LEAST : column.mean[id]),
  stable: (id) => -(Number.isNaN(column.stability[id]) ? LEAST : column.stability[id]),
  effect: (id) => -(column.effect_kl?.[id] >= 0 ? column.effect_kl[id] : LEAST),
  each: (id) => -(column.effect_each?.[id] >= 0 ? column.effect_each[id] : LEAST),
  specific: (id) => -(column.effect_excess_low?.[id] > LEAST ? column.effect_excess_low[id] : LEAST),
  site: (id) => column.main_site[id],
  role: (id) => column.main_role[id],
  score: (id) => -(Number.isNaN(labelScore(id)) ? LEAST : labelScore(id)),
  category: (id) => (kindOf(id) ? column.label_category[id] : UNKNOWN),
};

function noFilters() {
  return { ...NONE };
}

// Returns the filters as the part of an address after "?"; "" if there are none.
function toQuery(filters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(filters)) {
    if (value !== NONE[name]) query.set(name, value === true ? "1" : value);
  }
  return query.toString();
}

function fromQuery(query) {
  const filters = noFilters();
  for (const [name, value] of new URLSearchParams(query)) {
    if (!(name in NONE)) continue;
    filters[name] = typeof NONE[name] === "boolean" ? value === "1" : value;
  }
  return filters;
}

// Returns the features that pass all filters, in order. `found`, if given, flags search results.
function choose(filters, found = null) {
  const tests = testsOf(filters);
  const ids = [];
  for (let id = 0; id < core.n_features; id++) {
    if (found && !found[id]) continue;
    if (tests.every((test) => test(id))) ids.push(id);
  }
  const key = SORTS[filters.sort];
  // An effect at template tokens is that of the template, so those features come after the others.
  const isLast = BY_EFFECT.includes(filters.sort) && !filters.ranked ? isTemplate : () => false;
  if (key) ids.sort((a, b) => isLast(a) - isLast(b) || key(a) - key(b) || a - b);
  else if (filters.sort === "label") {
    ids.sort((a, b) => (labelOf(b) !== "") - (labelOf(a) !== "") ||
      (nameOf(b) !== "") - (nameOf(a) !== "") || nameOf(a).localeCompare(nameOf(b)) || a - b);
  }
  return Uint32Array.from(ids);
}

function testsOf(filters) {
  const tests = [];
  const n = column.n_examples;
  if (filters.full) tests.push((id) => n[id] > 0 && n[id] === core.top_k);
  else if (!filters.dead) tests.push(hasExample);
  if (filters.template) tests.push(isTemplate);
  const ranges = [
    ["dmin", "dmax", (id) => 100 * density(id)], ["amin", "amax", (id) => column.max[id]],
    ["nmin", "", (id) => n[id]], ["smin", "", (id) => column.stability[id]],
    ["lmin", "", (id) => labelScore(id)],
  ];
  for (const [low, high, value] of ranges) {
    const from = bound(filters[low]);
    const to = bound(filters[high]);
    if (from !== undefined) tests.push((id) => value(id) >= from);
    if (to !== undefined) tests.push((id) => value(id) <= to);
  }
  if (filters.role) tests.push((id) => core.roles[column.main_role[id]] === filters.role);
  if (filters.kind) tests.push((id) => (kindOf(id) || "none") === filters.kind);
  if (filters.category) tests.push((id) => categoryOf(id) === filters.category);
  const site = (id) => core.sites?.[column.main_site[id]];
  if (filters.layer) tests.push((id) => String(site(id)?.[0]) === filters.layer);
  if (filters.projection) tests.push((id) => site(id)?.[1] === filters.projection);
  const marks = {
    labelled: (id) => labelOf(id) !== "", unlabelled: (id) => labelOf(id) === "",
    starred: isStarred, noted: (id) => noteOf(id) !== "",
  };
  if (marks[filters.mark]) tests.push(marks[filters.mark]);
  return tests;
}

function bound(text) {
  const value = Number(text);
  return text === undefined || String(text).trim() === "" || Number.isNaN(value) ? undefined : value;
}

const byId = (id) => document.getElementById(id);
const form = byId("filter-form");
const controls = [...form.elements].filter((control) => control.name);
const NOTHING = new Uint8Array(core.n_features);
const PAUSE = 60; // milliseconds after the last letter before a search begins

let found = null; // flags by feature of the last search, null without one
let searched = ""; // what was searched
let timer = 0;
let relisted = () => {};

// Calls `action(moves)` after the list changes; `moves` says whether the shown feature may change,
// "first" that it is to be the first of the list.
export function onList(action) {
  relisted = action;
}

export function filters() {
  const now = noFilters();
  for (const { name, type, checked, value } of controls) {
    now[name] = type === "checkbox" ? checked : value;
  }
  return now;
}

export function query() {
  return toQuery(filters());
}

// Sets the filters from an address, and fills the list. `moves` is whether the shown feature may
// change too; it may not if the address names one.
export function setFilters(text, moves = false) {
  const now = fromQuery(text ?? "");
  for (const control of controls) {
    if (control.type === "checkbox") control.checked = now[control.name];
    else control.value = now[control.name];
    if (control.tagName === "SELECT" && control.selectedIndex < 0) control.selectedIndex = 0;
  }
  byId("more").open ||= nMore(filters()) > 0;
  refill(moves);
}

export function clearFilters() {
  setFilters("", true);
}

export function refill(moves = true) {
  const now = filters();
  byId("dead").disabled = now.full;
  if (!now.q.trim()) {
    stopSearch();
    found = null;
    searched = "";
  } else if (searched !== `${now.in} ${now.q}`) {
    begin(now, moves);
    return;
  }
  show(1, moves);
}

function begin(now, moves) {
  searched = `${now.in} ${now.q}`;
  byId("list").setAttribute("aria-busy", "true");
  search(now.q, now.in, (flags, share) => {
    found = flags;
    show(share, moves && share === 1);
  });
}

function show(share, moves) {
  const now = filters();
  fill(choose(now, now.q.trim() ? (found ?? NOTHING) : null), now.sort);
  const n = listed().length;
  const hidden = core.n_features - n;
  const note = hidden ? ` (${whole(hidden)} hidden)` : "";
  const state = share < 1 ? `, searching: ${Math.floor(100 * share)} %` : "";
  byId("list-count").textContent = `${whole(n)} feature${n === 1 ? "" : "s"}${note}${state}`;
  byId("list").setAttribute("aria-busy", String(share < 1));
  const more = nMore(now);
  byId("filter-count").textContent = more ? ` (${more})` : "";
  byId("clear").hidden = toQuery({ ...now, sort: noFilters().sort }) === "";
  byId("sort-label").hidden = !hasLabels && !nAnnotations() && now.sort !== "label";
  relisted(moves);
}

function nMore(now) {
  const names = ["dmin", "dmax", "amin", "amax", "nmin", "smin", "role", "layer", "projection",
    "mark", "kind", "category", "lmin"];
  return names.filter((name) => now[name]).length;
}

function addOptions(name, values) {
  const select = form.elements[name];
  for (const value of values) {
    const option = element("option", "", value === "-1" ? "none" : value);
    option.value = value;
    select.append(option);
  }
}

// Takes away what needs something that the page does not have. Safari shows hidden options.
function hide(need) {
  for (const node of document.querySelectorAll(`[data-need="${need}"]`)) {
    if (node.tagName === "OPTION") node.remove();
    else node.hidden = true;
  }
}

byId("full-count").textContent = core.top_k;
const roles = core.roles.filter((_, i) => core.n_by_role?.[i] > 0);
if (roles.length) addOptions("role", roles);
else hide("role");
if (core.sites && column.main_site.length) {
  const layers = [...new Set(core.sites.map(([layer]) => layer))].sort((a, b) => a - b);
  addOptions("layer", layers.map(String));
  addOptions("projection", [...new Set(core.sites.map(([, projection]) => projection))]);
} else {
  hide("site");
}
const hasTemplate = column.n_special.some((_, id) => isTemplate(id));
if (!hasTemplate) hide("template");
if (!hasTemplate || !column.effect_kl) hide("ranked");
if (hasLabels) {
  addOptions("kind", [...core.labels.kinds, "none"]);
  addOptions("category", core.labels.categories);
} else {
  hide("label");
}
if (!column.effect_kl) hide("effect");
if (!column.stability.some((value) => !Number.isNaN(value))) hide("stability");

form.addEventListener("input", (event) => {
  clearTimeout(timer);
  const typed = event.target.matches("input:not([type=checkbox])");
  if (typed) timer = setTimeout(refill, PAUSE);
  else refill(event.target.id === "sort" ? "first" : true);
});
form.addEventListener("submit", (event) => {
  event.preventDefault();
  clearTimeout(timer);
  refill();
});
byId("clear").addEventListener("click", clearFilters);
