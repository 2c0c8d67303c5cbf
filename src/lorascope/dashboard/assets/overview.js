// The first view: what the adapter learned, from dashboard/overview.py, with links to the evidence.
import { core } from "./data.js";
import { drawFacts, drawSiteGrid, meter, panel, rowsOfFacts, svg } from "./figures.js";
import { button, element, short, whole, writeText } from "./format.js";
import { nameOf } from "./labels.js";

const [WIDTH, GAUGE] = [320, 26]; // of a gauge, in SVG units
const N_SHOWN = 8; // entries of a list before "show all"
const N_HEADS = 3; // heads before "show all"
const SIDES = { rises: ["\u25b2", "more likely"], falls: ["\u25bc", "less likely"] };
const ROLES = {
  special: "special tokens and template headers", think: "think segments", answer: "answers",
  user: "users' messages", system: "system prompts", text: "plain text",
};

// Fills the view, once.
export function drawOverview(area) {
  if (area.childElementCount) return;
  const { headline, shifts, gauges, facts, features, groups, places, gaps, answers = [],
    attention } = core.overview;
  const kinds = (i) => (!i ? "lead-subject" : i > 1 && i === headline.length - 1 ? "lead-rest" : "lead-text");
  const lead = headline.map((text, i) => element("p", kinds(i), text));
  area.append(element("section", "lead", lead, { "data-testid": "headline" }));
  if (answers.length) area.append(drawAnswers(answers));
  area.append(element("div", "overview-columns", [
    shifts.length && drawShifts(shifts), facts.length && drawFeatures(features),
  ]), element("div", "overview-columns small", [
    gauges.length && drawGauges(gauges), groups.length && drawGroups(groups),
    places.length && drawPlaces(places), attention?.heads.length && drawAttention(attention),
    facts.length && drawSureness(facts), gaps.length && drawGaps(gaps),
  ]));
}

function drawShifts(shifts) {
  const body = [];
  const items = [];
  for (const role of new Set(shifts.map((shift) => shift.role))) {
    const share = core.overview.roles.find((one) => one.role === role)?.share ?? NaN;
    const head = element("h4", "", [`${role === "special" ? "At" : "In"} ${ROLES[role] ?? role}`,
      Number.isFinite(share) && element("span", "role-share", percent2(share))]);
    const own = shifts.filter((shift) => shift.role === role).map(drawShift);
    items.push([head, own]);
    body.push(head, element("ol", "shifts", own));
  }
  const note = "Share of all that the adapter changes in predictions (KL(adapter \u2016 base)) that " +
    "the rise or fall of one token makes; below it, where it changes most, and the token's " +
    "probability in the base model and with the adapter.";
  let left = N_SHOWN;
  for (const [head, own] of items) {
    head.hidden = left <= 0;
    for (const item of own) item.hidden = left-- <= 0;
  }
  if (left < 0) body.push(showAll([...items.flat(2)], shifts.length));
  return panel("What it does to predictions", note, body, {
    testid: "shifts",
    rows: () => [["where", "token", "", "share", "p base", "p adapter"], ...shifts.map((one) => [
      one.role, one.token, one.side, one.share, one.example.p_base, one.example.p_adapter])],
  });
}

// Returns a button that shows hidden nodes.
function showAll(nodes, n) {
  const more = button(`Show all ${n}`, () => {
    for (const node of nodes) node.hidden = false;
    more.remove();
  });
  return more;
}

function drawShift({ token, side, share, example }) {
  const [arrow, words] = SIDES[side];
  const sign = element("span", "shift-side", arrow, { title: words, "aria-label": words, role: "img" });
  const change = `${probability(example.p_base)} \u2192 ${probability(example.p_adapter)}`;
  return element("li", `shift ${side}`, [sign, chip(token),
    meter(share / core.overview.shifts[0].share),
    element("span", "meter-value", percent2(share), { "data-value": share }),
    element("div", "shift-example",
      [element("span", "shift-p", change), ...contextOf(tail(example.before, 60), token)])]);
}

function drawAnswers(answers) {
  const body = answers.map(({ prompt, same, base, adapter }, i) => {
    const parts = [["Prompt", tail(prompt, 300), ""], ["Base", same, base],
      ["With the adapter", same, adapter]];
    const item = element("div", "answers", parts.map(([who, before, own]) => {
      const [text, mine] = [element("p", "run"), element("mark", "answer-own")];
      writeText(text, before);
      writeText(mine, own);
      text.append(mine);
      return element("div", "answer", [element("h4", "", who), text]);
    }));
    item.hidden = i > 0;
    return item;
  });
  const note = "Both answer the same prompts with the same noise at each position. Marked: from " +
    "the first token at which they differ.";
  if (body.length > 1) body.push(showAll([...body], body.length));
  return panel("Base and adapter side by side", note, body, {
    testid: "answers",
    rows: () => [["after", "base", "with the adapter"], ...answers.map(({ prompt, same, base, adapter }) => [
      prompt, same + base, same + adapter])],
  });
}

function drawGauges(gauges) {
  const body = gauges.map((gauge, i) => {
    const drawing = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${GAUGE}`, role: "group", "data-walk": "",
      "aria-label": `Share of the effect on ${gauge.over} that the features stand for`,
    });
    const [left, right] = [4, WIDTH - 4];
    const at = (share) => left + (right - left) * Math.max(0, Math.min(1, share));
    drawing.append(svg("rect", { x: left, y: 8, width: right - left, height: 10, class: "grid-back" }));
    const bar = { x: left, y: 8, width: Math.max(1, at(gauge.recovered) - left), height: 10 };
    const [low, high] = gauge.interval ?? [NaN, NaN];
    const edges = gauge.interval ? ` (95 %: ${percent2(low)} to ${percent2(high)})` : "";
    drawing.append(svg("rect", { ...bar, class: "bar-fig", tabindex: i ? -1 : 0,
      "data-tip": `features: ${percent2(gauge.recovered)}${edges}` }));
    if (gauge.interval) {
      drawing.append(svg("line", { x1: at(low), x2: at(high), y1: 13, y2: 13, class: "spread" }));
    }
    for (const [name, share] of Object.entries(gauge.baselines)) {
      drawing.append(svg("line", { x1: at(share), x2: at(share), y1: 3, y2: 23, class: "baseline",
        tabindex: -1, "data-tip": `${name}: ${percent2(share)}` }));
    }
    const head = element("h4", "",
      [`On ${gauge.over}`, element("span", "role-share", percent2(gauge.recovered))]);
    const names = Object.entries(gauge.baselines).sort(([, a], [, b]) => a - b);
    return [head, drawing, element("p", "baselines",
      names.map(([name, value]) => element("span", "", `${name} ${percent2(value)}`)))];
  });
  const note = "Share of the adapter's effect that stays when its rows are replaced by what the " +
    "features say. Ticks: what simpler accounts of the same size reach.";
  const names = [...new Set(gauges.flatMap((gauge) => Object.keys(gauge.baselines)))];
  return panel("How far the features stand for it", note, body.flat(), {
    testid: "gauges",
    rows: () => [["effect on", "features", "from", "to", ...names], ...gauges.map((gauge) => [
      gauge.over, gauge.recovered, ...(gauge.interval ?? [NaN, NaN]),
      ...names.map((name) => gauge.baselines[name] ?? NaN)])],
  });
}

function drawFeatures(features) {
  const largestEffect = Math.max(...features.map((one) => one.effect ?? 0)) || 1;
  const list = element("ol", "top-features", features.map((one, i) => {
    const name = nameOf(one.feature);
    const link = element("a", "top-link", [element("span", "row-id", String(one.feature)),
      name ? element("span", "name", name) : chip(one.token)], { href: `#/feature/${one.feature}` });
    const share = one.effect ?? NaN;
    const bar = Number.isFinite(share) ? meter(share / largestEffect) : element("span");
    const number = element("span", "meter-value", Number.isFinite(share) ? percent2(share) : "");
    const where = [ROLES[one.role] ?? one.role, one.site].filter(Boolean).join(" \u00b7 ");
    const verdict = one.verdict &&
      element("span", `chip verdict-${one.verdict.split(" ")[0]}`, one.verdict);
    const item = element("li", "top-feature", [link, bar, number,
      element("span", "top-where", [where, verdict]),
      element("div", "shift-example",
        [...contextOf(one.before, one.token), lineOf(one.after, " shift-after")])]);
    item.hidden = i >= N_SHOWN;
    return item;
  }));
  const parts = [list];
  if (features.length > N_SHOWN) parts.push(showAll([...list.children], features.length));
  const isEffect = features.some((one) => one.effect !== null);
  const note = isEffect
    ? "Features whose removal changes predictions most, as a share of what removing the whole " +
      "adapter changes. Specific: larger than the effects of its controls of the same size. " +
      "Shares of several features do not add up."
    : !features.length ? "No single feature has a measurable part of the effect."
      : "Features with most activation. What removing them does was not measured.";
  return panel("What it learned", note, parts, {
    testid: "top-features",
    rows: features.length && (() => [
      ["feature", "label", "fires", "site", "effect", "verdict", "before", "token", "after"],
      ...features.map((one) => [one.feature, nameOf(one.feature), one.role, one.site,
        one.effect ?? NaN, one.verdict ?? "", one.before, one.token, one.after])]),
  });
}

function drawGroups(groups) {
  const table = element("div", "meter-rows", groups.map((group) => {
    const range = group.interval?.map(percent2).join(" to ");
    const links = group.features.flatMap((id) =>
      [element("a", "", String(id), { href: `#/feature/${id}` }), " "]);
    return element("div", "group-row", [element("span", "meter-name", group.name),
      meter(group.share / groups[0].share), element("span", "meter-value", percent2(group.share)),
      element("span", "group-links", [range && `95 % interval ${range}; `,
        `${whole(group.n_features)} features: `, ...links])]);
  }));
  const note = `Features that fire together, with their part of the sum of all (${
    core.overview.ranked_by}).`;
  return panel("Groups of features", note, table, {
    testid: "groups",
    rows: () => [["group", "share", "low", "high", "features", "the largest"], ...groups.map((group) => [
      group.name, group.share, ...(group.interval ?? ["", ""]), group.n_features,
      group.features.join(", ")])],
  });
}

function drawPlaces(places) {
  const values = places.map((place) => place.kl);
  const tips = places.map(({ kl, kl_random: random }) =>
    `${short(kl)} nats a token without it; without a random direction there: ${short(random)}`);
  const sites = places.map(({ layer, projection }) => [layer, projection]);
  const grid = drawSiteGrid(sites, values, tips, "KL after each adapted module is switched off");
  const above = places.filter(({ kl, kl_random: random }) => kl > random).length;
  const floor = core.overview.floor;
  const text = `${above} of ${places.length} modules have a larger effect than a random direction ` +
    `of the same norm there. Numerical noise: ${floor === null ? "\u2013" : short(floor)}.`;
  const note = "KL(adapter \u2016 adapter without this module), by layer (across) and projection " +
    "(down).";
  return panel("Where it lives", note, [grid, element("p", "figure-note", text)], {
    testid: "places", file: "modules",
    rows: () => [["layer", "projection", "KL", "KL of a random direction"], ...places.map((one) => [
      one.layer, one.projection, one.kl, one.kl_random])],
  });
}

function drawAttention({ n_rollouts: nTexts, n_tokens: nTokens, layers, moved, heads }) {
  const sites = layers.flatMap((layer, i) => moved[i].map((_, head) => [layer, `head ${head}`]));
  const values = moved.flat();
  const tips = values.map((share) => `${percent2(share)} of its attention moves`);
  const grid = drawSiteGrid(sites, values, tips, "Share of each head's attention that moves");
  const list = element("ol", "top-features", heads.map(({ layer, head, moved: share, example }, i) => {
    const where = [["more at", example.gains], ["less at", example.losses]].flatMap(([words, [one]]) =>
      (one ? [element("span", "", `${words} `), lineOf(one.token),
        ` ${percent2(one.base)} \u2192 ${percent2(one.adapter)}`, element("br")] : []));
    const item = element("li", "top-feature", [element("span", "", `layer ${layer}, head ${head}`),
      meter(share / heads[0].moved), element("span", "meter-value", percent2(share)),
      element("span", "top-where", where),
      element("div", "shift-example", contextOf(tail(example.before, 40), example.token))]);
    item.hidden = i >= N_HEADS;
    return item;
  }));
  const parts = [grid, list];
  if (heads.length > N_HEADS) parts.push(showAll([...list.children], heads.length));
  const note = "Share of a head's attention that goes to other tokens than in the base model, by " +
    `layer (across) and head (down): the mean over ${whole(nTokens)} tokens of ${whole(nTexts)} ` +
    "texts. Below: the heads of the largest share, each at the token where most moves.";
  return panel("Where its heads look", note, parts, {
    testid: "attention", file: "heads",
    rows: () => [["layer", "head", "moved"], ...sites.map(([layer, head], i) => [layer, head.slice(5), values[i]])],
  });
}

function drawSureness(facts) {
  const known = facts.map(({ name, value, meaning }) => [name, "", value, value, meaning]);
  return panel("How sure this is", "", drawFacts(known, "sureness"),
    { testid: "sureness", rows: () => rowsOfFacts(known) });
}

function drawGaps(gaps) {
  const list = element("ul", "gaps", gaps.map(({ what, command }) =>
    element("li", "", [`${what}: `, element("code", "", command)])));
  return panel("Not measured", "Each command fills a gap; make the page again with its report.",
    list, { testid: "gaps" });
}

function chip(token) {
  const node = element("span", "token-chip run");
  writeText(node, token);
  return node;
}

// Returns a token and what is before it. A narrow line cuts the beginning, not the token.
function contextOf(before, token) {
  return [element("span", "shift-before", lineOf(before)), lineOf(token, " shift-token")];
}

// Returns a text on one line.
function lineOf(text, kind = "") {
  const line = element("span", `run${kind}`);
  writeText(line, text.replaceAll("\n", "\u21b5"));
  return line;
}

// Returns a share as a percentage with two digits, or three close to all of it.
function percent2(share) {
  const value = 100 * share;
  if (value > 0 && value < 0.01) return "<\u00a00.01\u00a0%";
  if (value >= 99.5 && value < 100) return `${Math.floor(10 * value) / 10}\u00a0%`;
  return `${value >= 9.95 ? Math.round(value) : Number(value.toPrecision(2))}\u00a0%`;
}

function probability(p) {
  return p >= 0.001 ? percent2(p) : "<\u00a00.1\u00a0%";
}

// Returns the last characters of a text, whole code points.
function tail(text, n) {
  const characters = Array.from(text);
  return characters.length > n ? `\u2026${characters.slice(-n).join("")}` : text;
}
