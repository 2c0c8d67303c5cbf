// Highlights what was searched for, in the feature that is shown and in the list.
const MOST = 500; // matches

// Marks the places in `roots` that contain a text, whatever its case; "" marks none. Texts may go
// over several nodes, as those of tokens do. Old browsers mark nothing.
export function highlightFound(query, roots) {
  if (!globalThis.CSS?.highlights) return;
  const ranges = query.trim() ? roots.flatMap((root) => rangesIn(root, query)) : [];
  CSS.highlights.set("found", new Highlight(...ranges.slice(0, MOST)));
}

function rangesIn(root, query) {
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  const nodes = [];
  const starts = [];
  let text = "";
  while (walker.nextNode()) {
    nodes.push(walker.currentNode);
    starts.push(text.length);
    text += walker.currentNode.data;
  }
  const place = (at) => {
    const i = starts.findLastIndex((start) => start <= at);
    return [nodes[i], at - starts[i]];
  };
  const wanted = query.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  return Array.from(text.matchAll(new RegExp(wanted, "giu")), ({ index, 0: hit }) => {
    const range = new Range();
    range.setStart(...place(index));
    const [node, last] = place(index + hit.length - 1);
    range.setEnd(node, last + 1);
    return range;
  });
}
