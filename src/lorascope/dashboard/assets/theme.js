// Light or dark colours: the system's choice, until the user switches.
const KEY = "lorascope:theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement;
const button = document.getElementById("theme");
let changed = () => {};
let chosen = null;

try {
  chosen = localStorage.getItem(KEY);
} catch {
  chosen = null; // without storage, switching still works
}

export function switchTheme() {
  chosen = root.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(KEY, chosen);
  } catch {
    // without storage, the choice lasts until the page is closed
  }
  apply();
}

// Calls `action` after the colours change.
export function onTheme(action) {
  changed = action;
}

function apply() {
  const system = dark.matches ? "dark" : "light";
  root.dataset.theme = chosen === "dark" || chosen === "light" ? chosen : system;
  const other = root.dataset.theme === "dark" ? "light" : "dark";
  button.textContent = root.dataset.theme === "dark" ? "\u2600" : "\u263e";
  button.setAttribute("aria-label", `Switch to ${other} colours`);
  button.title = `${other} colours (key D)`;
  changed();
}

dark.addEventListener("change", apply);
button.addEventListener("click", switchTheme);
apply();
