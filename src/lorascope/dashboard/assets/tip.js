// The note beside a token: what it is and how strongly the feature fires on it.
import { core } from "./data.js";
import { element, short, tokenNotes, writeToken } from "./text.js";

const tip = document.getElementById("tip");
let owner = null;

// Shows the note on hover and on focus of every token inside `area`.
export function watchTokens(area) {
  const show = (event) => {
    const token = event.target.closest(".token");
    if (token) showTip(token);
    else hideTip();
  };
  area.addEventListener("pointerover", show);
  area.addEventListener("focusin", show);
  area.addEventListener("pointerleave", hideTip);
  area.addEventListener("focusout", hideTip);
  area.addEventListener("keydown", (event) => moveFocus(event));
  // Tab scrolls a token into view after it has the focus: the note must follow, not vanish.
  addEventListener("scroll", placeTip, { passive: true });
  addEventListener("resize", placeTip);
}

export function hideTip() {
  owner?.removeAttribute("aria-describedby");
  owner = null;
  tip.hidden = true;
}

function showTip(token) {
  hideTip();
  owner = token;
  const entry = Number(token.dataset.entry);
  const value = element("span", "tip-value", short(Number(token.dataset.value)));
  value.dataset.testid = "tip-value";
  value.dataset.value = token.dataset.value;
  const text = element("span", "tip-text");
  if (core.texts[entry] === "") text.textContent = "(rest of the character before)";
  else writeToken(text, entry);
  const notes = tokenNotes(entry).map((note) => element("span", "tip-note", note));
  tip.replaceChildren(value, text, ...notes);
  token.setAttribute("aria-describedby", "tip");
  tip.hidden = false;
  placeTip();
}

function placeTip() {
  if (!owner) return;
  const box = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above >= 4 ? above : box.bottom + 6}px`;
}

// Inside a window the arrow keys walk the tokens, once the keyboard has brought the focus there.
function moveFocus(event) {
  const token = event.target.closest(".token");
  if (!token || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.key === "Escape") {
    hideTip();
    return;
  }
  if (!token.matches(":focus-visible")) return;
  const tokens = [...token.parentElement.querySelectorAll(".token")];
  const at = tokens.indexOf(token);
  const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: tokens.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  event.stopPropagation();
  tokens[Math.min(tokens.length - 1, Math.max(0, to))].focus();
}
