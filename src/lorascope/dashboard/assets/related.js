// What belongs to a feature: tokens by four rankings, and features beside it.
import { column } from "./data.js";
import { meter, panel } from "./figures.js";
import { labelOf } from "./notes.js";
import { element, percent, short, writeToken } from "./text.js";

const RANKED = [
  ["mean", "Strongest on", "tokens by the mean of its activation on them", short],
  ["lift", "Specific to", "tokens by how many times as often as elsewhere it fires on them",
    (score) => `${short(score)}\u00d7`],
  ["before", "Comes after", "tokens right before those it fires on, by their share", percent],
  ["after", "Comes before", "tokens right after those it fires on, by their share", percent],
];

// Returns a panel for each ranking of tokens that is known.
export function drawRankings({ ranked }) {
  return RANKED.filter(([name]) => ranked[name].length).map(([name, title, note, write]) => {
    const list = element("ol", "ranked");
    const top = Math.max(...ranked[name].map(([, score]) => score)) || 1;
    for (const [entry, score] of ranked[name]) {
      const item = element("li", "meter-row");
      const token = element("span", "ranked-token");
      writeToken(token, entry);
      const number = element("span", "meter-value", write(three(score)));
      number.dataset.value = String(score);
      item.append(token, meter(score / top), number);
      list.append(item);
    }
    return panel(title, note, list, { testid: `ranked-${name}` });
  });
}

// Returns a panel of links to the features that are near in the dictionary or in time.
export function drawNeighbours({ near, beside }) {
  const kinds = [
    [near, "Similar features", "cosine of decoder rows", "similar", (score) => short(three(score))],
    [beside, "Fire together", "share of their tokens that both fire on (Jaccard index)", "beside",
      (score) => percent(three(score))],
  ];
  return kinds.filter(([pairs]) => pairs.length).map(([pairs, title, note, testid, write]) => {
    const list = element("ul", "ranked");
    for (const [id, score] of pairs) {
      const item = element("li");
      const link = drawLink(id);
      const number = element("span", "meter-value", write(score));
      number.dataset.value = String(score);
      link.append(number);
      item.append(link);
      list.append(item);
    }
    return panel(title, note, list, { testid });
  });
}

// Returns a link to a feature: its number, and its label or its strongest token.
export function drawLink(id) {
  const link = element("a", "feature-link");
  link.href = `#/feature/${id}`;
  link.dataset.feature = id;
  link.append(element("span", "link-id", String(id)), drawName(id));
  return link;
}

// Returns what a feature is called where there is room for a few words.
export function drawName(id) {
  const label = labelOf(id);
  if (label) return element("span", "name", label);
  const token = element("span", "ranked-token");
  if (column.n_examples[id]) writeToken(token, column.top_token[id]);
  return token;
}

// Scores are written to 8 bits, so no more than three digits of them mean anything.
function three(score) {
  return Number(score.toPrecision(3));
}

