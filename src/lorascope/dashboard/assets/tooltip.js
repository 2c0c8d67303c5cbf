// The tooltip of the token or part of a figure under the pointer or with the focus.
import { core } from "./data.js";
import { element, short, tokenNotes, writeToken } from "./format.js";

const PARTS = ".token, [data-tip]";
const tooltip = document.getElementById("tooltip");
let owner = null;
let extra = () => []; // returns more lines for a token

// Shows a tooltip on hover and focus of every token and part of a figure inside `area`. `more`
// returns further lines for a token.
export function watchTokens(area, more = () => []) {
  const show = (event) => {
    const part = event.target.closest(PARTS);
    extra = more;
    if (part) showTooltip(part);
    else hideTooltip();
  };
  area.addEventListener("pointerover", show);
  area.addEventListener("focusin", show);
  area.addEventListener("pointerleave", hideTooltip);
  area.addEventListener("focusout", hideTooltip);
  area.addEventListener("keydown", moveFocus);
}

// Tab scrolls a token into view after it gets the focus: the tooltip must follow it.
addEventListener("scroll", placeTooltip, { passive: true, capture: true });
addEventListener("resize", placeTooltip);

export function hideTooltip() {
  owner?.removeAttribute("aria-describedby");
  owner = null;
  tooltip.hidden = true;
}

// Shows lines of text at a point of the window, for a drawing on a canvas.
export function showTooltipAt(x, y, lines) {
  hideTooltip();
  tooltip.replaceChildren(...lines);
  tooltip.hidden = false;
  const left = Math.min(x + 12, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
  tooltip.style.left = `${Math.max(8, left)}px`;
  const isBelow = y + 14 + tooltip.offsetHeight <= innerHeight;
  tooltip.style.top = `${isBelow ? y + 14 : y - tooltip.offsetHeight - 8}px`;
}

function showTooltip(part) {
  hideTooltip();
  owner = part;
  tooltip.replaceChildren(...(part.dataset.tip ? [part.dataset.tip] : tokenLines(part)));
  part.setAttribute("aria-describedby", "tooltip");
  tooltip.hidden = false;
  placeTooltip();
}

function tokenLines(token) {
  const entry = Number(token.dataset.entry);
  const lines = [];
  if (token.dataset.value) {
    lines.push(element("span", "tip-value", short(Number(token.dataset.value)),
      { "data-testid": "tip-value", "data-value": token.dataset.value }));
  }
  const text = element("span", "tip-text");
  if (core.token_texts[entry] === "") text.textContent = "(continues the previous character)";
  else writeToken(text, entry);
  const notes = tokenNotes(entry).map((note) => element("span", "tip-note", note));
  return [...lines, text, ...extra(token), ...notes];
}

function placeTooltip() {
  if (!owner) return;
  const box = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
  const left = Math.min(box.left, document.documentElement.clientWidth - tooltip.offsetWidth - 8);
  const above = box.top - tooltip.offsetHeight - 6;
  tooltip.style.left = `${Math.max(8, left)}px`;
  tooltip.style.top = `${above >= 4 ? above : box.bottom + 6}px`;
}

// Inside a window or a figure, arrow keys move the focus between its parts.
function moveFocus(event) {
  const part = event.target.closest(PARTS);
  if (!part || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.key === "Escape" && !tooltip.hidden) {
    event.stopPropagation();
    hideTooltip();
    return;
  }
  const area = part.closest("[data-walk]");
  if (!area || !part.matches(":focus-visible")) return;
  const all = [...area.querySelectorAll(PARTS)].filter((other) => other.getClientRects().length);
  const at = all.indexOf(part);
  const line = part instanceof SVGElement ? neighbourOf(part, all, event.key) : undefined;
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

// Returns the nearest part of a figure in the direction of an arrow key.
function neighbourOf(part, all, key) {
  const [dx, dy] = {
    ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
  }[key] ?? [0, 0];
  const middle = (node) => {
    const box = node.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const [x, y] = middle(part);
  let best;
  let least = Infinity;
  for (const other of dx || dy ? all : []) {
    const [ox, oy] = middle(other);
    const ahead = dx * (ox - x) + dy * (oy - y);
    const aside = Math.abs(dx * (oy - y)) + Math.abs(dy * (ox - x));
    if (ahead > 0.5 && ahead + 3 * aside < least) {
      least = ahead + 3 * aside;
      best = other;
    }
  }
  return best;
}
