// What is shown, and how people move: address, keys, buttons, filters.
import { column, core, feature, featureNow, prefetch } from "./data.js";
import { drawFeature, drawMessage } from "./detail.js";
import { arrange, listed, mark, onChoose, place } from "./list.js";
import { element, whole } from "./text.js";
import { hideTip, watchTokens } from "./tip.js";

const byId = (id) => document.getElementById(id);
const [detail, heading, count] = [byId("detail"), byId("heading"), byId("count")];
const [previous, next, number] = [byId("previous"), byId("next"), byId("number")];
const [full, dead, sort] = [byId("full"), byId("dead"), byId("sort")];

let current = -1; // feature that is shown, -1 while a message is
let wanted = 0; // number of the latest request, so that a late answer is dropped
let addressTimer = 0;
const written = new Set(); // addresses that were set here, whose events say nothing new

async function show(id) {
  hideTip();
  current = id;
  heading.textContent = `Feature ${id}`;
  document.title = `${core.title}: feature ${id}`;
  number.value = id;
  mark(id);
  drawPlace();
  const request = ++wanted;
  let parts;
  try {
    parts = drawFeature(featureNow(id) ?? (await feature(id)));
  } catch (error) {
    parts = [drawMessage(`Feature ${id} cannot be shown. ${error.message}`, "damaged")];
  }
  if (request !== wanted) return;
  detail.replaceChildren(...parts);
  detail.dataset.feature = id;
  const at = place(id);
  if (at < 0) return;
  prefetch(listed()[at + 1]);
  prefetch(listed()[at - 1]);
}

function showMessage(title, text) {
  hideTip();
  wanted++;
  current = -1;
  heading.textContent = title;
  document.title = core.title;
  mark(-1);
  drawPlace();
  detail.replaceChildren(drawMessage(text));
  delete detail.dataset.feature;
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

// Shows what the address names: #/feature/123, or the first feature when it names nothing.
async function showAddress() {
  const link = /^#\/feature\/(.*)$/.exec(location.hash);
  if (link) return open(decode(link[1]));
  return listed().length ? show(listed()[0]) : showEmpty();
}

async function open(word) {
  const id = /^\d{1,15}$/.test(word) ? Number(word) : -1;
  if (id >= 0 && id < core.n_features) return id === current ? undefined : show(id);
  const known = core.n_features ? `features 0 to ${whole(core.n_features - 1)}` : "no features";
  const text = `There is no feature ${word.slice(0, 40)}. This page has ${known}.`;
  return showMessage("Not found", text);
}

function showEmpty() {
  const alive = column.n_examples.some((n) => n > 0);
  const text = alive
    ? `No feature has all ${core.top_k} examples. ` +
      "Clear \u201conly full examples\u201d to see the others."
    : core.n_features
      ? `None of the ${whole(core.n_features)} features has an example: ` +
        "no feature fires on these texts."
      : "This page has no features.";
  showMessage("Nothing to show", text);
}

// Goes to a feature, and makes a new entry for the browser's back button.
function jump(word) {
  clearTimeout(addressTimer);
  open(String(word));
  writeAddress(word, (address) => location.assign(address));
}

// Goes to a neighbour. Browsers refuse hundreds of address changes, so a held key makes one.
function glide(id) {
  show(id);
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => writeAddress(id, (address) => location.replace(address)), 150);
}

function writeAddress(word, write) {
  const before = location.href;
  write(`#/feature/${encodeURIComponent(word)}`);
  if (location.href !== before) written.add(location.href);
}

function step(by) {
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
}

function applyFilters() {
  dead.disabled = full.checked;
  arrange({ full: full.checked, dead: dead.checked, sort: sort.value });
  const n = listed().length;
  const hidden = core.n_features - n;
  const note = hidden ? ` (${whole(hidden)} hidden)` : "";
  byId("list-count").textContent = `${whole(n)} feature${n === 1 ? "" : "s"}${note}`;
}

// After a filter changes, stays where it is if it can; else goes to the next feature in the list.
function refilter() {
  applyFilters();
  const order = listed();
  if (!order.length) return showEmpty();
  if (place(current) >= 0) {
    mark(current);
    return drawPlace();
  }
  return glide(order.find((id) => id >= current) ?? order[0]);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function isTyping(target) {
  if (target.isContentEditable || target.matches("textarea, select")) return true;
  return target.matches("input") && !["checkbox", "radio", "button"].includes(target.type);
}

for (const [label, value, note] of core.facts) {
  const fact = element("div", "fact");
  fact.title = note;
  const meaning = element("dd", "fact-note", note);
  fact.append(element("dt", "", label), element("dd", "", value), meaning);
  byId("facts").append(fact);
}
byId("about").open = matchMedia("(min-width: 821px)").matches;
byId("full-count").textContent = core.top_k;

onChoose(jump);
watchTokens(detail);
previous.addEventListener("click", () => step(-1));
next.addEventListener("click", () => step(1));
for (const control of [full, dead, sort]) control.addEventListener("change", refilter);
byId("goto").addEventListener("submit", (event) => {
  event.preventDefault();
  const word = number.value.trim().replace(/^#/, "");
  if (word) jump(word);
});
byId("browse").addEventListener("click", (event) => {
  const open = document.body.classList.toggle("browsing");
  event.currentTarget.setAttribute("aria-expanded", String(open));
  mark(current);
});
addEventListener("hashchange", (event) => {
  // Ours come late: by then a quick reader may be at the next feature, and must stay there.
  if (written.delete(event.newURL)) return;
  clearTimeout(addressTimer);
  showAddress();
});
addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.defaultPrevented || isTyping(event.target)) return;
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  event.preventDefault();
  step(by);
});

applyFilters();
showAddress().then(() =>
  requestAnimationFrame(() => {
    performance.mark("first-feature");
    document.documentElement.dataset.ready = "true";
  }),
);
