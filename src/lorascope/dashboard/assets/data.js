// The page's data: the core, read once, and the blocks of examples, decoded when asked for.
// Python writes both; dashboard/payload.py says what is in them.

const ARRAYS = {
  "<u2": Uint16Array,
  "<u4": Uint32Array,
  "<i4": Int32Array,
  "<f4": Float32Array,
  "<f8": Float64Array,
  "|u1": Uint8Array,
};
const MAX_BLOCKS = 24; // decoded blocks that are kept

export const SPECIAL = 1;
export const PARTIAL = 2;

export const core = JSON.parse(document.getElementById("core").textContent);

export const column = Object.fromEntries(
  Object.entries(core.columns).map(([name, { type, data }]) => [
    name,
    new ARRAYS[type](bytesOf(data).buffer),
  ]),
);

const decoded = new Map(); // block number -> Promise, least recently used first
const ready = new Map(); // block number -> decoded block

// Returns a feature's record at once when its block is decoded, undefined otherwise.
export function featureNow(id) {
  const block = ready.get(Math.floor(id / core.block));
  return block && record(block, id);
}

// Returns a Promise of a feature's record: its examples and its histogram.
export async function feature(id) {
  return record(await load(Math.floor(id / core.block)), id);
}

// Decodes the block of a feature ahead of need; a damaged block is reported when it is shown.
export function prefetch(id) {
  if (id !== undefined) load(Math.floor(id / core.block)).catch(() => {});
}

function load(number) {
  const known = decoded.get(number);
  if (known) {
    decoded.delete(number);
    decoded.set(number, known);
    return known;
  }
  const promise = decode(number);
  decoded.set(number, promise);
  promise.then(
    (block) => decoded.has(number) && ready.set(number, block),
    () => decoded.delete(number),
  );
  if (decoded.size > MAX_BLOCKS) {
    const oldest = decoded.keys().next().value;
    decoded.delete(oldest);
    ready.delete(oldest);
  }
  return promise;
}

async function decode(number) {
  if (!("DecompressionStream" in window)) {
    throw new Error("This browser is too old to unpack the data. Please use one of 2023 or later.");
  }
  const element = await blockElement(number);
  const data = await inflate(bytesOf(element.textContent));
  const names = core.block_columns;
  const lengths = new Uint32Array(data, 0, names.length);
  const block = { first: number * core.block };
  let at = 4 * names.length;
  names.forEach(([name, type], i) => {
    at += (8 - (at % 8)) % 8;
    block[name] = new ARRAYS[type](data, at, lengths[i]);
    at += block[name].byteLength;
  });
  block.exampleStart = running(block.count);
  block.windowStart = running(block.length);
  return block;
}

// The blocks stand behind the script, so a large file may still be on its way.
async function blockElement(number) {
  const id = `block-${number}`;
  while (!document.getElementById(id)) {
    if (document.readyState !== "loading") {
      throw new Error("This file is incomplete: a part of its data is missing. Make it anew.");
    }
    await new Promise((done) => setTimeout(done, 20));
  }
  return document.getElementById(id);
}

function record(block, id) {
  const i = id - block.first;
  const bins = Math.max(0, column.edges.length - 1);
  const examples = [];
  for (let e = block.exampleStart[i]; e < block.exampleStart[i + 1]; e++) {
    const from = block.windowStart[e];
    const to = block.windowStart[e + 1];
    examples.push({
      value: block.value[e],
      row: block.row[e],
      rollout: block.rollout[e],
      position: block.position[e],
      target: block.target[e],
      tokens: block.token.subarray(from, to),
      activations: block.activation.subarray(from, to),
    });
  }
  return { id, examples, histogram: block.histogram.subarray(i * bins, (i + 1) * bins) };
}

function running(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) starts[i + 1] = starts[i] + lengths[i];
  return starts;
}

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function inflate(bytes) {
  const stream = new DecompressionStream("deflate");
  const writer = stream.writable.getWriter();
  const written = writer.write(bytes).then(() => writer.close());
  const [buffer] = await Promise.all([new Response(stream.readable).arrayBuffer(), written]);
  return buffer;
}
