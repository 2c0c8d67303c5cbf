// The effects of a feature: of removing it, and on tokens directly through the residual stream.
import { column, core } from "./data.js";
import { drawFacts, panel, rowsOfFacts, svg } from "./figures.js";
import { element, percent, signed, textOf, three, whole } from "./format.js";
import { drawTokens } from "./related.js";

const [WIDTH, ROW] = [320, 26]; // of the figure, in SVG units
const SIDES = [["promoted", "+"], ["suppressed", "\u2212"]];

// Returns whether the effect of removing a feature was measured.
function isMeasured(id) {
  return column.effect_kl !== undefined && !Number.isNaN(column.effect_kl[id]);
}

// Returns the panels of those effects that were measured.
export function drawEffects(record) {
  const parts = [];
  if (column.effect_kl) parts.push(drawAblation(record.id));
  if (column.direct_share) parts.push(drawDirect(record));
  return parts;
}

function drawAblation(id) {
  const { n_rollouts: rollouts, n_tokens: tokens, whole: all, floor } = core.effects.ablation;
  const title = "Effect of removing this feature";
  const note = "KL(adapter \u2016 adapter without this feature), in nats per token, on " +
    `${whole(tokens)} tokens of text in ${whole(rollouts)} held-out rollouts (logarithmic axis).`;
  if (!isMeasured(id) || column.effect_fired[id] === 0) {
    const why = element("p", "figure-note", isMeasured(id)
      ? "No effect: it never fires in these rollouts."
      : "Not measured: it never fires in these rollouts, or it was not selected.");
    return panel(title, note, why, { testid: "effect" });
  }
  const value = (name) => column[`effect_${name}`][id];
  const rows = [["this feature", value("kl"), [value("low"), value("high")], "main"],
    ["other directions", value("control"), [NaN, NaN], "other"],
    ["whole adapter", all, [NaN, NaN], "soft"]];
  const verdict = element("p", "figure-note", sayVerdict(value), { "data-testid": "effect-verdict" });
  const facts = factsOf(value);
  return panel(title, note, [verdict, drawKlAxis(id, rows, floor), drawFacts(facts, "effect")], {
    testid: "effect", file: `feature-${id}-effect`,
    rows: () => [...rowsOfFacts(facts), ...rows.slice(2)
      .map(([label, number]) => [label, number, "KL without any row, nats per token"])],
  });
}

// Returns whether a feature's effect differs from other changes of the same size; "" if not measured.
export function verdictOf(id) {
  if (!isMeasured(id)) return "";
  if (Number.isNaN(column.effect_p[id])) return "too few firings";
  return column.effect_excess_low[id] > 0 ? "specific" : "not distinguishable";
}

// Says the same in a sentence.
function sayVerdict(value) {
  if (Number.isNaN(value("p"))) {
    return "Too few firings to say whether this effect is specific to the feature.";
  }
  const [low, high] = [value("excess_low"), value("excess_high")];
  const edges = Number.isNaN(low) ? "" : `, which is ${signed(low)} to ${signed(high)} more than ` +
    "changes of the same size in other directions give";
  const pull = value("pull");
  return `${low > 0 ? "Specific" : "Not distinguishable from other changes of the same size"}: at ` +
    `each firing, removing it ${pull < 0 ? "raises" : "lowers"} log p of the token that the ` +
    `adapter raises most by ${three(Math.abs(pull))} nats${edges} (95 %, corrected for ` +
    `${whole(core.effects.ablation.n_judged)} features; first order).`;
}

// Returns [label, name, number, text for people, definition] of each number.
function factsOf(value) {
  const all = core.effects.ablation.whole;
  const [low, high] = [value("low"), value("high")];
  const edges = Number.isNaN(low) ? "" : ` (${three(low)} to ${three(high)})`;
  const known = (number, write) => (Number.isNaN(number) ? "\u2013" : write(number));
  return [
    ["KL", "kl", value("kl"), three(value("kl")) + edges,
      "average over tokens of text, with a 95 % interval over rollouts" +
      (Number.isNaN(value("ce")) ? "; estimated from gradients, because it was not removed" : "")],
    ...(Number.isNaN(value("share")) ? [] : [
      ["share of the adapter's", "share", value("share"), percent(value("share")),
        "KL over all predictions, special tokens and template headers too, divided by that of " +
        `removing the whole adapter; at tokens of text alone ${percent(value("kl") / all)}`]]),
    ["per firing", "per-firing", value("each"), known(value("each"), three),
      `total KL divided by the number of tokens at which it fires, ${whole(value("fired"))}`],
    ["share at firing tokens", "at-firing", value("here"), known(value("here"), percent),
      "share of the KL at tokens where it fires; the rest comes later in the rollout"],
    ["loss", "ce", value("ce"), known(value("ce"), signed),
      "increase of \u2212log p of the actual next token, in nats per token"],
    ["control", "control", value("control"), three(value("control")),
      "estimated KL of other directions of the same norm at its tokens, median"],
  ];
}

// Draws values as dots on a logarithmic axis, with the numerical noise level as a line.
function drawKlAxis(id, rows, floor) {
  const values = rows.flatMap(([, value, edges]) => [value, ...edges]).filter((value) => value > 0);
  if (!values.length) values.push(floor || 1);
  const low = Math.floor(Math.log10(Math.max(1e-13, Math.min(...values)))) - 0.2;
  const high = Math.ceil(Math.log10(Math.max(...values)) + 0.01);
  const [left, right] = [104, WIDTH - 8];
  const at = (value) => left +
    (right - left) * Math.max(0, (Math.log10(value) - low) / (high - low));
  const height = ROW * rows.length + 12; // leaves room for the name of the noise level
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${height + 16}`, role: "group", "data-walk": "",
    "aria-label": `KL of removing feature ${id}, of its control, and of removing the whole adapter`,
  });
  const step = Math.max(1, Math.ceil((high - Math.ceil(low)) / 4));
  for (let power = Math.ceil(low); power <= high; power += step) {
    const x = at(10 ** power);
    drawing.append(svg("line", { x1: x, x2: x, y1: 0, y2: height, class: "grid-line" }),
      svg("text", { x, y: height + 12, class: "tick middle" }, `1e${power}`));
  }
  if (floor > 0) {
    // Far below the dots it is at the axis' edge, and its number says where it is.
    const isBelow = Math.log10(floor) < low;
    const line = { x1: at(floor), x2: at(floor), y1: 0, y2: height, class: "floor-line" };
    const text = isBelow ? `\u2190 numerical noise level, ${three(floor)}` : "numerical noise level";
    drawing.append(svg("line", line),
      svg("text", { x: at(floor) + 4, y: height - 3, class: "tick start" }, text));
  }
  rows.forEach(([label, value, [from, to], kind], i) => {
    const y = ROW * (i + 0.5);
    drawing.append(svg("text", { x: left - 8, y: y + 3.5, class: "tick end" }, label));
    if (from > 0 && to > from) {
      drawing.append(svg("line", { x1: at(from), x2: at(to), y1: y, y2: y, class: "spread" }));
    }
    const where = value > 0 ? at(value) : left;
    const tip = `${label}: ${three(value)} nats per token` +
      (value > 0 ? "" : "; exactly 0, which this axis cannot show") +
      (i === 0 && floor > 0 ? `; numerical noise level ${three(floor)}` : "");
    drawing.append(svg("circle", { cx: where, cy: y, r: 5, class: `dot ${kind}`,
      tabindex: i ? -1 : 0, "data-tip": tip }));
  });
  return drawing;
}

function drawDirect(record) {
  const share = column.direct_share[record.id];
  const title = "Tokens it promotes and suppresses";
  const note = "Direct effect through the residual stream, computed from weights. Scores are logits " +
    "in standard deviations over the vocabulary.";
  if (!(share > 0)) {
    const why = "It has no direct effect: none of its sites writes to the residual stream.";
    return panel(title, note, element("p", "figure-note", why), { testid: "direct" });
  }
  const parts = [element("p", "figure-note", `${percent(share)} of its write goes directly to the ` +
    "residual stream; the rest acts inside layers.", { "data-testid": "direct-share", "data-value": share })];
  for (const [side, sign] of SIDES) {
    parts.push(element("h4", "", `${sign} ${side}`), drawTokens(record[side], signed, side));
  }
  return panel(title, note, parts, {
    testid: "direct",
    rows: () => [["side", "token", "score"], ...SIDES.flatMap(([side]) =>
      record[side].map(([entry, z]) => [side, textOf(entry), z]))],
  });
}
