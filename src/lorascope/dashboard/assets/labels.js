// Labels that come with the page (labels.json): each feature in words, and what its label scores.
import { labelOf } from "./annotations.js";
import { column, core } from "./data.js";
import { drawFacts } from "./figures.js";
import { element, percent } from "./format.js";

export const hasLabels = core.labels !== null;

// Returns the name of a feature: the user's label, or else the page's; "" if it has neither.
export function nameOf(id) {
  return labelOf(id) || givenName(id);
}

// Returns the page's label of a feature, "" if it has none.
export function givenName(id) {
  return core.labels?.names[id] ?? "";
}

// Returns what the label looks at, "" without a label.
export function kindOf(id) {
  return hasLabels && column.label_kind[id] ? core.labels.kinds[column.label_kind[id] - 1] : "";
}

export function categoryOf(id) {
  return hasLabels && column.label_kind[id] ? core.labels.categories[column.label_category[id]] : "";
}

export function authorOf(id) {
  return hasLabels && column.label_kind[id] ? core.labels.authors[column.label_author[id]] : "";
}

// Returns a score of a label, NaN if it has none.
export function labelScore(id, name = "balanced_accuracy") {
  return hasLabels ? column[`label_${name}`][id] : NaN;
}

// Returns the score of a label as text, "" if it has none.
export function scoreText(id) {
  const score = labelScore(id);
  return Number.isNaN(score) ? "" : score.toFixed(2);
}

// Returns the nodes that show a feature's label: its sentence, its score and why to believe it.
export function drawLabel(record) {
  if (!hasLabels) return [];
  const { id } = record;
  const draw = (parts) => [element("section", "label-card", parts, { "data-testid": "label-card" })];
  if (!givenName(id)) {
    return draw(element("p", "label-score", "This feature has no label in the page."));
  }
  const facts = WHY.filter(([, name]) => !Number.isNaN(labelScore(id, name)));
  return draw([
    element("p", "label-sentence", record.sentence, { "data-testid": "label-sentence" }),
    element("p", "label-score",
      [kindOf(id) === "unclear" && element("span", "badge", "unclear"), summary(id)],
      { "data-testid": "label-score" }),
    facts.length && drawWhy(id, facts),
  ]);
}

function summary(id) {
  if (authorOf(id) === "person") return "Written by a person. Nobody measured how well it fits.";
  const judge = core.labels.judges[column.label_judge[id]];
  const tested = judge && (judge === authorOf(id) ? ", tested by itself" : `, tested by ${judge}`);
  const author = authorOf(id) === "rule" ? "A rule" : `Written by ${authorOf(id)}${tested}`;
  if (Number.isNaN(labelScore(id))) return `${author}. It does not fire on the held-out texts.`;
  const [low, high] = [labelScore(id, "low"), labelScore(id, "high")].map((edge) => edge.toFixed(2));
  const wrong = labelScore(id, "shuffled");
  const control = Number.isNaN(wrong) ? "" : `, labels of other features ${wrong.toFixed(2)}`;
  return `${author}. Balanced accuracy ${scoreText(id)} (${low} to ${high}) on held-out texts; ` +
    `chance is 0.50${control}.`;
}

const WHY = [
  ["recall", "recall", "share of its firings that the label covers"],
  ["precision", "precision", "share of the covered tokens at which it fires"],
  ["same token", "same_token", "balanced accuracy among tokens of the same text; 50 % is chance"],
  ["neighbours", "near",
    "balanced accuracy among tokens at which similar features fire; 50 % is chance"],
  ["clarity", "clarity",
    "how much more often a covered token has the larger value than the smaller; 0 % is chance"],
  ["purity", "purity", (id) =>
    `average precision of tokens in order of strength; ${percent(labelScore(id, "covered"))} is chance`],
  ["picks the effect", "picked_effect", (id) => {
    const wrong = labelScore(id, "picked_effect_shuffled");
    return "how often it finds what removing the feature changes, among five removals; 20 % is chance" +
      (Number.isNaN(wrong) ? "" : `, labels of other features ${percent(wrong)}`);
  }],
];

// Returns the interval of a score in brackets, "" if it has none.
function between(id, name) {
  const edges = [`${name}_low`, `${name}_high`].map((key) => column[`label_${key}`]?.[id] ?? NaN);
  return edges.some(Number.isNaN) ? "" : ` (${edges.map((edge) => percent(edge)).join(" to ")})`;
}

function drawWhy(id, facts) {
  return element("details", "label-why", [
    element("summary", "", `Why (${kindOf(id)}, ${categoryOf(id)})`),
    drawFacts(facts.map(([label, name, note]) => [label, name, labelScore(id, name),
      percent(labelScore(id, name)) + between(id, name), typeof note === "string" ? note : note(id)]),
    "label"),
  ]);
}
