// What a feature does: what is gone without it, and which tokens it promotes by what it writes.
import { column, core } from "./data.js";
import { meter, panel, svg } from "./figures.js";
import { element, percent, short, whole, writeToken } from "./text.js";

const [WIDTH, ROW] = [320, 26]; // of the figure, in units of its drawing
const SIDES = [["promoted", "+"], ["suppressed", "\u2212"]];

// Whether the page knows what is gone without a feature.
export function isMeasured(id) {
  return column.effect_kl !== undefined && !Number.isNaN(column.effect_kl[id]);
}

// Returns the panels of what a feature does, as far as it is known.
export function drawEffects(record) {
  const parts = [];
  if (column.effect_kl) parts.push(drawGone(record.id));
  if (column.direct_share) parts.push(drawDirect(record));
  return parts;
}

function drawGone(id) {
  const { n_rollouts: texts, n_tokens: tokens, whole: all, floor } = core.effects.ablation;
  const note = `KL(adapter \u2016 without it), nats a token, on ${whole(tokens)} tokens of ` +
    `${whole(texts)} held-out texts (logarithmic axis).`;
  if (!isMeasured(id) || column.effect_fired[id] === 0) {
    const why = element("p", "figure-note", isMeasured(id)
      ? "Nothing: it never fired on these texts."
      : "Not in the report: it never fired on these texts, or was not asked for.");
    return panel("What is gone without it", note, why, { testid: "effect" });
  }
  const value = (name) => column[`effect_${name}`][id];
  const rows = [["this feature", value("kl"), [value("low"), value("high")], "main"],
    ["random direction", value("random"), [NaN, NaN], "other"],
    ["whole adapter", all, [NaN, NaN], "soft"]];
  const list = element("dl", "effect-facts");
  for (const [label, name, number, text, meaning] of facts(value)) {
    const line = element("div", "effect-fact");
    const shown = element("dd", "", text);
    shown.dataset.testid = `effect-${name}`;
    shown.dataset.value = String(number);
    line.append(element("dt", "", label), shown, element("dd", "effect-note", meaning));
    list.append(line);
  }
  return panel("What is gone without it", note, [drawScale(id, rows, floor), list], {
    testid: "effect", file: `feature-${id}-effect`,
  });
}

function facts(value) {
  const [low, high] = [value("low"), value("high")];
  const edges = Number.isNaN(low) ? "" : ` (${three(low)} to ${three(high)})`;
  const known = (number, write) => (Number.isNaN(number) ? "\u2013" : write(number));
  return [
    ["KL", "kl", value("kl"), three(value("kl")) + edges,
      "over all tokens, with the 95 % interval over texts"],
    ["each firing", "each", value("each"), known(value("each"), three),
      `the same KL, shared out over the ${whole(value("fired"))} tokens it fires on there`],
    ["at once", "here", value("here"), known(value("here"), percent),
      "share of the KL at the tokens it fires on; the rest comes later in the text"],
    ["loss", "ce", value("ce"), signed(value("ce")),
      "rise of \u2212log p of the text's own next tokens, nats a token"],
    ["random", "random", value("random"), three(value("random")),
      "a random direction of the same size taken out instead: the control"],
  ];
}

// Draws values as dots on a logarithmic axis, with the floor of rounding as a line.
function drawScale(id, rows, floor) {
  const values = [floor, ...rows.flatMap(([, value, edges]) => [value, ...edges])]
    .filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.max(1e-13, Math.min(...values, 1e-9)))) - 0.2;
  const high = Math.ceil(Math.log10(Math.max(...values, 1e-9)));
  const [left, right] = [104, WIDTH - 8];
  const at = (value) => left +
    (right - left) * Math.max(0, (Math.log10(value) - low) / (high - low));
  const height = ROW * rows.length + 12; // the last line names the floor
  const drawing = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${height + 16}`, role: "group",
    "aria-label": `KL without feature ${id}, its control and the whole adapter`,
  });
  drawing.dataset.walk = "";
  const step = Math.max(1, Math.ceil((high - Math.ceil(low)) / 4));
  for (let power = Math.ceil(low); power <= high; power += step) {
    const x = at(10 ** power);
    drawing.append(svg("line", { x1: x, x2: x, y1: 0, y2: height, class: "grid-line" }),
      svg("text", { x, y: height + 12, class: "tick middle" }, `1e${power}`));
  }
  if (floor > 0) {
    const line = { x1: at(floor), x2: at(floor), y1: 0, y2: height, class: "floor-line" };
    drawing.append(svg("line", line),
      svg("text", { x: at(floor) + 4, y: height - 3, class: "tick start" }, "floor of rounding"));
  }
  rows.forEach(([label, value, [from, to], kind], i) => {
    const y = ROW * (i + 0.5);
    drawing.append(svg("text", { x: left - 8, y: y + 3.5, class: "tick end" }, label));
    if (from > 0 && to > from) {
      drawing.append(svg("line", { x1: at(from), x2: at(to), y1: y, y2: y, class: "spread" }));
    }
    const where = value > 0 ? at(value) : left;
    const dot = svg("circle", { cx: where, cy: y, r: 5, class: `dot ${kind}`, tabindex: i ? -1 : 0 });
    dot.dataset.tip = `${label}: ${three(value)} nats a token` +
      (value > 0 ? "" : "; nothing at all, so not on this axis") +
      (i === 0 && floor > 0 ? `; rounding alone makes ${three(floor)}` : "");
    drawing.append(dot);
  });
  return drawing;
}

function drawDirect(record) {
  const share = column.direct_share[record.id];
  const note = "By what it writes to the residual stream alone, from weights: logits in standard " +
    "deviations over the vocabulary.";
  if (!(share > 0)) {
    const why = "Its effect is indirect: no site that it acts at writes to the residual stream.";
    return panel("What it promotes", note, element("p", "figure-note", why), { testid: "direct" });
  }
  const parts = [element("p", "figure-note", `${percent(share)} of its effect is written there; ` +
    "the rest acts inside layers.")];
  parts[0].dataset.testid = "direct-share";
  parts[0].dataset.value = String(share);
  for (const [side, sign] of SIDES) {
    const list = element("ol", "ranked");
    list.dataset.testid = side;
    const top = Math.max(...record[side].map(([, z]) => Math.abs(z))) || 1;
    for (const [entry, z] of record[side]) {
      const item = element("li", `meter-row ${side}`);
      const token = element("span", "ranked-token");
      writeToken(token, entry);
      const number = element("span", "meter-value", signed(z));
      number.dataset.value = String(z);
      item.append(token, meter(Math.abs(z) / top), number);
      list.append(item);
    }
    parts.push(element("h4", "", `${sign} ${side}`), list);
  }
  return panel("What it promotes", note, parts, { testid: "direct" });
}

// Three digits: effects are known to no more.
export function three(value) {
  return short(Number(value.toPrecision(3)));
}

export function signed(value) {
  return `${value < 0 ? "\u2212" : "+"}${three(Math.abs(value))}`;
}
