// Keys, and the help overlay with its glossary. Keys do nothing while people type.
import { element } from "./format.js";

const help = document.getElementById("help");
const actions = new Map(); // key -> function

// Keys that other modules handle, for the list.
const OTHER_KEYS = [
  ["\u2191 \u2193 Page Home End", "in the list: go to another feature"],
  ["Tab, then \u2190 \u2192 Home End", "in a window or figure: move between parts and read their values"],
  ["\u2190 \u2192 \u2191 \u2193 + \u2212 0 Enter", "on the map: move, zoom, reset, open a feature"],
  ["Esc", "close this help, or leave a field"],
];

// Takes `[key, name of the key for people, what it does, function]` for every key.
export function setKeys(keys) {
  const list = document.getElementById("help-keys");
  const lines = keys.map(([key, name, text, action]) => {
    actions.set(key, action);
    return [name, text];
  });
  list.append(...[...lines, ...OTHER_KEYS].map(([name, text]) => element("div", "help-row",
    [element("dt", "", element("kbd", "", name)), element("dd", "", text)])));
}

export function openHelp() {
  if (help.open) return;
  help.showModal();
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && isTyping(event.target) && !help.open) event.target.blur();
  if (event.defaultPrevented || help.open || isTyping(event.target)) return;
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.shiftKey && event.key !== "?") return;
  const action = actions.get(event.key);
  if (!action) return;
  event.preventDefault();
  action();
});

help.addEventListener("click", (event) => {
  if (event.target === help || event.target.closest("button")) help.close();
});

function isTyping(target) {
  if (!target.matches) return false;
  if (target.isContentEditable || target.matches("textarea, select")) return true;
  return target.matches("input") && !["checkbox", "radio", "button", "file"].includes(target.type);
}
