// The packs of a page that `lorascope dashboard --serve` shows: the first one is in it, the others
// are asked for. This module stands in the place of embedded.js there.

export async function packText(id) {
  const element = document.getElementById(id);
  if (element) return element.textContent;
  let answer;
  try {
    answer = await fetch(id);
  } catch {
    throw new Error("The command that shows this page has ended. Start it again.");
  }
  if (!answer.ok) throw new Error("The command that shows this page is another one by now.");
  return answer.text();
}
