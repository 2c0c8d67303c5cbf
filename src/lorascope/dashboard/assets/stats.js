// The statistics of one feature, each with a one-line definition.
import { copyMenu } from "./copying.js";
import { UNKNOWN, column, core } from "./data.js";
import { rowsOfFacts } from "./figures.js";
import { element, percent, short, three, whole } from "./format.js";

// Returns a feature's density among ordinary tokens, NaN if unknown.
export function density(id) {
  const n = column.n_active[id];
  return n >= 0 && core.n_eligible > 0 ? n / core.n_eligible : NaN;
}

// Returns the name of the site with the largest share of a feature's write, "" if unknown.
export function mainSite(id) {
  const site = column.main_site[id];
  if (site === UNKNOWN || !core.sites) return "";
  const [layer, projection] = core.sites[site];
  return layer < 0 ? projection : `${layer}.${projection}`;
}

// Returns the role in which a feature has its highest density, "" if unknown.
export function mainRole(id) {
  return core.roles[column.main_role[id]] ?? "";
}

// Returns the statistics of a feature, with a menu that copies them.
export function drawStats(id) {
  const known = rows(id).filter(([, , , text]) => text);
  const part = drawNumbers(known, "stat");
  part.dataset.testid = "stats-part";
  part.firstChild.dataset.testid = "stats";
  part.lastChild.append(copyMenu("statistics", part, () => rowsOfFacts(known)));
  return part;
}

// Returns a row of numbers, and below it, folded, what they mean: [label, name, number, text for
// people, definition] of each.
export function drawNumbers(numbers, prefix) {
  const stats = element("dl", "stats", numbers.map(([label, name, value, text, note]) =>
    element("div", "stat", [element("dt", "", label), element("dd", "stat-value", text,
      { "data-testid": `${prefix}-${name}`, "data-value": value })], { title: note })),
  { tabindex: 0 }); // on a phone it scrolls
  const meanings = element("dl", "stat-meanings", numbers.flatMap(([label, , , , note]) =>
    [element("dt", "", label), element("dd", "", note)]));
  const more = element("details", "stat-more",
    [element("summary", "", "What these numbers mean"), meanings]);
  return element("div", "stats-part", [stats, element("div", "stats-foot", more)]);
}

function rows(id) {
  const real = (name) => !Number.isNaN(column[name][id]) && short(column[name][id]);
  const count = (name) => column[name][id] >= 0 && whole(column[name][id]);
  const [share, kl] = [density(id), column.effect_kl?.[id]];
  return [
    ["firings", "n_active", column.n_active[id], count("n_active"), "ordinary tokens at which it fires"],
    ["at special tokens", "n_special", column.n_special[id], count("n_special"),
      "firings at special tokens and template headers"],
    ["density", "density", share, !Number.isNaN(share) && percent(share),
      `share of the ${whole(core.n_eligible || 0)} ordinary tokens`],
    ["rollouts", "n_rollouts", column.n_rollouts[id], count("n_rollouts"),
      "rollouts in which it fires at least once"],
    ["max", "max", column.max[id], real("max"), "largest activation at an ordinary token"],
    ["mean", "mean", column.mean[id], real("mean"),
      "average activation over the ordinary tokens at which it fires"],
    ["std", "std", column.std[id], real("std"), "standard deviation over the same tokens"],
    ["effect", "effect", kl, kl >= 0 && three(kl),
      "KL(adapter \u2016 adapter without it), nats per token of text, on held-out rollouts"],
    ["examples", "n_examples", column.n_examples[id], String(column.n_examples[id]),
      `strongest tokens kept, at most ${core.top_k}`],
    ["stability", "stability", column.stability[id], real("stability"),
      "cosine with the nearest feature in SAEs of other seeds; 1 is found again exactly"],
  ];
}
