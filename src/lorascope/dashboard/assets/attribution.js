// What an attribution report says about a rollout: where the adapter changes predictions, and which
// features contribute to that.
import { core } from "./data.js";
import { LEVELS, drawFacts, drawLegend, meter, panel } from "./figures.js";
import { button, element, percent, signed, textOf, three, whole, writeToken } from "./format.js";
import { drawEntry, drawLink, nameText } from "./related.js";

const MIN_KL = 0.001; // nats; tokens below are not coloured
const N_LISTED = 10; // tokens in the list of a rollout
const N_PREDICTED = 3; // likeliest tokens of each model
const TARGETS = { kl: "KL(prediction \u2016 base)", logprob: "log p of this token",
  "logit-difference": "its logit minus the logit of the base's likeliest other token" };
const OTHER_PARTS = { bias: "the SAE's bias", unexplained: "unexplained by the SAE",
  special: "rows that the SAE does not read", other_columns: "columns that the SAE does not read" };

// Returns whether the page has an attribution of this rollout.
export function isAttributed(data) {
  return data.kl !== undefined && data.kl.length > 0;
}

// Colours each token by the KL of its prediction, on a logarithmic scale.
export function colorByKl(data, nodes) {
  const top = largestKl(data);
  nodes.forEach((node, t) => {
    const kl = data.kl[t];
    node.dataset.kl = String(kl);
    if (!(kl >= MIN_KL)) return;
    const level = Math.ceil((LEVELS * Math.log(kl / MIN_KL)) / Math.log(top / MIN_KL));
    node.classList.add(`heat-${Math.min(LEVELS, Math.max(1, level))}`);
  });
}

export function drawKlLegend(data) {
  const note = "KL(adapter \u2016 base) of each token's prediction, in nats (logarithmic)";
  return drawLegend(String(MIN_KL), three(largestKl(data)), note, { testid: "kl-legend" });
}

// Returns lines about token `t` for its tooltip.
export function klNotes(data, t) {
  if (!isAttributed(data) || Number.isNaN(data.kl[t])) return [];
  const lines = [`KL(adapter \u2016 base): ${klText(data, t)} nats`];
  if (data.rise.length) lines.push(`log-probability gain: ${signed(data.rise[t])} nats`);
  return lines.map((line) => element("span", "tip-fired", line));
}

function klText(data, t) {
  return data.kl[t] > 0 || data.rise.length ? three(data.kl[t]) : `below ${MIN_KL}`;
}

// Returns a line for each model: the tokens that it predicts where token `t` is, likeliest first.
export function predictionNotes(data, t) {
  const first = data.likelyStart[t];
  const all = Array.from({ length: data.likelyStart[t + 1] - first || 0 }, (_, i) => {
    const entry = data.likely_token[first + i];
    const base = data.likely_base[first + i];
    return { entry: entry ? entry - 1 : data.token[t], base, adapter: base + data.likely_change[first + i] };
  });
  return all.length ? ["base", "adapter"].map((who) => drawPredicted(who, all)) : [];
}

function drawPredicted(who, all) {
  const line = element("span", "predicted", element("span", "predicted-who", who),
    { "data-testid": `predicted-${who}` });
  const best = [...all].sort((a, b) => b[who] - a[who]).slice(0, N_PREDICTED);
  best.forEach((one, i) => {
    if (i && !one[who]) return;
    const token = element("span", "predicted-token");
    writeToken(token, one.entry);
    const p = one[who] >= 100 ? ">\u00a099" : one[who] <= 0 ? "<\u00a01" : String(one[who]);
    line.append(token, element("span", "predicted-p", `${p}\u00a0%`));
  });
  return line;
}

// Returns whether the contributions to the prediction of token `t` are known.
export function isExplained(data, t) {
  return data.target_token?.includes(t) ?? false;
}

// Lists the tokens of a rollout with the largest KL; `go` shows one of them. Those of messages,
// which the model only reads, are listed when their role is chosen.
export function drawLargestKl(data, go) {
  const list = element("ul", "ranked");
  const given = ["user", "system"].map((name) => core.roles.indexOf(name));
  const present = new Set(data.role);
  const options = [["what the model writes", (role) => !given.includes(role)], ["all tokens", () => true],
    ...core.roles.map((name, i) => [name, (role) => role === i, i]).filter(([, , i]) => present.has(i))];
  const choice = element("select", "", options.map(([name]) => element("option", "", name)),
    { "aria-label": "Tokens to list", "data-testid": "kl-role" });
  const fill = () => fillLargest(list, data, go, options[choice.selectedIndex][1]);
  choice.addEventListener("change", fill);
  fill();
  const note = "Tokens with the largest KL(adapter \u2016 base), in nats. Select one to see " +
    "which features contributed to it.";
  return panel("Where the adapter changes predictions", note, element("div", "", [choice, list]), {
    testid: "largest-kl",
    rows: () => [["position", "role", "token", "KL in nats"], ...Array.from(list.children, (item) => {
      const t = Number(item.querySelector("button").dataset.at);
      return [t, core.roles[data.role[t]], textOf(data.token[t]), data.kl[t]];
    })],
  });
}

function fillLargest(list, data, go, isListed) {
  const order = Array.from(data.kl.keys())
    .filter((t) => data.kl[t] > 0 && isListed(data.role[t]))
    .sort((a, b) => data.kl[b] - data.kl[a]).slice(0, N_LISTED);
  list.replaceChildren();
  const top = Array.from(data.kl.keys()).reduce((a, b) => (data.kl[b] > data.kl[a] ? b : a), 1);
  if (!order.includes(top) && data.kl[top] > 0) order.push(top); // the end of the legend's scale
  for (const t of order) {
    const isOwn = isListed(data.role[t]);
    const number = element("span", "meter-value",
      `${isOwn ? "" : `${core.roles[data.role[t]]} `}${three(data.kl[t])}`, { "data-value": data.kl[t] });
    const link = button([drawEntry(data.token[t]), number], () => go(t),
      { kind: "kl-token", "data-testid": isOwn ? "kl-token" : "kl-top", "data-at": t });
    list.append(element("li", "kl-row", [link, meter(data.kl[t] / data.kl[top])]));
  }
}

// Returns the panel of contributions to the prediction of token `t` of a rollout, or of the command
// that computes them. `mark(source, on)` highlights the token from which a feature acts.
export function drawContributions(data, t, rollout, mark) {
  const report = core.effects.attribution;
  const title = `Contributions to the prediction of token ${whole(t)}`;
  if (t === 0) return panel(title, "Nothing predicts the first token.", [], { testid: "contributions" });
  const numbers = drawNumbers(data, t);
  if (!isExplained(data, t)) {
    const note = "Not computed for this token. This command computes them; then make the page " +
      "again with its report next to the others in --effects.";
    const target = report && report.target !== "kl" ? ` --target ${report.target}` : "";
    const code = element("code", "command", "lorascope attribute --data-dir STORE --sae SAE " +
      `--lora-path ADAPTER --rollouts ${rollout} --positions ${t}${target} ` +
      `--output attribution-${rollout}-${t}.json`, { "data-testid": "attribute-command" });
    return panel(title, note, [code, ...numbers], { testid: "contributions" });
  }
  const target = data.target_token.indexOf(t);
  const n = report.parts.length;
  const parts = Object.fromEntries(report.parts.map((name, i) => [
    name, data.target_parts[n * target + i],
  ]));
  const first = data.behindStart[target];
  const behind = Array.from({ length: data.behind_count[target] }, (_, i) => first + i);
  const list = element("ul", "ranked",
    behind.map((i) => drawContribution(data, i, data.behind_value[first], mark)));
  const difference = Math.abs(parts.adapter - parts.base);
  const large = [["features", "all features"], ...Object.entries(OTHER_PARTS)]
    .filter(([name]) => Math.abs(parts[name]) >= 1e-6 * difference);
  const rest = drawFacts(large.map(([name, label]) =>
    [label, name, parts[name], signed(parts[name]), ""]), "contribution", "rest");
  const error = report.gap === null ? "" : ` (average error: ${percent(report.gap)})`;
  const name = TARGETS[report.target] ?? report.target;
  const note = `Each feature's contribution to ${name}, which is ${three(parts.base)} without the ` +
    `adapter and ${three(parts.adapter)} ${report.unit} with it. The parts below add up to the ` +
    `difference${error}. Point at a feature to see the token from which it acts.`;
  return panel(title, note, [...numbers, list, rest], {
    testid: "contributions",
    rows: () => [["part", "label", "contribution", "from token"],
      ...behind.map((i) => [data.behind_latent[i], nameText(data.behind_latent[i]),
        data.behind_value[i], data.behind_source[i]]),
      ...["features", ...Object.keys(OTHER_PARTS)].map((name) => [name, "", parts[name], NaN])],
  });
}

// Returns what is known of a prediction without its contributions.
function drawNumbers(data, t) {
  if (!isAttributed(data)) return [];
  const gain = data.rise.length ? ` Log-probability gain: ${signed(data.rise[t])} nats.` : "";
  const text = `KL(adapter \u2016 base): ${klText(data, t)} nats.${gain}`;
  const numbers = element("p", "figure-note", text,
    { "data-testid": "token-kl", "data-value": data.kl[t] });
  return [numbers, ...predictionNotes(data, t)];
}

function drawContribution(data, i, top, mark) {
  const value = data.behind_value[i];
  const link = drawLink(data.behind_latent[i], signed, value);
  const source = data.behind_source[i];
  link.title = `acts most from token ${source}; removing it there would take away about ` +
    `${signed(data.behind_removal[i])}`;
  const bar = meter(Math.abs(value) / Math.abs(top));
  if (value < 0) bar.classList.add("below");
  const item = element("li", "contribution-row", [link, bar], { "data-testid": "contribution" });
  for (const [on, off] of [["pointerenter", "pointerleave"], ["focusin", "focusout"]]) {
    item.addEventListener(on, () => mark(source, true));
    item.addEventListener(off, () => mark(source, false));
  }
  return item;
}

function largestKl(data) {
  return data.kl.reduce((a, b) => (b > a ? b : a), 2 * MIN_KL);
}
