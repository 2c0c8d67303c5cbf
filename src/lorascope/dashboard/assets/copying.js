// Copies tables as Markdown or TSV, and drawings as SVG; saves files.
import { button, element } from "./format.js";

const SHOWN = 1500; // milliseconds for which a button says that it has copied
const SIGNS = { "\n": "\u21b5", "\t": "\u21e5", "\r": "\u240d" };
const PAINT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "font-size", "font-family",
  "text-anchor", "opacity"];
const MARGIN = 2; // around a drawing, in SVG units
const FORMATS = { Markdown: toMarkdown, TSV: toTsv };

// Returns a menu that copies. `rows` returns lists of cells, the names of the columns first; `file`
// is the name of the drawing that `owner` contains, "" for none.
export function copyMenu(title, owner, rows, file = "") {
  const summary = element("summary", "", "Copy", { "aria-label": `Copy \u201c${title}\u201d` });
  const list = element("div", "copy-list");
  const menu = element("details", "copy-menu", [summary, list]);
  const add = (text, action, testid = "") => list.append(button(text, async () => {
    const done = await action();
    menu.open = false;
    summary.textContent = done;
    setTimeout(() => (summary.textContent = "Copy"), SHOWN);
    summary.focus();
  }, { "data-testid": testid }));
  for (const [name, write] of rows ? Object.entries(FORMATS) : []) {
    add(`Copy as ${name}`, () => copyText(write(rows())));
  }
  if (file) {
    const drawing = () => svgText(owner.querySelector("svg"));
    add("Copy as SVG", () => copyText(drawing()));
    add("Save as SVG", () => {
      saveFile(`${file}.svg`, drawing(), "image/svg+xml");
      return "Saved";
    }, "save-svg");
  }
  menu.addEventListener("focusout", (event) => {
    if (!menu.contains(event.relatedTarget)) menu.open = false;
  });
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !menu.open) return;
    event.stopPropagation();
    menu.open = false;
    summary.focus();
  });
  return menu;
}

// Copies a text, and returns what to say then. Old browsers copy only what is selected.
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied";
  } catch {
    const area = element("textarea", "", text);
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    return isCopied ? "Copied" : "Not allowed";
  }
}

// Returns rows as a Markdown table in which text is no markup.
function toMarkdown(rows) {
  const lines = rows.map((row) => row.map(markdownCell));
  lines.splice(1, 0, rows[0].map(() => "---"));
  return `${lines.map((cells) => `| ${cells.join(" | ")} |`).join("\n")}\n`;
}

// Returns rows as lines of cells between tabs. A spreadsheet runs no text of it.
function toTsv(rows) {
  const cell = (value) => {
    const text = oneLine(value);
    return typeof value === "string" && /^\s*[=+\-@]/.test(text) ? `'${text}` : text;
  };
  return rows.map((row) => `${row.map(cell).join("\t")}\n`).join("");
}

function markdownCell(value) {
  return oneLine(value).replace(/[\\`*_[\]<>#|~$&!]/g, "\\$&");
}

function oneLine(value) {
  const known = typeof value === "number" && Number.isNaN(value) ? "" : String(value ?? "");
  return known.replace(/[\n\t\r]/g, (sign) => SIGNS[sign]);
}

// Downloads a file.
export function saveFile(name, content, type) {
  const link = document.createElement("a");
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Returns a drawing as SVG, with its colours on the page, and all of it inside its frame.
function svgText(drawing) {
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
  const [, , width, height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  const box = drawing.getBBox(); // ends of text may stand out
  const [left, top] = [Math.min(0, box.x) - MARGIN, Math.min(0, box.y) - MARGIN];
  const right = Math.max(width, box.x + box.width) + MARGIN;
  const bottom = Math.max(height, box.y + box.height) + MARGIN;
  copy.setAttribute("viewBox", [left, top, right - left, bottom - top].join(" "));
  copy.setAttribute("width", 2 * (right - left));
  copy.setAttribute("height", 2 * (bottom - top));
  return new XMLSerializer().serializeToString(copy);
}
