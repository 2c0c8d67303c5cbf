"""A reimplementation of the published page from its description, as a baseline.

One HTML file that holds the features JSON as it is, a number box, a select box with every feature,
buttons and arrow keys, and a filter for features with all examples. Showing a feature rewrites its
examples, with each token on a red that grows with its share of the example's largest value. Where
the description is silent, this does the simplest thing: the JSON is one object of the script, and
examples are written as escaped HTML.
"""

import json
from pathlib import Path

_PAGE = """<!DOCTYPE html>
<html><head><meta charset="utf-8"><title>SAE features</title><style>
body { font-family: sans-serif; margin: 20px; }
.example { border: 1px solid #ccc; margin: 8px 0; padding: 8px; }
.token { white-space: pre-wrap; }
.target { outline: 2px solid black; }
</style></head><body>
<div><button id="previous">previous</button> <input id="number" type="number">
<select id="choice"></select> <button id="next">next</button>
<label><input id="full" type="checkbox"> only full examples</label></div>
<div id="shown"></div>
<script>
const data = DATA;
const byId = (id) => document.getElementById(id);
let ids = [];
let at = 0;
function list() {
  ids = Object.keys(data.features).filter((id) => {
    const n = data.features[id].examples.length;
    return byId("full").checked ? n === data.metadata.top_k : n > 0;
  });
  byId("choice").replaceChildren(...ids.map((id) => new Option(`Feature ${id}`, id)));
}
function escaped(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
function show() {
  const id = ids[at];
  const { examples, stats } = data.features[id];
  let html = `<h2>Feature ${id}</h2><p>${stats.n_examples} examples</p>`;
  for (const example of examples) {
    const largest = Math.max(...example.activations);
    html += `<div class="example"><b>${example.activation_value.toFixed(3)}</b>
      rollout ${example.rollout_idx}, token ${example.token_idx}<br>`;
    example.tokens.forEach((token, i) => {
      const share = Math.max(0, example.activations[i] / largest);
      const mark = i === example.target_position ? " target" : "";
      html += `<span class="token${mark}" style="background: rgba(255, 0, 0, ${share})"
        title="${example.activations[i].toFixed(3)}">${escaped(token)}</span>`;
    });
    html += "</div>";
  }
  byId("shown").innerHTML = html;
  byId("shown").dataset.feature = id;
  byId("choice").value = id;
  byId("number").value = id;
}
function step(by) {
  at = Math.min(Math.max(at + by, 0), ids.length - 1);
  show();
}
byId("previous").onclick = () => step(-1);
byId("next").onclick = () => step(1);
byId("choice").onchange = () => { at = byId("choice").selectedIndex; show(); };
byId("number").onchange = () => { at = Math.max(0, ids.indexOf(byId("number").value)); show(); };
byId("full").onchange = () => { list(); at = 0; show(); };
document.onkeydown = (event) => {
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
};
list();
show();
</script></body></html>
"""


def write_page(features: Path, page: Path) -> None:
    """Write the page of a features JSON in the published schema."""
    with features.open(encoding="utf-8") as file:
        data = json.load(file)
    before, after = _PAGE.split("DATA", 1)
    page.write_text(before + json.dumps(data) + after, encoding="utf-8")
