// Decodes the columns of numbers in the page: base64, zlib, and the types that payload.py writes.
import { packText } from "./packs_embedded.js";

const ARRAYS = {
  "<u2": Uint16Array,
  "<u4": Uint32Array,
  "<i2": Int16Array,
  "<i4": Int32Array,
  "<f4": Float32Array,
  "<f8": Float64Array,
  "|u1": Uint8Array,
  "|i1": Int8Array,
  "<b2": Uint16Array, // the upper half of a float32
};

// Returns the column in a base64 text that is not compressed.
export function decodeColumn(type, base64) {
  return new ARRAYS[type](bytesOf(base64).buffer);
}

// Returns a Promise of the columns in a pack. `types` is a list of [name, type].
export async function unpack(id, types) {
  if (!("DecompressionStream" in window)) {
    throw new Error("This browser cannot unpack the data. Please use a version from 2023 or later.");
  }
  const data = await inflate(bytesOf(await packText(id)));
  const lengths = new Uint32Array(data, 0, types.length);
  const columns = {};
  let at = 4 * types.length;
  types.forEach(([name, type], i) => {
    at += (8 - (at % 8)) % 8;
    const column = new ARRAYS[type](data, at, lengths[i]);
    at += column.byteLength;
    columns[name] = type === "<b2" ? toFloats(column) : column;
  });
  return columns;
}

// Returns where each run starts, given the runs' lengths, and at last where all of them end.
export function startsOf(lengths) {
  const starts = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) starts[i + 1] = starts[i] + lengths[i];
  return starts;
}

// Returns float32 numbers from their upper halves.
function toFloats(halves) {
  const bits = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) bits[i] = halves[i] << 16;
  return new Float32Array(bits.buffer);
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
