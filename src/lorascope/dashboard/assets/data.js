// The page's data: the core, read once; blocks of features and whole rollouts, decoded on demand.
// dashboard/payload.py writes the data and documents them.
import { decodeColumn, startsOf, unpack } from "./unpack.js";

const MAX_PACKS = 24; // decoded packs (blocks and rollouts) that stay in memory
const FULL_SCALE = 32767; // stands for the largest activation in a feature's windows
const FULL_SHARE = 31; // stands for a feature's largest share in its fingerprint

export const SPECIAL = 1;
export const PARTIAL = 2;
export const UNKNOWN = 65535; // a site that is not known, a feature that is not on the map
const RANKINGS = ["mean", "lift", "before", "after"];
// List of a feature's record -> the block's column with their number, in the order of windows.
const WINDOWS = { examples: "count", samples: "sample_count", specials: "special_count" };

export const core = JSON.parse(document.getElementById("core").textContent);

export const column = Object.fromEntries(
  Object.entries(core.columns).map(([name, { type, data }]) => [name, decodeColumn(type, data)]),
);
core.columns = null; // frees their base64 texts

// Returns whether a feature has an example, at text or at special tokens.
export function hasExample(id) {
  return column.n_examples[id] > 0 || column.special_max[id] > 0;
}

// Returns whether a feature fires mostly at special tokens and template headers.
export function isTemplate(id) {
  return column.n_special[id] > Math.max(0, column.n_active[id]);
}

// Returns a feature's largest activation, at text or at special tokens; 0 if unknown.
export function largest(id) {
  return Math.max(column.max[id] || 0, column.special_max[id]);
}

const packs = new Map(); // pack id -> Promise of its content, least recently used first

// Returns a Promise of a feature's record: everything about it that is not in the core's columns.
export async function feature(id) {
  return record(await load(`block-${Math.floor(id / core.block)}`), id);
}

// Decodes a feature's block in advance. A damaged block is reported only when it is shown.
export function prefetch(id) {
  if (id !== undefined) load(`block-${Math.floor(id / core.block)}`).catch(() => {});
}

// Returns a Promise of a whole rollout: token entries and roles, and in `latent` and `value` what
// fires at token t, from `codes[t]` to `codes[t + 1]`.
export function rolloutData(number) {
  return load(`rollout-${number}`);
}

// Returns a Promise of what the search needs from a block. Does not keep the block in memory.
export async function searchable(number) {
  const id = `block-${number}`;
  const block = await (packs.get(id) ?? unpack(id, core.block_columns));
  const fires = Uint8Array.from(block.activation, (value) => Number(value !== 0));
  let start = 0;
  block.length.forEach((n, w) => {
    fires[start + block.target[w]] = Number(activationAtTarget(block, w) !== 0);
    start += n;
  });
  return {
    counts: Object.values(WINDOWS).map((name) => block[name].slice()),
    token: block.token.slice(), length: block.length.slice(), fires,
    ranked: RANKINGS.map((name) => block[name].slice()),
    sentences: Array.from(block.count, (_, i) => sentenceOf(block, i).toLowerCase()),
  };
}

function load(id) {
  const pack = packs.get(id) ?? (id.startsWith("rollout") ? decodeRollout(id) : decodeBlock(id));
  packs.delete(id);
  packs.set(id, pack); // as the last that was used
  pack.catch(() => packs.delete(id));
  if (packs.size > MAX_PACKS) packs.delete(packs.keys().next().value);
  return pack;
}

async function decodeBlock(id) {
  const block = await unpack(id, core.block_columns);
  block.first = Number(id.slice("block-".length)) * core.block;
  block.starts = {}; // list of a record -> number of the first window of each feature
  let before = 0;
  for (const [list, name] of Object.entries(WINDOWS)) {
    block.starts[list] = startsOf(block[name]).map((start) => before + start);
    before = block.starts[list].at(-1);
  }
  block.windowStart = startsOf(block.length);
  return block;
}

async function decodeRollout(id) {
  const rollout = await unpack(id, core.rollout_columns);
  rollout.codes = startsOf(rollout.n_fired);
  rollout.likelyStart = startsOf(rollout.likely_count ?? []);
  rollout.behindStart = startsOf(rollout.behind_count ?? []);
  return rollout;
}

function record(block, id) {
  const i = id - block.first;
  const row = (values, n) => values.subarray(i * n, (i + 1) * n);
  const bins = Math.max(0, column.edges.length - 1);
  const windows = Object.entries(block.starts).map(([list, starts]) => [
    list, Array.from({ length: starts[i + 1] - starts[i] }, (_, w) => windowOf(block, starts[i] + w, i)),
  ]);
  const nSites = core.sites ? core.sites.length : 0;
  const shares = new Float32Array(nSites);
  row(block.fingerprint, nSites).forEach((part, j) => {
    shares[column.site_order[j]] = (part * block.fingerprint_max[i]) / FULL_SHARE;
  });
  return {
    id, ...Object.fromEntries(windows), shares, sentence: sentenceOf(block, i),
    histogram: row(block.histogram, bins),
    byRole: core.n_by_role ? row(block.by_role, core.n_by_role.length) : [],
    byPosition: core.n_by_position ? row(block.by_position, core.n_by_position.length) : [],
    similar: pairs(row(block.similar, core.n_similar), row(block.cosine, core.n_similar)),
    cofiring: pairs(row(block.cofiring, core.n_cofiring), row(block.jaccard, core.n_cofiring)),
    ranked: Object.fromEntries(
      RANKINGS.map((name) => {
        const n = core.n_ranked[name];
        return [name, pairs(row(block[name], n), row(block[`${name}_score`], n))];
      }),
    ),
    promoted: directEffects(block, "promoted", i),
    suppressed: directEffects(block, "suppressed", i),
  };
}

// Returns the sentence of the label of feature number `i` of a block; "" if it has none.
function sentenceOf(block, i) {
  if (!block.sentence) return "";
  block.sentenceStart ??= startsOf(block.sentence_length);
  const [from, to] = [block.sentenceStart[i], block.sentenceStart[i + 1]];
  return new TextDecoder().decode(block.sentence.subarray(from, to));
}

function directEffects(block, side, i) {
  const n = core.effects.direct?.n ?? 0;
  if (!n) return [];
  const part = (values) => values.subarray(i * n, (i + 1) * n);
  return pairs(part(block[side]), part(block[`${side}_score`]));
}

function activationAtTarget(block, w) {
  return block.peak.length ? block.peak[w] : block.value[w];
}

function windowOf(block, w, i) {
  const from = block.windowStart[w];
  const to = block.windowStart[w + 1];
  const step = block.scale[i] / FULL_SCALE;
  const activations = Float32Array.from(block.activation.subarray(from, to), (part) => part * step);
  activations[block.target[w]] = activationAtTarget(block, w);
  return {
    value: block.value[w],
    row: block.row[w],
    ...placeOf(block, w),
    target: block.target[w],
    tokens: block.token.subarray(from, to),
    activations,
    repeats: block.n_repeats[w] ?? -1, // only examples have it
    quantile: block.quantile[w - block.starts.samples[0]] ?? -1, // only samples have it
  };
}

// Returns rollout and position of a window's target, which its row may say.
function placeOf(block, w) {
  const { span_start: starts, span_rollout: rollouts } = column;
  if (!starts.length) return { rollout: block.rollout[w], position: block.position[w] };
  let [low, high] = [0, starts.length]; // the last start that is not above the row is in between
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= block.row[w]) low = middle;
    else high = middle;
  }
  return { rollout: rollouts[low], position: block.row[w] - starts[low] };
}

// Returns [number, score] pairs. Stored numbers count from 1; 0 stands for none.
function pairs(ids, scores) {
  const list = [];
  ids.forEach((id, i) => id > 0 && list.push([id - 1, scores[i]]));
  return list;
}
