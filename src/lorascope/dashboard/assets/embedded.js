// The packs of a page that is one file: they are in script elements that no browser runs.

// Returns a Promise of a pack's text. Packs stand behind the script, so that those of a large file
// may still be on their way.
export async function packText(id) {
  while (!document.getElementById(id)) {
    if (document.readyState !== "loading") {
      throw new Error("This file is incomplete: a part of its data is missing. Make it anew.");
    }
    await new Promise((done) => setTimeout(done, 20));
  }
  return document.getElementById(id).textContent;
}
