// Files to download: the table as CSV, figures as SVG, the map as PNG, labels as JSON.
import { column, core, hasExample } from "./data.js";
import { isStarred, labelOf, noteOf } from "./annotations.js";
import { authorOf, categoryOf, givenName, hasLabels, kindOf, labelScore } from "./labels.js";
import { density, mainRole, mainSite } from "./stats.js";

const PAINT = ["fill", "stroke", "font-size", "font-family", "text-anchor", "opacity"];

// Downloads a file.
export function saveFile(name, content, type) {
  const link = document.createElement("a");
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Saves the statistics of the given features, one line each.
export function saveTable(ids) {
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
  };
  const lines = [Object.keys(columns).join(",")];
  for (const id of ids) lines.push(Object.values(columns).map((write) => write(id)).join(","));
  saveFile("features.csv", `${lines.join("\r\n")}\r\n`, "text/csv");
}

// Saves a drawing with its colours on the page.
export function saveDrawing(drawing, name) {
  const copy = drawing.cloneNode(true);
  const nodes = [...drawing.querySelectorAll("*")];
  [...copy.querySelectorAll("*")].forEach((node, i) => {
    const style = getComputedStyle(nodes[i]);
    for (const property of PAINT) node.setAttribute(property, style.getPropertyValue(property));
    for (const name of ["class", "tabindex", "role", "aria-label"]) node.removeAttribute(name);
    if (nodes[i].dataset.tip) {
      const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
      title.textContent = nodes[i].dataset.tip;
      node.append(title);
      node.removeAttribute("data-tip");
    }
  });
  const [, , width, height] = copy.getAttribute("viewBox").split(" ");
  copy.setAttribute("width", 2 * width);
  copy.setAttribute("height", 2 * height);
  saveFile(`${name}.svg`, new XMLSerializer().serializeToString(copy), "image/svg+xml");
}

// Returns text as a CSV cell. A token may be "=cmd()", which a spreadsheet would run, so such text
// gets an apostrophe in front.
function cell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}
