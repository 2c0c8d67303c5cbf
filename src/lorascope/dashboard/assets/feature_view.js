// The view of one feature: statistics, examples and figures.
import { column, core, isTemplate } from "./data.js";
import { drawEffects } from "./effects.js";
import { drawExamples, drawSamples, drawSpecials, scaleOf } from "./examples.js";
import { drawFingerprint, drawHistogram, drawPositions, drawRoles } from "./figures.js";
import { drawLabel } from "./labels.js";
import { drawNeighbours, drawRankings } from "./related.js";
import { drawStats } from "./stats.js";
import { element, whole } from "./format.js";

// Returns the nodes that show a feature, and a function that draws the rest a moment later.
export function drawFeature(record) {
  const { id } = record;
  const [main, side] = [element("div", "feature-main"), element("div", "feature-side")];
  const body = element("div", "feature-body", [main, side]);
  const scale = scaleOf(record);
  const specials = record.specials.length ? [drawSpecials(record, scale)] : [];
  if (isTemplate(id)) main.append(...specials);
  if (record.examples.length) {
    main.append(drawExamples(record, scale));
  } else if (!specials.length) {
    const why = column.n_active[id] === 0
      ? `Feature ${id} is dead: it never fires on the tokens that were read.`
      : `This page has no example of feature ${id}.`;
    main.append(drawMessage(why, "no-examples"));
  }
  if (record.histogram.length && column.n_active[id] > 0) side.append(drawHistogram(record));
  const later = () => {
    if (record.samples.length) main.append(drawSamples(record, scale));
    if (!isTemplate(id)) main.append(...specials);
    side.append(...drawSide(record));
    if (!side.childElementCount) body.classList.add("alone");
  };
  const badges = isTemplate(id) ? [drawBadge(id)] : [];
  return { parts: [...drawLabel(record), ...badges, drawStats(id), body], later };
}

function drawBadge(id) {
  const n = column.n_special[id];
  const all = n + Math.max(0, column.n_active[id]);
  return element("p", "template-note", [element("span", "badge", "template feature"),
    `${whole(n)} of its ${whole(all)} firings are at special tokens and template headers.`],
  { "data-testid": "template" });
}

export function drawMessage(text, testid = "message") {
  return element("p", "message", text, { "data-testid": testid });
}

function drawSide(record) {
  const fires = column.n_active[record.id] > 0;
  const parts = drawEffects(record);
  if (core.sites && record.shares.some((share) => share > 0)) parts.push(drawFingerprint(record));
  parts.push(...drawRankings(record));
  if (record.byRole.some((n) => n > 0)) parts.push(drawRoles(record));
  if (fires && record.byPosition.some((n) => n > 0)) parts.push(drawPositions(record));
  parts.push(...drawNeighbours(record));
  return parts;
}
