// Decides what is shown, and moves between the overview, features, rollouts and the map.
import { editLabel, editNote, onAnnotations, showAnnotations, toggleStar } from "./annotations.js";
import { column, core, feature, hasExample, prefetch } from "./data.js";
import { saveTable } from "./downloads.js";
import { listIndex, listed, onChoose, redraw, select } from "./feature_list.js";
import { drawFeature, drawMessage } from "./feature_view.js";
import { clearFilters, filters, onList, query, refill, setFilters } from "./filters.js";
import { element, whole } from "./format.js";
import { highlightFound } from "./found.js";
import { openHelp, setKeys } from "./keys.js";
import { nameOf } from "./labels.js";
import { hasMap, onOpen, showMap } from "./map.js";
import { drawOverview } from "./overview.js";
import { firstRollout, listedRollouts, markRollout, nRollouts, onRefilled } from "./rollout_list.js";
import { showNoRollout, showRollout } from "./rollout_view.js";
import { address, amend, onRoute, push } from "./route.js";
import { switchTheme } from "./theme.js";
import { hideTooltip, watchTokens } from "./tooltip.js";

const byId = (id) => document.getElementById(id);
const [featureView, heading, count] = [byId("feature-view"), byId("heading"), byId("count")];
const [previous, next, number] = [byId("previous"), byId("next"), byId("number")];

let view = "feature";
let current = -1; // feature that is shown, -1 while a message is shown
let rollout = -1; // rollout that is shown, by its number in this page
let isListed = false; // whether the list has been filled
let latest = 0; // number of the latest request; answers to earlier ones are dropped

async function show(id) {
  hideTooltip();
  current = id;
  setFeatureTitle(id);
  number.value = id;
  select(id);
  drawPosition();
  showAnnotations(id);
  const request = ++latest;
  let drawn;
  try {
    drawn = drawFeature(await feature(id));
  } catch (error) {
    const message = `Feature ${id} cannot be shown. ${error.message}`;
    drawn = { parts: [drawMessage(message, "damaged")], later: () => {} };
  }
  if (request !== latest) return;
  featureView.replaceChildren(...drawn.parts);
  featureView.dataset.feature = id;
  // The next frame shows what matters most; the rest of the page follows in the frame after it.
  requestAnimationFrame(() => setTimeout(() => {
    if (request !== latest) return;
    drawn.later();
    markFound();
    featureView.dataset.complete = id;
    const at = listIndex(id);
    if (at < 0) return;
    prefetch(listed()[at + 1]);
    prefetch(listed()[at - 1]);
  }));
}

// Marks what was searched for in the texts of the feature that is shown.
function markFound() {
  highlightFound(filters().q, [...featureView.querySelectorAll(".window, .ranked, .label-sentence")]);
}

function showMessage(title, message) {
  hideTooltip();
  latest++;
  current = -1;
  setTitle(title);
  select(-1);
  drawPosition();
  showAnnotations(-1);
  featureView.replaceChildren(drawMessage(message));
  delete featureView.dataset.feature;
}

function setFeatureTitle(id) {
  const name = nameOf(id);
  setTitle(name ? `Feature ${id}: ${name}` : `Feature ${id}`, `feature ${id}`);
}

function setTitle(title, short = "") {
  heading.textContent = title;
  heading.classList.toggle("named", title.length > 24);
  document.title = short ? `${core.title}: ${short}` : core.title;
}

// Shows where the feature is in the list, and enables the buttons that lead on.
function drawPosition() {
  const at = listIndex(current);
  if (at >= 0) count.textContent = `feature ${whole(at + 1)} of ${whole(listed().length)}`;
  else if (current >= 0) count.textContent = "hidden by the filters";
  else count.textContent = "";
  setPager("feature", at, listed().length);
}

// Names the buttons that lead on, and enables those that lead somewhere from place `at` of `n`.
function setPager(what, at, n) {
  previous.disabled = at < 0 ? !n : at === 0;
  next.disabled = at < 0 ? !n : at === n - 1;
  for (const [button, word, key] of [[previous, "previous", "left"], [next, "next", "right"]]) {
    button.setAttribute("aria-label", `${word} ${what}`);
    button.title = `${word} ${what} (${key} arrow key)`;
  }
}

function showView(name) {
  view = name;
  document.body.dataset.view = name;
  for (const tab of document.querySelectorAll("[data-tab]")) {
    if (tab.dataset.tab === name) tab.setAttribute("aria-current", "page");
    else tab.removeAttribute("aria-current");
  }
}

// Shows what the address names. Without a name, shows the last or the first feature.
async function showAddress() {
  const { view: target, name, query: asked } = address();
  hideTooltip();
  scrollTo(0, 0);
  const isOther = target === "overview" || (target === "rollout" && nRollouts > 0);
  if (target === "map" && hasMap) showView("map"); // else a new list would show its first feature
  if (isOther && !isListed) setFilters("");
  else if (!isOther && (asked !== undefined || !isListed)) setFilters(asked, isListed && name === undefined);
  isListed = true;
  if (isOther) return target === "overview" ? openOverview() : openRollout(name, asked);
  if (target === "map" && hasMap) return openMap();
  const isBack = view !== "feature";
  showView("feature");
  if (name !== undefined) {
    await open(name, isBack);
    if (asked === undefined && query()) amend("feature", name, query());
    return undefined;
  }
  if (isBack && current >= 0) return open(String(current), true);
  return listed().length ? show(listed()[0]) : showEmpty();
}

// Shows the feature with this number, or a message. `again` redraws the one that is shown.
async function open(name, again = false) {
  const id = /^\d{1,15}$/.test(name) ? Number(name) : -1;
  if (id >= 0 && id < core.n_features) return id === current && !again ? undefined : show(id);
  const range = core.n_features ? `features 0 to ${whole(core.n_features - 1)}` : "no features";
  const message = `There is no feature ${name.slice(0, 40)}. This page has ${range}.`;
  return showMessage("Not found", message);
}

async function openRollout(name, asked) {
  showView("rollout");
  const isNamed = name !== undefined && name !== "";
  const id = isNamed ? Number(name) : column.kept_rollout[firstRollout()];
  const at = column.kept_rollout.indexOf(id);
  rollout = at;
  const request = ++latest;
  setTitle(at < 0 ? "Not found" : `Rollout ${whole(id)}`, at < 0 ? "" : `rollout ${id}`);
  count.textContent = "";
  markRollout(at);
  pageRollouts();
  if (at < 0) {
    const shown = String(name ?? "").slice(0, 40);
    return showNoRollout(`Rollout ${shown} is not in this page. Choose one from the list.`);
  }
  try {
    await showRollout(at, asked);
  } catch (error) {
    if (request === latest) showNoRollout(`This rollout cannot be shown. ${error.message}`);
  }
  return undefined;
}

function pageRollouts() {
  const order = listedRollouts();
  if (view === "rollout") setPager("rollout", order.indexOf(rollout), order.length);
}

function openOverview() {
  latest++;
  showView("overview");
  setTitle("What the adapter learned");
  count.textContent = "";
  drawOverview(byId("overview"));
}

function openMap() {
  latest++;
  showView("map");
  setTitle("Map of features", "map");
  count.textContent = `${whole(listed().length)} features from the list are coloured`;
  showMap(current);
}

function showEmpty() {
  const isOnlyFull = query() === "full=1" || query() === "dead=1&full=1";
  let message = "No feature matches the search and the filters. Clear them to see all features.";
  if (!core.n_features) message = "This page has no features.";
  else if (!column.n_examples.some((_, id) => hasExample(id))) {
    message = `None of the ${whole(core.n_features)} features has an example: ` +
      "none fires in these rollouts.";
  } else if (isOnlyFull) {
    message = `No feature has all ${core.top_k} examples. Clear that filter to see the others.`;
  }
  showMessage("Nothing to show", message);
}

// Goes to a feature, with a new entry for the browser's back button.
function jump(name) {
  const isBack = view !== "feature";
  showView("feature");
  scrollTo(0, 0);
  open(String(name), isBack);
  push("feature", name, query());
}

// Goes to a feature without a new entry.
function glide(id) {
  show(id);
  amend("feature", id, query());
}

function step(by) {
  if (view === "rollout") return stepRollout(by);
  if (view === "map" || view === "overview") return undefined;
  const order = listed();
  const at = listIndex(current);
  if (at >= 0) {
    if (at + by >= 0 && at + by < order.length) glide(order[at + by]);
  } else if (order.length) {
    // From a hidden feature, go to the next one by number; from a message, to an end of the list.
    const ids = [...order].sort((a, b) => a - b);
    const near = by > 0 ? ids.find((id) => id > current) : ids.findLast((id) => id < current);
    glide(near ?? (by > 0 && current < 0 ? ids[0] : ids[ids.length - 1]));
  }
  return undefined;
}

function stepRollout(by) {
  const order = listedRollouts();
  const at = order.indexOf(rollout);
  const to = at < 0 ? order.at(by > 0 ? 0 : -1) : order[at + by];
  if (to === undefined) return;
  push("rollout", column.kept_rollout[to]);
  openRollout(String(column.kept_rollout[to]));
}

// After the list changes, keeps the feature that is shown if it may; else goes to the next listed.
function onRelisted(moves) {
  markFound();
  if (!moves && (current >= 0 || view !== "feature" || !isListed)) {
    if (view === "feature" && current >= 0) {
      select(current);
      drawPosition();
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
  if (moves === "first") return glide(order[0]);
  if (listIndex(current) >= 0) {
    select(current);
    drawPosition();
    return amend("feature", current, query());
  }
  return glide(order.find((id) => id >= current) ?? order[0]);
}

function drawHeader() {
  byId("facts").append(...core.facts.map(([label, value, note]) => element("div", "fact",
    [element("dt", "", label), element("dd", "", value), element("dd", "fact-note", note)],
    { title: note })));
  byId("about").open = matchMedia("(min-width: 1200px) and (min-height: 800px)").matches;
  document.querySelector("[data-tab=rollout]").hidden = !nRollouts;
  document.querySelector("[data-tab=map]").hidden = !hasMap;
}

const focusOn = (id) => () => {
  if (view === "rollout" && id === "query") return byId("rollout-query").focus();
  byId(id).focus();
  return byId(id).select();
};

setKeys([
  ["ArrowLeft", "\u2190", "previous feature or rollout", () => step(-1)],
  ["ArrowRight", "\u2192", "next feature or rollout", () => step(1)],
  ["/", "/", "search", focusOn("query")],
  ["g", "G", "go to a feature by its number", focusOn("number")],
  ["o", "O", "overview", () => (location.hash = "#/overview")],
  ["f", "F", "features", () => (location.hash = "#/feature")],
  ["m", "M", "map", () => hasMap && (location.hash = "#/map")],
  ["t", "T", "rollouts", () => nRollouts && (location.hash = "#/rollout")],
  ["s", "S", "star the feature", () => view === "feature" && toggleStar()],
  ["l", "L", "label the feature", () => view === "feature" && editLabel()],
  ["n", "N", "write a note about the feature", () => view === "feature" && editNote()],
  ["c", "C", "clear the search and the filters", clearFilters],
  ["d", "D", "switch between light and dark colours", switchTheme],
  ["?", "?", "open this help", openHelp],
]);

drawHeader();
onChoose(jump);
onOpen(jump);
onList(onRelisted);
onRefilled(pageRollouts);
onRoute(showAddress);
onAnnotations((id) => {
  redraw();
  if (view === "feature" && current >= 0) setFeatureTitle(current);
  if (id < 0 || filters().mark) refill(id < 0);
});
watchTokens(featureView);
watchTokens(byId("overview"));
previous.addEventListener("click", () => step(-1));
next.addEventListener("click", () => step(1));
byId("help-button").addEventListener("click", openHelp);
byId("save-table").addEventListener("click", () => saveTable(listed()));
byId("goto").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = number.value.trim().replace(/^#/, "");
  if (name) jump(name);
});
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  heading.focus();
});
byId("browse").addEventListener("click", (event) => {
  const opened = document.body.classList.toggle("browsing");
  event.currentTarget.setAttribute("aria-expanded", String(opened));
  select(current);
});

showAddress().then(() =>
  requestAnimationFrame(() => {
    performance.mark("first-feature");
    document.documentElement.dataset.ready = "true";
  }),
);
