// The search field and the filters of the list.
import { column, core, isTemplate } from "./data.js";
import { nAnnotations } from "./annotations.js";
import { choose, fromQuery, noFilters, toQuery } from "./filters.js";
import { fill, listed } from "./feature_list.js";
import { hasLabels } from "./labels.js";
import { search, stopSearch } from "./search.js";
import { element, whole } from "./format.js";

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
