// The list as a CSV file.
import { saveFile } from "./copying.js";
import { column, core, feature, hasExample } from "./data.js";
import { isStarred, labelOf, noteOf } from "./annotations.js";
import { authorOf, categoryOf, givenName, hasLabels, kindOf, labelScore } from "./labels.js";
import { density, mainRole, mainSite } from "./stats.js";

// Column -> the list of a feature's record whose tokens it has, as in the CSV of lorascope export.
const LISTS = [["tokens_mean", (record) => record.ranked.mean],
  ["tokens_lift", (record) => record.ranked.lift]];
const DIRECT = [["promoted", (record) => record.promoted],
  ["suppressed", (record) => record.suppressed]];

// Saves the statistics of the given features, one line each, with their tokens.
export async function saveTable(ids) {
  const tokens = await tokensOf(ids);
  const known = (value) => (Number.isNaN(value) || value < 0 ? "" : value);
  const real = (value) => (Number.isNaN(value) ? "" : value);
  const columns = {
    feature: (id) => id,
    label: (id) => cell(labelOf(id)),
    note: (id) => cell(noteOf(id)),
    starred: (id) => (isStarred(id) ? 1 : 0),
    n_active: (id) => known(column.n_active[id]),
    n_special: (id) => known(column.n_special[id]),
    density: (id) => known(density(id)),
    n_rollouts: (id) => known(column.n_rollouts[id]),
    max: (id) => real(column.max[id]),
    mean: (id) => real(column.mean[id]),
    std: (id) => real(column.std[id]),
    n_examples: (id) => column.n_examples[id],
    stability: (id) => real(column.stability[id]),
    ...(column.effect_kl && {
      kl: (id) => real(column.effect_kl[id]),
      kl_each: (id) => real(column.effect_each[id]),
      kl_control: (id) => real(column.effect_control[id]),
      pull: (id) => real(column.effect_pull[id]),
      pull_excess_low: (id) => real(column.effect_excess_low[id]),
      pull_excess_high: (id) => real(column.effect_excess_high[id]),
    }),
    ...(column.direct_share && { direct_share: (id) => real(column.direct_share[id]) }),
    ...(hasLabels && {
      name: (id) => cell(givenName(id)),
      kind: kindOf,
      category: categoryOf,
      author: (id) => cell(authorOf(id)),
      score: (id) => real(labelScore(id)),
      score_low: (id) => real(labelScore(id, "low")),
      score_high: (id) => real(labelScore(id, "high")),
    }),
    role: (id) => cell(mainRole(id)),
    site: (id) => cell(mainSite(id)),
    token: (id) => cell(hasExample(id) ? core.token_texts[column.top_token[id]] : ""),
    ...Object.fromEntries(LISTS.map(([name]) => [name, (id) => cell(tokens.get(id)?.[name] ?? "")])),
    ...(column.direct_share && Object.fromEntries(
      DIRECT.map(([name]) => [name, (id) => cell(tokens.get(id)?.[name] ?? "")]))),
  };
  const lines = [Object.keys(columns).join(",")];
  for (const id of ids) lines.push(Object.values(columns).map((write) => write(id)).join(","));
  saveFile("features.csv", `${lines.join("\r\n")}\r\n`, "text/csv");
}

// Returns the tokens of each list of features, by feature. Reads block after block, so that each is
// decoded once.
async function tokensOf(ids) {
  const found = new Map();
  for (const id of [...ids].sort((a, b) => a - b)) {
    const record = await feature(id).catch(() => null); // damage is reported when it is shown
    if (!record) continue;
    found.set(id, Object.fromEntries([...LISTS, ...DIRECT].map(([name, of]) => [
      name, of(record).map(([entry]) => core.token_texts[entry]).join(" | "),
    ])));
  }
  return found;
}

// Returns text as a CSV cell. A token may be "=cmd()", which a spreadsheet would run, so such text
// gets an apostrophe in front.
function cell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
