// The page's data: the core, read once; blocks of features and kept texts, decoded when asked for.
// Python writes all of it; dashboard/payload.py says what is in it.
import { plain, starts, unpack } from "./pack.js";

const MAX_BLOCKS = 24; // decoded blocks that are kept, and as many texts
const FULL = 32767; // what the largest activation of a feature's windows is written as
const SHARES = 31; // the same for shares of a fingerprint

export const SPECIAL = 1;
export const PARTIAL = 2;
export const NOWHERE = 65535;
export const RANKINGS = ["mean", "lift", "before", "after"];

export const core = JSON.parse(document.getElementById("core").textContent);

export const column = Object.fromEntries(
  Object.entries(core.columns).map(([name, { type, data }]) => [name, plain(type, data)]),
);
core.columns = null; // its texts are large and no longer needed

const promised = new Map(); // id of a pack -> Promise, least recently used first
const ready = new Map(); // id of a pack -> what it holds

// Returns a feature's record at once when its block is decoded, undefined otherwise.
export function featureNow(id) {
  const block = ready.get(`block-${Math.floor(id / core.block)}`);
  return block && record(block, id);
}

// Returns a Promise of a feature's record: all that is known of it beside the core's columns.
export async function feature(id) {
  return record(await load(`block-${Math.floor(id / core.block)}`), id);
}

// Decodes the block of a feature ahead of need; a damaged block is reported when it is shown.
export function prefetch(id) {
  if (id !== undefined) load(`block-${Math.floor(id / core.block)}`).catch(() => {});
}

// Returns a Promise of a kept text: token entries, roles, and the codes `codes[t] .. codes[t + 1]`
// of token t in `latent` and `value`.
export function keptText(number) {
  return load(`text-${number}`);
}

// Returns a Promise of what the search reads of a block, without keeping the block.
export async function searchable(number) {
  const id = `block-${number}`;
  const block = await (promised.get(id) ?? unpack(id, core.block_columns));
  const fires = Uint8Array.from(block.activation, (value) => Number(value !== 0));
  const ranked = RANKINGS.map((name) => block[name].slice());
  const { count, sample_count, token, length } = block;
  return {
    counts: count.slice(), sampleCounts: sample_count.slice(),
    token: token.slice(), length: length.slice(), fires, ranked,
  };
}

function load(id) {
  const known = promised.get(id);
  if (known) {
    promised.delete(id);
    promised.set(id, known);
    return known;
  }
  const promise = id.startsWith("text") ? decodeText(id) : decodeBlock(id);
  promised.set(id, promise);
  promise.then(
    (block) => promised.has(id) && ready.set(id, block),
    () => promised.delete(id),
  );
  if (promised.size > MAX_BLOCKS) {
    const oldest = promised.keys().next().value;
    promised.delete(oldest);
    ready.delete(oldest);
  }
  return promise;
}

async function decodeBlock(id) {
  const block = await unpack(id, core.block_columns);
  block.first = Number(id.slice("block-".length)) * core.block;
  block.exampleStart = starts(block.count);
  block.sampleStart = starts(block.sample_count);
  block.windowStart = starts(block.length);
  return block;
}

async function decodeText(id) {
  const text = await unpack(id, core.text_columns);
  text.codes = starts(text.count);
  return text;
}

function record(block, id) {
  const i = id - block.first;
  const row = (values, n) => values.subarray(i * n, (i + 1) * n);
  const bins = Math.max(0, column.edges.length - 1);
  const nExamples = block.exampleStart[block.count.length];
  const examples = [];
  for (let e = block.exampleStart[i]; e < block.exampleStart[i + 1]; e++) {
    examples.push({ ...windowOf(block, e, i), alike: block.n_alike[e], quantile: -1 });
  }
  const samples = [];
  for (let s = block.sampleStart[i]; s < block.sampleStart[i + 1]; s++) {
    samples.push({ ...windowOf(block, nExamples + s, i), alike: -1, quantile: block.quantile[s] });
  }
  const nSites = core.sites ? core.sites.length : 0;
  const shares = Float32Array.from(
    row(block.share, nSites), (part) => (part * block.largest_share[i]) / SHARES,
  );
  return {
    id, examples, samples, shares,
    histogram: row(block.histogram, bins),
    byRole: core.n_by_role ? row(block.by_role, core.n_by_role.length) : [],
    byPosition: core.n_by_position ? row(block.by_position, core.n_by_position.length) : [],
    near: pairs(row(block.near, core.n_near), row(block.cosine, core.n_near)),
    beside: pairs(row(block.beside, core.n_beside), row(block.jaccard, core.n_beside)),
    ranked: Object.fromEntries(
      RANKINGS.map((name) => {
        const n = core.n_ranked[name];
        return [name, pairs(row(block[name], n), row(block[`${name}_`], n))];
      }),
    ),
    promoted: directed(block, "promoted", i),
    suppressed: directed(block, "suppressed", i),
  };
}

function directed(block, side, i) {
  const n = core.effects.direct?.n ?? 0;
  if (!n) return [];
  const part = (values) => values.subarray(i * n, (i + 1) * n);
  return pairs(part(block[side]), part(block[`${side}_`]));
}

function windowOf(block, w, i) {
  const from = block.windowStart[w];
  const to = block.windowStart[w + 1];
  const unit = block.scale[i] / FULL;
  const activations = Float32Array.from(block.activation.subarray(from, to), (part) => part * unit);
  activations[block.target[w]] = block.peak.length ? block.peak[w] : block.value[w];
  return {
    value: block.value[w],
    row: block.row[w],
    rollout: block.rollout[w],
    position: block.position[w],
    target: block.target[w],
    tokens: block.token.subarray(from, to),
    activations,
  };
}

// Numbers that count from 1, where 0 stands for none, beside their scores.
function pairs(ids, scores) {
  const found = [];
  ids.forEach((id, i) => id > 0 && found.push([id - 1, scores[i]]));
  return found;
}
