// What is shown, and how people move between features, texts and the map.
import { column, core, feature, featureNow, prefetch } from "./data.js";
import { drawFeature, drawMessage } from "./detail.js";
import { clearFilters, filters, onList, query, refill, setFilters } from "./finder.js";
import { openHelp, setKeys } from "./keys.js";
import { listed, mark, onChoose, place, redraw } from "./list.js";
import { hasMap, mapImage, onOpen, showMap } from "./map.js";
import { onNotes } from "./notes.js";
import { showNoText, showText } from "./reader.js";
import { address, amend, onRoute, push } from "./route.js";
import { saveDrawing, saveFile, saveTable } from "./saves.js";
import { element, whole } from "./text.js";
import { firstText, markText, nTexts } from "./texts.js";
import { switchTheme } from "./theme.js";
import { hideTip, watchTokens } from "./tip.js";
import { editLabel, editNote, showWords, toggleStar } from "./words.js";

const byId = (id) => document.getElementById(id);
const [detail, heading, count] = [byId("detail"), byId("heading"), byId("count")];
const [previous, next, number] = [byId("previous"), byId("next"), byId("number")];

let view = "feature";
let current = -1; // feature that is shown, -1 while a message is
let text = -1; // text that is shown
let isListed = false; // whether the list was ever filled
let wanted = 0; // number of the latest request, so that a late answer is dropped

async function show(id) {
  hideTip();
  current = id;
  title(`Feature ${id}`, `feature ${id}`);
  number.value = id;
  mark(id);
  drawPlace();
  showWords(id);
  const request = ++wanted;
  let drawn;
  try {
    drawn = drawFeature(featureNow(id) ?? (await feature(id)));
  } catch (error) {
    const said = `Feature ${id} cannot be shown. ${error.message}`;
    drawn = { parts: [drawMessage(said, "damaged")], later: () => {} };
  }
  if (request !== wanted) return;
  detail.replaceChildren(...drawn.parts);
  detail.dataset.feature = id;
  // The next frame shows what people came for; the rest of the page follows in the frame after.
  requestAnimationFrame(() => setTimeout(() => {
    if (request !== wanted) return;
    drawn.later();
    detail.dataset.whole = id;
    const at = place(id);
    if (at < 0) return;
    prefetch(listed()[at + 1]);
    prefetch(listed()[at - 1]);
  }));
}

function showMessage(head, said) {
  hideTip();
  wanted++;
  current = -1;
  title(head);
  mark(-1);
  drawPlace();
  showWords(-1);
  detail.replaceChildren(drawMessage(said));
  delete detail.dataset.feature;
}

function title(head, short = "") {
  heading.textContent = head;
  document.title = short ? `${core.title}: ${short}` : core.title;
}

function drawPlace() {
  const at = place(current);
  if (at >= 0) count.textContent = `feature ${whole(at + 1)} of ${whole(listed().length)}`;
  else if (current >= 0) count.textContent = "hidden from the list by its filters";
  else count.textContent = "";
  const n = listed().length;
  previous.disabled = at < 0 ? !n : at === 0;
  next.disabled = at < 0 ? !n : at === n - 1;
}

function showView(name) {
  view = name;
  document.body.dataset.view = name;
  for (const tab of document.querySelectorAll("[data-tab]")) {
    if (tab.dataset.tab === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

// Shows what the address names; without a name the first feature, or the one that was shown.
async function showAddress() {
  const { view: name, word, query: asked } = address();
  hideTip();
  if (name === "text" && nTexts) {
    if (!isListed) setFilters("");
    isListed = true;
    return openText(word, asked);
  }
  if (asked !== undefined || !isListed) setFilters(asked, isListed && word === undefined);
  isListed = true;
  if (name === "map" && hasMap) return openMap();
  const back = view !== "feature";
  showView("feature");
  if (word !== undefined) {
    await open(word, back);
    if (asked === undefined && query()) amend("feature", word, query());
    return undefined;
  }
  if (back && current >= 0) return open(String(current), true);
  return listed().length ? show(listed()[0]) : showEmpty();
}

async function open(word, anew = false) {
  const id = /^\d{1,15}$/.test(word) ? Number(word) : -1;
  if (id >= 0 && id < core.n_features) return id === current && !anew ? undefined : show(id);
  const known = core.n_features ? `features 0 to ${whole(core.n_features - 1)}` : "no features";
  const said = `There is no feature ${word.slice(0, 40)}. This page has ${known}.`;
  return showMessage("Not found", said);
}

async function openText(word, asked) {
  showView("text");
  const rollout = word === undefined || word === "" ? column.kept_rollout[firstText()] : Number(word);
  const found = column.kept_rollout.indexOf(rollout);
  text = found;
  const at = ++wanted;
  title(found < 0 ? "Not found" : `Rollout ${whole(rollout)}`, found < 0 ? "" : `text ${rollout}`);
  count.textContent = "";
  markText(found);
  if (found < 0) {
    const name = String(word ?? "").slice(0, 40);
    return showNoText(`Rollout ${name} is not kept whole in this page. Choose one from the list.`);
  }
  try {
    await showText(found, asked);
  } catch (error) {
    if (at === wanted) showNoText(`This text cannot be shown. ${error.message}`);
  }
  return undefined;
}

function openMap() {
  wanted++;
  showView("map");
  title("Map of features", "map");
  count.textContent = `${whole(listed().length)} features in the list are in colour`;
  showMap(current);
}

function showEmpty() {
  const alive = column.n_examples.some((n) => n > 0);
  const only = query() === "full=1" || query() === "dead=1&full=1";
  const said = alive && core.n_features
    ? only
      ? `No feature has all ${core.top_k} examples. ` +
        "Clear \u201conly full examples\u201d to see the others."
      : "No feature passes the search and the filters. Clear them to see the others."
    : core.n_features
      ? `None of the ${whole(core.n_features)} features has an example: ` +
        "no feature fires on these texts."
      : "This page has no features.";
  showMessage("Nothing to show", said);
}

// Goes to a feature, and makes a new entry for the browser's back button.
function jump(word) {
  const back = view !== "feature";
  showView("feature");
  open(String(word), back);
  push("feature", word, query());
}

// Goes to a neighbour, without an entry.
function glide(id) {
  show(id);
  amend("feature", id, query());
}

function step(by) {
  if (view === "text") return stepText(by);
  if (view === "map") return undefined;
  const order = listed();
  const at = place(current);
  if (at >= 0) {
    if (at + by >= 0 && at + by < order.length) glide(order[at + by]);
  } else if (order.length) {
    // From a feature that the filters hide to its neighbour by number; from a message to an end.
    const ids = [...order].sort((a, b) => a - b);
    const near = by > 0 ? ids.find((id) => id > current) : ids.findLast((id) => id < current);
    glide(near ?? (by > 0 && current < 0 ? ids[0] : ids[ids.length - 1]));
  }
  return undefined;
}

function stepText(by) {
  const order = [...document.querySelectorAll("#texts a")].map((link) => Number(link.dataset.text));
  const to = order[order.indexOf(text) + by];
  if (to === undefined) return;
  push("text", column.kept_rollout[to]);
  openText(String(column.kept_rollout[to]));
}

// After a filter changes, stays where it is if it can; else goes to the next feature in the list.
function relisted(moves) {
  if (!moves && (current >= 0 || view !== "feature" || !isListed)) {
    if (view === "feature" && current >= 0) {
      mark(current);
      drawPlace();
    } else if (view === "map") openMap();
    return undefined;
  }
  if (view === "map") {
    amend("map", undefined, query());
    return openMap();
  }
  const order = listed();
  if (!order.length) {
    showEmpty();
    return amend("feature", undefined, query());
  }
  if (place(current) >= 0) {
    mark(current);
    drawPlace();
    return amend("feature", current, query());
  }
  return glide(order.find((id) => id >= current) ?? order[0]);
}

function drawHeader() {
  for (const [label, value, note] of core.facts) {
    const fact = element("div", "fact");
    fact.title = note;
    const meaning = element("dd", "fact-note", note);
    fact.append(element("dt", "", label), element("dd", "", value), meaning);
    byId("facts").append(fact);
  }
  byId("about").open = matchMedia("(min-width: 821px)").matches;
  document.querySelector("[data-tab=text]").hidden = !nTexts;
  document.querySelector("[data-tab=map]").hidden = !hasMap;
}

const focusOn = (id) => () => {
  if (view === "text" && id === "query") return byId("text-query").focus();
  byId(id).focus();
  return byId(id).select();
};

setKeys([
  ["ArrowLeft", "\u2190", "previous feature or text", () => step(-1)],
  ["ArrowRight", "\u2192", "next feature or text", () => step(1)],
  ["/", "/", "search", focusOn("query")],
  ["g", "G", "go to a feature by its number", focusOn("number")],
  ["f", "F", "features", () => location.assign("#/feature")],
  ["m", "M", "map", () => hasMap && location.assign("#/map")],
  ["t", "T", "texts", () => nTexts && location.assign("#/text")],
  ["s", "S", "star the feature", () => view === "feature" && toggleStar()],
  ["l", "L", "label the feature", () => view === "feature" && editLabel()],
  ["n", "N", "write a note on the feature", () => view === "feature" && editNote()],
  ["c", "C", "clear search and filters", clearFilters],
  ["d", "D", "light or dark colours", switchTheme],
  ["?", "?", "this help", openHelp],
]);

drawHeader();
onChoose(jump);
onOpen(jump);
onList(relisted);
onRoute(showAddress);
onNotes((id) => {
  redraw();
  if (id < 0 || filters().mark) refill(id < 0);
});
watchTokens(detail);
previous.addEventListener("click", () => step(-1));
next.addEventListener("click", () => step(1));
byId("help-button").addEventListener("click", openHelp);
byId("save-table").addEventListener("click", () => saveTable(listed()));
byId("goto").addEventListener("submit", (event) => {
  event.preventDefault();
  const word = number.value.trim().replace(/^#/, "");
  if (word) jump(word);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  heading.focus();
});
byId("browse").addEventListener("click", (event) => {
  const opened = document.body.classList.toggle("browsing");
  event.currentTarget.setAttribute("aria-expanded", String(opened));
  mark(current);
});
addEventListener("click", (event) => {
  const button = event.target.closest?.("[data-save]");
  if (!button) return;
  if (button.dataset.save === "map") mapImage().then((image) => saveFile("map.png", image));
  else saveDrawing(button.closest("figure").querySelector("svg"), button.dataset.save);
});

showAddress().then(() =>
  requestAnimationFrame(() => {
    performance.mark("first-feature");
    document.documentElement.dataset.ready = "true";
  }),
);
