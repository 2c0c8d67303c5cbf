// The numbers of one feature, each with its definition in a line.
import { NOWHERE, column, core } from "./data.js";
import { element, percent, short, whole } from "./text.js";

// Returns the density of a feature among eligible tokens, NaN where it is not known.
export function density(id) {
  const n = column.n_active[id];
  return n >= 0 && core.n_eligible > 0 ? n / core.n_eligible : NaN;
}

// Returns the name of the site with the largest share of a feature's effect, "" where not known.
export function mainSite(id) {
  const site = column.main_site[id];
  if (site === NOWHERE || !core.sites) return "";
  const [layer, projection] = core.sites[site];
  return layer < 0 ? projection : `${layer}.${projection}`;
}

// Returns the role in which a feature is densest, "" where not known.
export function mainRole(id) {
  return core.roles[column.main_role[id]] ?? "";
}

export function drawStats(id) {
  const stats = element("dl", "stats");
  stats.dataset.testid = "stats";
  for (const [label, name, value, text, note] of rows(id)) {
    if (!text) continue;
    const cell = element("div", "stat");
    const number = element("dd", "stat-value", text);
    number.dataset.testid = `stat-${name}`;
    number.dataset.value = String(value);
    cell.append(element("dt", "", label), number, element("dd", "stat-note", note));
    stats.append(cell);
  }
  return stats;
}

function effect(id) {
  const kl = column.effect_kl?.[id];
  return kl >= 0 && short(Number(kl.toPrecision(3)));
}

function rows(id) {
  const real = (name) => !Number.isNaN(column[name][id]) && short(column[name][id]);
  const count = (name) => column[name][id] >= 0 && whole(column[name][id]);
  const share = density(id);
  return [
    ["fires on", "n_active", column.n_active[id], count("n_active"),
      "tokens with an activation above zero"],
    ["density", "density", share, !Number.isNaN(share) && percent(share),
      `share of the ${whole(core.n_eligible || 0)} eligible tokens`],
    ["rollouts", "n_rollouts", column.n_rollouts[id], count("n_rollouts"),
      "texts in which it fires at least once"],
    ["max", "max", column.max[id], real("max"), "largest activation on any token"],
    ["mean", "mean", column.mean[id], real("mean"),
      "average activation over the tokens on which it fires"],
    ["std", "std", column.std[id], real("std"), "standard deviation over the same tokens"],
    ["effect", "effect", column.effect_kl?.[id], effect(id),
      "KL(adapter \u2016 without it), nats a token, on held-out texts"],
    ["examples", "n_examples", column.n_examples[id], String(column.n_examples[id]),
      `strongest tokens kept, of ${core.top_k} at most`],
    ["stability", "stability", column.stability[id], real("stability"),
      "cosine with its nearest in SAEs of other seeds; 1 is found again exactly"],
  ];
}
