// Where adapter and base are apart in a whole text, and the features behind: an attribution report.
import { core } from "./data.js";
import { signed, three } from "./effects.js";
import { LEVELS } from "./examples.js";
import { meter, panel } from "./figures.js";
import { drawLink } from "./related.js";
import { element, percent, whole, writeToken } from "./text.js";

const LEAST = 0.001; // nats; a KL below is not coloured
const FEW = 10; // tokens listed of a text
const TARGETS = { kl: "KL(prediction \u2016 base)", logprob: "log p of this token",
  "logit-difference": "its logit over that of the base's likeliest other token" };
const REST = { bias: "the SAE's bias", unexplained: "unexplained by the SAE",
  special: "rows of special tokens", other_columns: "columns that the SAE does not read" };

// Whether an attribution of the text is in the page.
export function isAttributed(kept) {
  return kept.kl !== undefined && kept.kl.length > 0;
}

// Paints tokens by the KL of the prediction that they were drawn from, on a logarithmic scale.
export function paintApart(kept, nodes) {
  const top = largest(kept);
  nodes.forEach((node, t) => {
    const kl = kept.kl[t];
    node.dataset.kl = String(kl);
    if (!(kl >= LEAST)) return;
    const level = Math.ceil((LEVELS * Math.log(kl / LEAST)) / Math.log(top / LEAST));
    node.classList.add(`heat-${Math.min(LEVELS, Math.max(1, level))}`);
  });
}

export function drawApartLegend(kept) {
  const legend = element("div", "legend");
  legend.dataset.testid = "apart-legend";
  const ramp = element("span", "ramp");
  for (let i = 1; i <= LEVELS; i++) ramp.append(element("i", `heat-${i}`));
  const said = "nats, KL(adapter \u2016 base) of the prediction of each token (logarithmic)";
  legend.append(element("span", "", String(LEAST)), ramp, element("span", "", three(largest(kept))),
    element("span", "legend-note", said));
  return legend;
}

// Returns lines for the note beside the pointer.
export function apartNotes(kept, t) {
  if (!isAttributed(kept) || Number.isNaN(kept.kl[t])) return [];
  const lines = [`adapter against base: KL ${three(kept.kl[t])} nats`,
    `the adapter says it with ${signed(kept.rise[t])} nats`];
  return lines.map((line) => element("span", "tip-fired", line));
}

// Lists the tokens of a text at which adapter and base are most apart; `go` pins one.
export function drawMostApart(kept, go) {
  const special = core.roles.indexOf("special"); // they stand apart in every report of effects
  const order = Array.from(kept.kl.keys())
    .filter((t) => kept.kl[t] > 0 && kept.role[t] !== special)
    .sort((a, b) => kept.kl[b] - kept.kl[a]).slice(0, FEW);
  const list = element("ul", "ranked");
  for (const t of order) {
    const item = element("li", "apart-row");
    const button = element("button", "apart-token");
    button.type = "button";
    button.dataset.testid = "apart";
    button.dataset.at = t;
    const token = element("span", "ranked-token");
    writeToken(token, kept.token[t]);
    const number = element("span", "meter-value", three(kept.kl[t]));
    number.dataset.value = String(kept.kl[t]);
    button.append(token, number);
    button.addEventListener("click", () => go(t));
    item.append(button, meter(kept.kl[t] / kept.kl[order[0]]));
    list.append(item);
  }
  const note = "Tokens of text by KL(adapter \u2016 base) of their prediction, nats. Choose one to " +
    "see the features behind it.";
  return panel("Where adapter and base are apart", note, list, { testid: "most-apart" });
}

// Returns the panel of what is behind token `t`; `mark` shows or hides the token of a source.
export function drawBehind(kept, t, mark) {
  const said = core.effects.attribution;
  const numbers = element("p", "figure-note", `KL(adapter \u2016 base) ${three(kept.kl[t])} nats; ` +
    `log p of this token: ${signed(kept.rise[t])} nats by the adapter.`);
  numbers.dataset.testid = "token-kl";
  numbers.dataset.value = String(kept.kl[t]);
  const target = kept.target_token.indexOf(t);
  const title = `Behind token ${whole(t)}`;
  if (target < 0) {
    const more = "Features behind it were not computed: see lorascope attribute, --tokens.";
    return panel(title, more, numbers, { testid: "behind" });
  }
  const n = said.parts.length;
  const parts = Object.fromEntries(said.parts.map((name, i) => [
    name, kept.target_parts[n * target + i],
  ]));
  let first = 0;
  for (let i = 0; i < target; i++) first += kept.behind_count[i];
  const list = element("ul", "ranked");
  const stop = first + kept.behind_count[target];
  for (let i = first; i < stop; i++) list.append(drawFeature(kept, i, kept.behind_value[first], mark));
  const whole_ = parts.adapter - parts.base;
  const rest = element("dl", "effect-facts rest");
  for (const [name, label] of [["features", "all features"], ...Object.entries(REST)]) {
    if (Math.abs(parts[name]) < 1e-6 * Math.abs(whole_)) continue;
    const line = element("div", "effect-fact");
    const value = element("dd", "", signed(parts[name]));
    value.dataset.testid = `behind-${name}`;
    value.dataset.value = String(parts[name]);
    line.append(element("dt", "", label), value);
    rest.append(line);
  }
  const gap = said.gap === null ? "" : `, missing it by ${percent(said.gap)} of its size on average`;
  const note = `What each feature contributed to ${TARGETS[said.target] ?? said.target}: ` +
    `${three(parts.base)} without and ` +
    `${three(parts.adapter)} ${said.unit} with the adapter. Parts add up to it${gap}. Point at one ` +
    "to see the token that it acts from.";
  return panel(title, note, [numbers, list, rest], { testid: "behind" });
}

function drawFeature(kept, i, top, mark) {
  const item = element("li", "behind-row");
  item.dataset.testid = "behind-feature";
  const value = kept.behind_value[i];
  const link = drawLink(kept.behind_latent[i]);
  const number = element("span", "meter-value", signed(value));
  number.dataset.value = String(value);
  link.append(number);
  const source = kept.behind_source[i];
  link.title = `strongest from token ${source}; taking it out there takes about ` +
    `${signed(kept.behind_removal[i])}`;
  const bar = meter(Math.abs(value) / Math.abs(top));
  if (value < 0) bar.classList.add("below");
  item.append(link, bar);
  for (const [on, off] of [["pointerenter", "pointerleave"], ["focusin", "focusout"]]) {
    item.addEventListener(on, () => mark(source, true));
    item.addEventListener(off, () => mark(source, false));
  }
  return item;
}

function largest(kept) {
  return kept.kl.reduce((a, b) => (b > a ? b : a), 2 * LEAST);
}
