// Packs of a page that is a single file: they are in script elements that no browser runs.

// Returns a Promise of a pack's text. Packs come after the script, so those of a large file may not
// be there yet.
export async function packText(id) {
  while (!document.getElementById(id)) {
    if (document.readyState !== "loading") {
      throw new Error("This file is incomplete: part of its data is missing. Create the page again.");
    }
    await new Promise((done) => setTimeout(done, 20));
  }
  return document.getElementById(id).textContent;
}
