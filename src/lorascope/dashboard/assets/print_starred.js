// Prints the starred features, each as in its view and on pages of its own.
import { starred } from "./annotations.js";
import { feature } from "./data.js";
import { drawFeature } from "./feature_view.js";
import { element } from "./format.js";
import { nameOf } from "./labels.js";

const sheets = document.getElementById("sheets");

// Opens the print dialog. Returns how many features are printed.
export async function printStarred() {
  const ids = starred();
  const parts = [];
  for (const id of ids) {
    const sheet = element("section", "sheet");
    sheet.dataset.testid = "sheet";
    const name = nameOf(id);
    sheet.append(element("h2", "", `Feature ${id}${name ? `: ${name}` : ""}`));
    try {
      const { parts: drawn, later } = drawFeature(await feature(id));
      sheet.append(...drawn);
      later();
    } catch (error) {
      sheet.append(element("p", "message", `Feature ${id} cannot be shown. ${error.message}`));
    }
    parts.push(sheet);
  }
  if (!ids.length) return 0;
  sheets.replaceChildren(...parts);
  document.body.classList.add("printing-starred");
  print();
  return ids.length;
}

addEventListener("afterprint", () => {
  document.body.classList.remove("printing-starred");
  sheets.replaceChildren();
});
