// The note beside what the pointer or the focus is on: a token and its value, or a part of a figure.
import { core } from "./data.js";
import { element, short, tokenNotes, writeToken } from "./text.js";

const PARTS = ".token, [data-tip]";
const tip = document.getElementById("tip");
let owner = null;
let extra = () => []; // more lines for a token, by the view that shows it

// Shows the note on hover and on focus of every token and part of a figure inside `area`.
export function watchTokens(area, more = () => []) {
  const show = (event) => {
    const part = event.target.closest(PARTS);
    extra = more;
    if (part) showTip(part);
    else hideTip();
  };
  area.addEventListener("pointerover", show);
  area.addEventListener("focusin", show);
  area.addEventListener("pointerleave", hideTip);
  area.addEventListener("focusout", hideTip);
  area.addEventListener("keydown", moveFocus);
}

// Tab scrolls a token into view after it has the focus: the note must follow, not vanish.
addEventListener("scroll", placeTip, { passive: true, capture: true });
addEventListener("resize", placeTip);

export function hideTip() {
  owner?.removeAttribute("aria-describedby");
  owner = null;
  tip.hidden = true;
}

// Shows lines of text at a point of the window, for what is drawn on a canvas.
export function tipAt(x, y, lines) {
  hideTip();
  tip.replaceChildren(...lines);
  tip.hidden = false;
  const left = Math.min(x + 12, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 8 : y + 14}px`;
}

function showTip(part) {
  hideTip();
  owner = part;
  tip.replaceChildren(...(part.dataset.tip ? [part.dataset.tip] : tokenLines(part)));
  part.setAttribute("aria-describedby", "tip");
  tip.hidden = false;
  placeTip();
}

function tokenLines(token) {
  const entry = Number(token.dataset.entry);
  const lines = [];
  if (token.dataset.value) {
    const value = element("span", "tip-value", short(Number(token.dataset.value)));
    value.dataset.testid = "tip-value";
    value.dataset.value = token.dataset.value;
    lines.push(value);
  }
  const text = element("span", "tip-text");
  if (core.texts[entry] === "") text.textContent = "(rest of the character before)";
  else writeToken(text, entry);
  const notes = tokenNotes(entry).map((note) => element("span", "tip-note", note));
  return [...lines, text, ...extra(token), ...notes];
}

function placeTip() {
  if (!owner) return;
  const box = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
  const above = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above >= 4 ? above : box.bottom + 6}px`;
}

// Inside a window or a figure the arrow keys walk its parts, once the keyboard has the focus there.
function moveFocus(event) {
  const part = event.target.closest(PARTS);
  if (!part || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.key === "Escape" && !tip.hidden) {
    event.stopPropagation();
    hideTip();
    return;
  }
  const area = part.closest("[data-walk]");
  if (!area || !part.matches(":focus-visible")) return;
  const all = [...area.querySelectorAll(PARTS)].filter((one) => one.getClientRects().length);
  const at = all.indexOf(part);
  const line = part instanceof SVGElement ? beside(part, all, event.key) : undefined;
  const to = line ?? {
    ArrowLeft: all[at - 1], ArrowRight: all[at + 1], Home: all[0], End: all[all.length - 1],
  }[event.key];
  if (!to && !/^Arrow(Left|Right)$|^Home$|^End$/.test(event.key)) return;
  event.preventDefault();
  event.stopPropagation();
  if (!to) return;
  part.tabIndex = -1;
  to.tabIndex = 0;
  if (to.dataset.tip) {
    to.setAttribute("role", "img");
    to.setAttribute("aria-label", to.dataset.tip);
  }
  to.focus();
}

// Returns the part of a figure that stands nearest in the direction of an arrow key.
function beside(part, all, key) {
  const [dx, dy] = {
    ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  }[key] ?? [0, 0];
  const middle = (one) => {
    const box = one.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(part);
  let best;
  let least = Infinity;
  for (const one of dx || dy ? all : []) {
    const [ox, oy] = middle(one);
    const ahead = dx * (ox - x) + dy * (oy - y);
    const aside = Math.abs(dx * (oy - y)) + Math.abs(dy * (ox - x));
    if (ahead > 0.5 && ahead + 3 * aside < least) {
      least = ahead + 3 * aside;
      best = one;
    }
  }
  return best;
}
