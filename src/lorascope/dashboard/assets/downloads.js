// The list as a CSV file, with columns as in the CSV of lorascope export.
import { isStarred, labelOf, noteOf } from "./annotations.js";
import { saveFile } from "./copying.js";
import { column, core, feature, hasExample } from "./data.js";
import { textOf } from "./format.js";
import { authorOf, categoryOf, givenName, hasLabels, kindOf, labelScore } from "./labels.js";
import { density, mainRole, mainSite } from "./stats.js";

const of = (name) => (id) => column[name][id];
const count = (name) => (id) => (column[name][id] < 0 ? NaN : column[name][id]); // -1: unknown
const texts = (pairs = []) => pairs.map(([entry]) => textOf(entry)).join(" | ");

// Column of the file -> function of a feature and of its record, null if its block is damaged.
const COLUMNS = {
  feature: (id) => id, label: labelOf, note: noteOf, starred: (id) => Number(isStarred(id)),
  n_active: count("n_active"), n_special: count("n_special"), density,
  n_rollouts: count("n_rollouts"), max: of("max"), mean: of("mean"), std: of("std"),
  n_examples: of("n_examples"), stability: of("stability"),
  ...(column.effect_kl && {
    kl: of("effect_kl"), kl_each: of("effect_each"), kl_control: of("effect_control"),
    pull: of("effect_pull"), pull_excess_low: of("effect_excess_low"),
    pull_excess_high: of("effect_excess_high"),
  }),
  ...(column.direct_share && { direct_share: of("direct_share") }),
  ...(hasLabels && {
    name: givenName, kind: kindOf, category: categoryOf, author: authorOf, score: (id) => labelScore(id),
    score_low: (id) => labelScore(id, "low"), score_high: (id) => labelScore(id, "high"),
  }),
  role: mainRole, site: mainSite, token: (id) => (hasExample(id) ? textOf(column.top_token[id]) : ""),
  tokens_mean: (_, record) => texts(record?.ranked.mean),
  tokens_lift: (_, record) => texts(record?.ranked.lift),
  ...(column.direct_share && {
    promoted: (_, record) => texts(record?.promoted), suppressed: (_, record) => texts(record?.suppressed),
  }),
};

// Saves the statistics of the given features, one line each, with their tokens. Reads block after
// block, so that each is decoded once.
export async function saveTable(ids) {
  const lines = new Map();
  for (const id of [...ids].sort((a, b) => a - b)) {
    const record = await feature(id).catch(() => null); // damage is reported when it is shown
    lines.set(id, Object.values(COLUMNS).map((write) => cell(write(id, record))).join(","));
  }
  const table = [Object.keys(COLUMNS).join(","), ...Array.from(ids, (id) => lines.get(id)), ""];
  saveFile("features.csv", table.join("\r\n"), "text/csv");
}

// Returns a CSV cell; NaN is an empty one. A token may be "=cmd()", which a spreadsheet would run,
// so such text gets an apostrophe in front.
function cell(value) {
  if (typeof value === "number") return Number.isNaN(value) ? "" : value;
  const safe = /^[=+\-@\t\r]/.test(value) ? `'${value}` : value;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
