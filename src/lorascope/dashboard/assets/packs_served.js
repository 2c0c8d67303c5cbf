// Packs of a page that `lorascope dashboard --serve` shows: the first one is in the page, the others
// are requested. There, this module replaces packs_embedded.js.

export async function packText(id) {
  const element = document.getElementById(id);
  if (element) return element.textContent;
  let answer;
  try {
    answer = await fetch(id);
  } catch {
    throw new Error("The command that serves this page has stopped. Start it again.");
  }
  if (!answer.ok) throw new Error("Another command now serves this address. Reload the page.");
  return answer.text();
}
