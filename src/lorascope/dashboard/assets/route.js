// The address: #/overview, #/feature/123, #/rollout/5 or #/map, the last three with filters or
// highlights after "?".
const written = new Set(); // addresses set by this page, whose events are ignored
let timer = 0;
let follow = () => {};

// Returns { view, name, query } of the address. `name` and `query` are undefined if not given.
export function address() {
  const link = /^#\/(overview|feature|rollout|map)(?:\/([^?]*))?(?:\?(.*))?$/.exec(location.hash);
  if (!link) return { view: "overview", name: undefined, query: undefined };
  const [, view, name, query] = link;
  return { view, name: name && decode(name), query };
}

// Sets the address with a new entry for the browser's back button.
export function push(view, name, query = "") {
  clearTimeout(timer);
  write(view, name, query, (text) => location.assign(text));
}

// Sets the address without a new entry. Browsers refuse hundreds of changes, so a key that is held
// down makes only one.
export function amend(view, name, query = "") {
  clearTimeout(timer);
  timer = setTimeout(() => write(view, name, query, (text) => location.replace(text)), 150);
}

// Calls `action` when the user changes the address: by a link, the back button or typing.
export function onRoute(action) {
  follow = action;
}

function write(view, name, query, set) {
  const before = location.href;
  const path = name === undefined ? view : `${view}/${encodeURIComponent(name)}`;
  const hash = `#/${path}${query ? `?${query}` : ""}`;
  set(before.replace(/#.*|$/, () => hash)); // in full: a notebook's frame has the base of its owner
  if (location.href !== before) written.add(location.href);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

addEventListener("hashchange", (event) => {
  // The event of a change made here comes late: the user may already be at the next feature.
  if (written.delete(event.newURL)) return;
  clearTimeout(timer);
  follow();
});

// In a notebook's frame a link to "#..." would leave the page for its owner.
addEventListener("click", (event) => {
  const link = event.target.closest?.("a[href^='#']");
  if (!link || location.protocol !== "about:") return;
  event.preventDefault();
  location.hash = link.getAttribute("href");
});
