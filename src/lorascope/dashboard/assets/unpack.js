// Decodes the columns of numbers in the page: their text, zlib, and the codings of dashboard/packs.py.
import { packText } from "./packs_embedded.js";

const ALPHABET = 91; // characters of a pack's text, in the order of their codes

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
const WORDS = { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };

// Returns the column in a base64 text that is not compressed.
export function decodeColumn(type, base64) {
  return new ARRAYS[type](bytesOf(base64).buffer);
}

// Returns a Promise of the columns in a pack. `types` is a list of [name, type and coding].
export async function unpack(id, types) {
  if (!("DecompressionStream" in window)) {
    throw new Error("This browser cannot unpack the data. Please use a version from 2023 or later.");
  }
  const data = await inflate(bytesOfPack(await packText(id)));
  const lengths = new Uint32Array(data, 0, types.length);
  const reader = { bytes: new Uint8Array(data), at: 4 * types.length };
  const columns = {};
  types.forEach(([name, described], i) => {
    const [type, coding] = described.split(" ");
    const column = CODINGS[coding ?? "planes"](reader, ARRAYS[type], lengths[i]);
    columns[name] = type === "<b2" ? toFloats(column) : column;
  });
  return columns;
}

// Each returns the next `n` values of a reader, as an array of a type.
const CODINGS = {
  planes(reader, Type, n) {
    const size = Type.BYTES_PER_ELEMENT;
    const read = reader.bytes.subarray(reader.at, reader.at + n * size);
    reader.at += n * size;
    const out = new Uint8Array(n * size);
    for (let first = 0, from = 0; first < size; first++) {
      for (let i = first; i < out.length; i += size) out[i] = read[from++];
    }
    return new Type(out.buffer);
  },
  falls(reader, Type, n) {
    const words = CODINGS.planes(reader, WORDS[Type.BYTES_PER_ELEMENT], n);
    for (let i = 1; i < n; i++) words[i] = words[i - 1] - words[i];
    return new Type(words.buffer);
  },
  sparse(reader, Type, n) {
    const kept = new Uint32Array(n); // numbers of the values that are not 0
    let nKept = 0;
    for (let first = 0; first < n; first += 8) {
      for (let bits = reader.bytes[reader.at++], i = first; bits; bits = (bits << 1) & 255, i++) {
        if (bits & 128) kept[nKept++] = i;
      }
    }
    const values = CODINGS.planes(reader, Type, nKept);
    const out = new Type(n);
    for (let j = 0; j < nKept; j++) out[kept[j]] = values[j];
    return out;
  },
  entry(reader, Type, n) {
    const out = new Type(n);
    const next = () => reader.bytes[reader.at++];
    for (let i = 0; i < n; i++) {
      const first = reader.bytes[reader.at++];
      if (first < 192) out[i] = first;
      else if (first < 248) out[i] = 192 + ((first - 192) << 8) + next();
      else if (first < 255) out[i] = 14528 + ((first - 248) << 16) + (next() << 8) + next();
      else out[i] = (next() << 24) + (next() << 16) + (next() << 8) + next();
    }
    return out;
  },
};

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

// Returns the bytes of a pack: two characters have 13 bits, a single one at the end has 6.
function bytesOfPack(text) {
  const numberOf = new Uint8Array(127);
  for (let code = 32, n = 0; n < ALPHABET; code++) {
    if (!'"&<\\'.includes(String.fromCharCode(code))) numberOf[code] = n++;
  }
  const [pairs, odd] = [text.length >> 1, text.length & 1];
  const bytes = new Uint8Array((13 * pairs + 6 * odd) >> 3);
  let [bits, held, at] = [0, 0, 0];
  for (let i = 0; i < 2 * pairs; i += 2) {
    const code = numberOf[text.charCodeAt(i)] * ALPHABET + numberOf[text.charCodeAt(i + 1)];
    bits = (bits << 13) | code;
    for (held += 13; held >= 8; held -= 8) bytes[at++] = bits >> (held - 8);
  }
  if (odd) bytes[at] = ((bits << 6) | numberOf[text.charCodeAt(2 * pairs)]) >> (held - 2);
  return bytes;
}

async function inflate(bytes) {
  const stream = new DecompressionStream("deflate");
  const writer = stream.writable.getWriter();
  const written = writer.write(bytes).then(() => writer.close());
  const [buffer] = await Promise.all([new Response(stream.readable).arrayBuffer(), written]);
  return buffer;
}
