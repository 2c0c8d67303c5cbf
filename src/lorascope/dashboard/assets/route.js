// The address: #/feature/123, #/text/5, #/map, each with what is filtered or painted after "?".
const written = new Set(); // addresses that were set here, whose events say nothing new
let timer = 0;
let follow = () => {};

// Returns what the address names; `query` is undefined where it says nothing after "?".
export function address() {
  const link = /^#\/(feature|text|map)(?:\/([^?]*))?(?:\?(.*))?$/.exec(location.hash);
  if (!link) return { view: "feature", word: undefined, query: undefined };
  return { view: link[1], word: link[2] === undefined ? undefined : decode(link[2]), query: link[3] };
}

// Makes a new entry for the browser's back button.
export function push(view, word, query = "") {
  clearTimeout(timer);
  write(view, word, query, (text) => location.assign(text));
}

// Changes the address in place. Browsers refuse hundreds of changes, so a held key makes one.
export function amend(view, word, query = "") {
  clearTimeout(timer);
  timer = setTimeout(() => write(view, word, query, (text) => location.replace(text)), 150);
}

// Calls `action` when people change the address: links, the back button, their own typing.
export function onRoute(action) {
  follow = action;
}

function write(view, word, query, set) {
  const before = location.href;
  const path = word === undefined ? view : `${view}/${encodeURIComponent(word)}`;
  set(`#/${path}${query ? `?${query}` : ""}`);
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
  // Ours come late: by then a quick reader may be at the next feature, and must stay there.
  if (written.delete(event.newURL)) return;
  clearTimeout(timer);
  follow();
});
