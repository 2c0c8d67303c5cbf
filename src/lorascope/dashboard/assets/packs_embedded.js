// Packs of a page that is a single file: they are in script elements that no browser runs.

// Returns a Promise of a pack's text. Packs come after the script, so those of a large file may not
// be there yet, or only in part: one is whole when something follows it.
export async function packText(id) {
  for (;;) {
    const isLoading = document.readyState === "loading";
    const pack = document.getElementById(id);
    if (pack && (pack.nextSibling || !isLoading)) return pack.textContent;
    if (!isLoading) {
      throw new Error("This file is incomplete: part of its data is missing. Create the page again.");
    }
    await new Promise((done) => setTimeout(done, 20));
  }
}
