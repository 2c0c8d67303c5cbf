// Chooses which features are in the list, and their order.
import { UNKNOWN, column, core, hasExample, isTemplate } from "./data.js";
import { isStarred, labelOf, noteOf } from "./annotations.js";
import { verdictOf } from "./effects.js";
import { categoryOf, kindOf, labelScore, nameOf } from "./labels.js";
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

export function noFilters() {
  return { ...NONE };
}

// Returns the filters as the part of an address after "?"; "" if there are none.
export function toQuery(filters) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(filters)) {
    if (value !== NONE[name]) query.set(name, value === true ? "1" : value);
  }
  return query.toString();
}

export function fromQuery(query) {
  const filters = noFilters();
  for (const [name, value] of new URLSearchParams(query)) {
    if (!(name in NONE)) continue;
    filters[name] = typeof NONE[name] === "boolean" ? value === "1" : value;
  }
  return filters;
}

// Returns the features that pass all filters, in order. `found`, if given, flags search results.
export function choose(filters, found = null) {
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
