"""Make a feature index of any size that looks like a real one, to measure its page.

    python benchmarks/synthetic_features.py --features 100000 --output /tmp/features.h5

1. A corpus: rollouts of phrases, phrases of tokens, both drawn by Zipf's law, so that texts repeat
   themselves as real ones do. Parts of a rollout have roles; the headers between them are special.
2. A latent fires on its trigger (one token of the vocabulary) and now and then near the chosen
   positions. A share of the latents is dead.
3. Some of the trigger's positions are chosen: the strongest as examples, others as samples of each
   fifth of the values. A latent's value at a row depends only on latent and row, so overlapping
   windows and whole texts agree. Some latents fire at special tokens too, a few mostly so
   or nowhere else.
4. Statistics are drawn so that they add up. Decoder neighbours come from planted clusters of about
   30 latents.

All draws come from one generator: a seed gives the same index everywhere. `FeatureIndex.verify`
checks it against `docs/formats.md`.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorascope.artifact import Manifest
from lorascope.features.arrays import KIND, SCHEMA, WINDOWS
from lorascope.features.index import FeatureIndex
from lorascope.sites import PROJECTIONS, Site, SiteLayout
from lorascope.texts.roles import ROLES
from lorascope.texts.tokens import pack_tokens

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

N_BINS = 40
CLUSTER = 30  # latents of a planted cluster, about
_VOCABULARY = 8000
_PHRASES = 20_000
_FIFTHS = 5
_AT_SPECIAL = 3  # examples of a latent at special tokens
_NEAR = 10  # neighbours of a latent
_RANKED = 8
_SPLIT = 400  # place in the vocabulary of the characters that are two tokens each
_PIECES = [raw for c in "中🎉é文" for raw in (c.encode()[:1], c.encode()[1:])]
_CHUNK = 1 << 16  # windows, or latents, at once


class Corpus(NamedTuple):
    """Rollouts behind one another."""

    token: Ints  # (n_rows,), index into the vocabulary
    role: npt.NDArray[np.uint8]  # (n_rows,)
    start: Ints  # (n_rollouts + 1,)

    @property
    def eligible(self) -> npt.NDArray[np.bool_]:
        """Rows that may be examples."""
        return self.role != ROLES.index("special")


class Firings(NamedTuple):
    """The value of every latent at every row."""

    corpus: Corpus
    trigger: Ints  # (latent,), a token
    largest: Floats  # (latent,)
    key: Ints  # (chosen,), ascending: latent * n_rows + row
    value: Floats  # (chosen,)

    def at(self, latent: Ints, row: Ints, near: npt.NDArray[np.bool_]) -> Floats:
        """Return values of pairs; `near` allows a firing that is not on the trigger."""
        on_trigger = self.corpus.token[row] == self.trigger[latent]
        luck = _mixed(latent, row)
        fires = (on_trigger | (near & (luck < 0.2))) & self.corpus.eligible[row]
        value = np.where(fires, self.largest[latent] * (0.02 + 0.4 * luck), 0)
        maybe = np.flatnonzero(np.where(self.corpus.eligible[row], on_trigger, True))
        wanted = latent[maybe] * len(self.corpus.token) + row[maybe]
        at = np.minimum(np.searchsorted(self.key, wanted), max(len(self.key) - 1, 0))
        known = self.key[at] == wanted if len(self.key) else np.zeros(len(maybe), dtype=bool)
        value[maybe[known]] = self.value[at[known]]
        return value.astype(np.float32)


def synthetic(
    n_features: int = 7168,
    n_examples: int = 10,
    context: int = 10,
    *,
    per_fifth: int = 2,
    n_texts: int = 40,
    n_rollouts: int = 1000,
    n_layers: int = 64,
    dead: float = 0.2,
    seed: int = 0,
) -> FeatureIndex:
    """Return an index of `n_features` latents with windows of `2 * context + 1` tokens.

    A latent has up to `n_examples` examples and `per_fifth` samples of each fifth, fewer where its
    trigger is rare. `n_texts` rollouts of `n_rollouts` are kept whole.
    """
    rng = np.random.default_rng(seed)
    tokens, special = _vocabulary(rng)
    corpus = _corpus(rng, n_rollouts, special)
    alive = rng.random(n_features) >= dead
    latents, chosen, firings = _chosen(rng, corpus, alive, n_examples, per_fifth)
    windows = _windows(firings, chosen, context)
    texts, texts_fired = _texts(rng, firings, windows, min(n_texts, n_rollouts), latents)
    layout = SiteLayout.from_sites(
        [
            Site(
                layer=layer, projection=name, module=f"model.layers.{layer}.{name}", b_norms=(1.0,)
            )
            for layer in range(n_layers)
            for name in PROJECTIONS
        ],
        adapter="5e" * 32,
    )
    arrays: dict[str, npt.ArrayLike] = {
        **latents,
        **{name: values for name, values in chosen.items() if not name.endswith("latent")},
        **{name: windows[name] for name in windows if name.startswith("window_")},
        **texts,
        **texts_fired,
        **_neighbours(rng, alive),
        **_ranked(rng, firings.trigger, alive),
        "latent_fingerprint": _fingerprint(rng, n_features, n_layers),
        "token_id": np.arange(len(tokens)),
        "token_special": special,
    }
    arrays["token_offset"], arrays["token_data"] = pack_tokens(tokens)
    eligible = corpus.eligible
    tenth = _tenth(corpus)
    content = {
        "adapter_name": "synthetic adapter",
        "base_model": "synthetic model",
        "dataset": "synthetic corpus",
        "sae_name": "synthetic",
        "fvu": 0.12,
        "l0": 32.0,
        "n_features": n_features,
        "n_alive": int(alive.sum()),
        "n_tokens": len(corpus.token),
        "n_eligible": int(eligible.sum()),
        "n_rollouts": n_rollouts,
        "top_k": n_examples,
        "context_window": context,
        "roles": list(ROLES),
        "n_special": int((~eligible).sum()),
        "n_template": int((latents["latent_n_special"] > latents["latent_n_active"]).sum()),
        "n_by_role": np.bincount(corpus.role, minlength=len(ROLES)).tolist(),
        "n_by_position": np.bincount(tenth[eligible], minlength=10).tolist(),
    }
    manifest = Manifest(
        kind=KIND,
        schema=SCHEMA,
        settings={"top_k": n_examples, "context_window": context},
        parents={"sae": "5ae0" * 16, "activations": "ac70" * 16},
        layout=layout,
        content=content,
    )
    return FeatureIndex.from_arrays(manifest, arrays)


def _vocabulary(rng: np.random.Generator) -> tuple[list[bytes], npt.NDArray[np.bool_]]:
    """Return the bytes of every token, the frequent ones first, and which are special."""
    signs = [b"\n", b",", b".", b" the", b" =", b"\n\n", b" +", b" x", b"Wait", b" \\frac", b"\t"]
    special = [b"<|im_start|>", b"<|im_end|>"]
    syllables = [c + v for c in "bcdfglmnprstvw" for v in ("a", "e", "i", "o", "u", "ing", "er")]
    words: dict[bytes, None] = dict.fromkeys(signs)
    while len(words) < _VOCABULARY - len(special):
        parts = rng.integers(len(syllables), size=(4096, 4))
        lengths, gaps = rng.integers(1, 4, 4096), rng.random(4096) < 0.7
        for part, length, gap in zip(parts.tolist(), lengths.tolist(), gaps.tolist(), strict=True):
            text = " " * gap + "".join(syllables[i] for i in part[:length])
            words[text.encode()] = None
    tokens = list(words)[: _VOCABULARY - len(special) - len(_PIECES)]
    tokens[_SPLIT:_SPLIT] = _PIECES
    return [*tokens, *special], np.arange(_VOCABULARY) >= _VOCABULARY - len(special)


def _corpus(rng: np.random.Generator, n_rollouts: int, special: npt.NDArray[np.bool_]) -> Corpus:
    length = rng.integers(120, 900, n_rollouts)
    start = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    n_rows = int(start[-1])
    words = np.flatnonzero(~special)
    phrase_length = rng.integers(2, 8, _PHRASES)
    phrase_start = np.concatenate([[0], np.cumsum(phrase_length)])
    phrases = words[_zipf(rng, len(words), int(phrase_start[-1]))]
    said = _zipf(rng, _PHRASES, n_rows // 2)
    token = phrases[_ragged(phrase_start[said], phrase_length[said])][:n_rows]
    split = (token >= _SPLIT) & (token < _SPLIT + len(_PIECES))
    head = split & ((token - _SPLIT) % 2 == 0)
    token[split & ~head] = 0
    token[1:][head[:-1]] = token[:-1][head[:-1]] + 1
    where = (np.arange(n_rows) - np.repeat(start[:-1], length)) / np.repeat(length, length)
    parts = np.array([ROLES.index(role) for role in ("system", "user", "think", "answer")])
    part = np.searchsorted([0.05, 0.2, 0.8], where, side="right")
    role = parts[part].astype(np.uint8)
    head = np.append(True, part[1:] != part[:-1])
    role[head] = ROLES.index("special")
    token[head] = np.flatnonzero(special)[0]
    return Corpus(token, role, start)


def _chosen(
    rng: np.random.Generator,
    corpus: Corpus,
    alive: npt.NDArray[np.bool_],
    n_examples: int,
    per_fifth: int,
) -> tuple[dict[str, Any], dict[str, Any], Firings]:
    """Return the statistics, the examples and samples, and the values of every latent."""
    n, n_rows, eligible = len(alive), len(corpus.token), np.flatnonzero(corpus.eligible)
    places = eligible[np.argsort(corpus.token[eligible], kind="stable")]
    count = np.bincount(corpus.token[eligible], minlength=_VOCABULARY)
    first = np.concatenate([[0], np.cumsum(count)])
    share = np.cumsum(np.sqrt(count))
    trigger = np.searchsorted(share, rng.random(n) * share[-1], side="right").astype(np.int64)
    largest = np.where(alive, rng.lognormal(1, 0.7, n), 0).astype(np.float32)

    of_text = alive & (np.arange(n) % 32 != 19)  # these fire at special tokens alone
    # An even draw of the trigger's places without repetition, then in any order.
    wanted = np.minimum(count[trigger], n_examples + _FIFTHS * per_fifth) * of_text
    owner = np.repeat(np.arange(n), wanted)
    nth = _nth(wanted)
    of = count[trigger[owner]]
    low, high = nth * of // wanted[owner], (nth + 1) * of // wanted[owner]
    row = places[first[trigger[owner]] + rng.integers(low, high)]
    row = row[np.lexsort((rng.random(len(owner)), owner))]

    is_example = nth < n_examples
    fall = np.cumsum(rng.exponential(0.08, len(owner)))
    starts = np.concatenate([[0], np.cumsum(wanted)])[:-1]
    fall -= fall[np.minimum(starts, max(len(fall) - 1, 0))][owner] if len(fall) else 0
    fifth = (_FIFTHS - 1 - (nth - n_examples) % _FIFTHS).astype(np.int8)
    part = np.where(is_example, 0.5 + 0.5 * np.exp(-fall), (fifth + rng.random(len(owner))) * 0.1)
    value = np.maximum(largest[owner] * part, 1e-3).astype(np.float32)
    n_active = np.where(of_text, count[trigger] + rng.binomial(count[trigger], 0.1), 0)
    heads = np.flatnonzero(~corpus.eligible)
    n_special = np.where(np.arange(n) % 16 == 3, n_active + _AT_SPECIAL, n_active // 8)
    n_special = np.minimum(n_special, len(heads)) * alive
    at_special = np.minimum(n_special, _AT_SPECIAL)
    owners, rank = np.repeat(np.arange(n), at_special), _nth(at_special)
    rows = heads[rank * len(heads) // _AT_SPECIAL]
    values = (largest[owners] * (0.9 - 0.2 * rank)).astype(np.float32)
    key = np.concatenate([owner, owners]) * n_rows + np.concatenate([row, rows])
    order = np.argsort(key)
    firings = Firings(corpus, trigger, largest, key[order], np.concatenate([value, values])[order])

    e = np.flatnonzero(is_example)
    e = e[np.lexsort((row[e], -value[e], owner[e]))]
    s = np.flatnonzero(~is_example)
    s = s[np.lexsort((row[s], -fifth[s], owner[s]))]
    chosen: dict[str, Any] = {}
    for name, of, row_of, value_of in (
        ("example", owner[e], row[e], value[e]),
        ("sample", owner[s], row[s], value[s]),
        ("special", owners, rows, values),
    ):
        rollout = np.searchsorted(corpus.start, row_of, side="right") - 1
        chosen |= {
            f"{name}_latent": of,
            f"{name}_offset": _offset(of, n),
            f"{name}_value": value_of,
            f"{name}_row": row_of,
            f"{name}_rollout": rollout,
            f"{name}_position": row_of - corpus.start[rollout],
        }
    chosen["example_n_alike"] = 1 + rng.geometric(0.5, len(e)) * (rng.random(len(e)) < 0.2)
    chosen["sample_quantile"] = fifth[s]
    largest = np.where(of_text, largest, 0).astype(np.float32)
    return _statistics(rng, corpus, n_active, n_special, largest), chosen, firings


def _statistics(
    rng: np.random.Generator, corpus: Corpus, n_active: Ints, n_special: Ints, largest: Floats
) -> dict[str, Any]:
    n, n_rollouts = len(n_active), len(corpus.start) - 1
    eligible = corpus.eligible
    edges = 0.01 * 2.0 ** (np.arange(N_BINS + 1) / 4)
    top = np.clip(np.searchsorted(edges, largest, side="right") - 1, 0, N_BINS - 1)
    bins = np.arange(N_BINS)
    spread = rng.uniform(2, 6, (n, 1))
    shape = np.exp(-(((bins - top[:, None] + 1.5 * spread) / spread) ** 2) / 2)
    shape *= bins <= top[:, None]
    histogram = rng.multinomial(np.maximum(n_active - 1, 0), _shares(shape))
    histogram[np.arange(n), top] += n_active > 0
    by: dict[str, Ints] = {}
    for name, group in (("role", corpus.role), ("position", _tenth(corpus))):
        total = np.bincount(group[eligible], minlength=len(ROLES) if name == "role" else 10)
        lean = total * rng.lognormal(0, 0.8 if name == "role" else 0.4, (n, len(total)))
        by[name] = rng.multinomial(n_active, _shares(lean))
    by["role"][:, ROLES.index("special")] = n_special
    mean = largest * rng.uniform(0.2, 0.6, n)
    return {
        "latent_n_active": n_active,
        "latent_n_special": n_special,
        "latent_max": largest,
        "latent_mean": mean,
        "latent_std": mean * rng.uniform(0.2, 0.8, n),
        "latent_n_rollouts": np.ceil(n_rollouts * -np.expm1(-n_active / n_rollouts)),
        "latent_by_role": by["role"],
        "latent_by_position": by["position"],
        "latent_histogram": histogram,
        "latent_histogram_edges": edges,
        "latent_stability": rng.beta(6, 2, n),
    }


def _windows(firings: Firings, chosen: dict[str, Any], context: int) -> dict[str, Any]:
    """Return `window_*`, and latent and row of each window token that fires."""
    corpus = firings.corpus
    row, latent = (
        np.concatenate([chosen[f"{kind}_{name}"] for kind in WINDOWS]) for name in ("row", "latent")
    )
    rollout = np.searchsorted(corpus.start, row, side="right") - 1
    begin = np.maximum(row - context, corpus.start[rollout])
    length = np.minimum(row + context + 1, corpus.start[rollout + 1]) - begin
    offset = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    token = np.empty(offset[-1], dtype=np.int32)
    activation = np.empty(offset[-1], dtype=np.float32)
    fired_latent, fired_row = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for at in range(0, len(row), _CHUNK):
        chunk = slice(at, at + _CHUNK)
        out = slice(offset[at], offset[min(at + _CHUNK, len(row))])
        rows = _ragged(begin[chunk], length[chunk])
        owner = np.repeat(latent[chunk], length[chunk])
        near = np.abs(rows - np.repeat(row[chunk], length[chunk])) <= 2
        token[out] = corpus.token[rows]
        activation[out] = firings.at(owner, rows, near)
        fired = activation[out] > 0
        fired_latent.append(owner[fired])
        fired_row.append(rows[fired])
    return {
        "window_offset": offset,
        "window_target": row - begin,
        "window_token_id": token,
        "window_activation": activation,
        "latent": np.concatenate(fired_latent),
        "row": np.concatenate(fired_row),
    }


def _texts(
    rng: np.random.Generator,
    firings: Firings,
    windows: dict[str, Any],
    n_texts: int,
    latents: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the texts that are kept whole, and which latents fire in them.

    Those are what windows say of the same rows, and others with the right trigger, up to 16.
    """
    corpus, n = firings.corpus, len(firings.trigger)
    kept = np.sort(rng.choice(len(corpus.start) - 1, n_texts, replace=False))
    length = np.diff(corpus.start)[kept]
    rows = _ragged(corpus.start[kept], length)
    place = np.full(len(corpus.token), -1)  # of a row among the kept ones
    place[rows] = np.arange(len(rows))
    alive = np.flatnonzero(latents["latent_n_active"])
    alive = alive[np.argsort(firings.trigger[alive], kind="stable")]
    n_of = np.bincount(firings.trigger[alive], minlength=_VOCABULARY)
    first = np.concatenate([[0], np.cumsum(n_of)])[:-1]
    token = corpus.token[rows]
    many = np.minimum(n_of[token], 16) * corpus.eligible[rows]
    owner = np.repeat(np.arange(len(rows)), many)
    turn = (_nth(many) + (rows[owner] * 7919)) % np.maximum(n_of[token[owner]], 1)
    inside = place[windows["row"]] >= 0
    pairs = np.unique(
        np.concatenate(
            [
                owner * n + alive[first[token[owner]] + turn],
                place[windows["row"][inside]] * n + windows["latent"][inside],
            ]
        )
    )
    at, latent = np.divmod(pairs, n) if n else (pairs, pairs)
    value = firings.at(latent, rows[at], np.ones(len(at), dtype=bool))
    texts = {
        "text_rollout": kept,
        "text_why": 1 << rng.integers(0, 4, n_texts),
        "text_l0": [],
        "text_fvu": rng.uniform(0.05, 0.4, n_texts),
        "text_rarity": rng.gamma(3, 2, n_texts),
        "text_offset": np.concatenate([[0], np.cumsum(length)]),
        "text_token_id": token,
        "text_role": corpus.role[rows],
    }
    counts = np.bincount(at, minlength=len(rows))
    texts["text_l0"] = np.add.reduceat(counts, texts["text_offset"][:-1]) / length
    return texts, {
        "text_code_offset": _offset(at, len(rows)),
        "text_latent": latent,
        "text_value": value,
    }


def _neighbours(rng: np.random.Generator, alive: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Return `near_*`: of the decoder a ring inside each cluster, of firings anything."""
    n, ids = len(alive), np.flatnonzero(alive)
    near = {
        "near_decoder": np.full((n, _NEAR), -1),
        "near_cosine": np.full((n, _NEAR), np.nan),
        "near_cofiring": np.full((n, _NEAR), -1),
        "near_jaccard": np.full((n, _NEAR), np.nan),
    }
    cluster = clusters(n, seed=0)[ids]
    ring = ids[np.argsort(cluster, kind="stable")]
    size = np.bincount(cluster, minlength=1)
    size = size[size > 0]
    first = np.repeat(np.cumsum(size) - size, size)
    size, nth = np.repeat(size, size), _nth(size)
    total = len(ids)
    jump = np.cumsum(rng.integers(1, max(2, total // _NEAR), (total, _NEAR)), axis=1)
    for j in range(_NEAR):
        by = (j // 2 + 1) * (1 if j % 2 else -1)
        known = size > j + 1
        near["near_decoder"][ring[known], j] = ring[(first + (nth + by) % size)[known]]
        near["near_cosine"][ring[known], j] = 0.95 - 0.06 * j - 0.05 * rng.random(known.sum())
        known = jump[:, j] < total
        near["near_cofiring"][ids[known], j] = ids[(np.arange(total) + jump[:, j])[known] % total]
        near["near_jaccard"][ids[known], j] = 0.6 * 0.8**j * (1 - 0.1 * rng.random(known.sum()))
    return near


def clusters(n_features: int, seed: int = 0) -> Ints:
    """Return the planted cluster of each latent, `(latent,)`."""
    n_clusters = max(1, n_features // CLUSTER)
    return np.random.default_rng(seed).integers(0, n_clusters, n_features)


def _ranked(
    rng: np.random.Generator, trigger: Ints, alive: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    ranked = {}
    for name, best in (("mean", 5.0), ("lift", 2000.0), ("before", 0.4), ("after", 0.4)):
        ids = _zipf(rng, _VOCABULARY, len(alive) * _RANKED).reshape(-1, _RANKED)
        if name in ("mean", "lift"):
            ids[:, 0] = trigger
        score = best * np.sort(rng.random(ids.shape), axis=1)[:, ::-1]
        ranked[f"ranked_{name}_id"] = np.where(alive[:, None], ids, -1)
        ranked[f"ranked_{name}_score"] = np.where(alive[:, None], score, np.nan)
    return ranked


def _fingerprint(rng: np.random.Generator, n: int, n_layers: int) -> npt.NDArray[np.float16]:
    """Return shares that lie about a layer and lean to some projections, `(latent, site)`."""
    out = np.empty((n, n_layers * len(PROJECTIONS)), dtype=np.float16)
    layers = np.arange(n_layers, dtype=np.float32)
    for at in range(0, n, _CHUNK // 8):
        m = len(out[at : at + _CHUNK // 8])
        centre = n_layers * rng.beta(3, 2, (m, 1)).astype(np.float32)
        width = rng.uniform(0.02, 0.3, (m, 1)).astype(np.float32) * n_layers
        by_layer = np.exp(-np.abs(layers - centre) / width)
        lean = rng.standard_gamma(0.5, (m, len(PROJECTIONS)), dtype=np.float32)
        share = by_layer[:, :, None] * lean[:, None, :]
        share *= rng.standard_exponential(share.shape, dtype=np.float32)
        out[at : at + m] = _shares(share.reshape(m, -1).astype(np.float64))
    return out


def _shares(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return weights / weights.sum(axis=1, keepdims=True)


def _tenth(corpus: Corpus) -> Ints:
    length = np.diff(corpus.start)
    position = np.arange(len(corpus.token)) - np.repeat(corpus.start[:-1], length)
    return position * 10 // np.repeat(length, length)


def _zipf(rng: np.random.Generator, n: int, size: int) -> Ints:
    """Return draws of 0 to n - 1, number i in proportion to 1 / (i + 3)."""
    share = np.cumsum(1 / (np.arange(n) + 3))
    return np.searchsorted(share, rng.random(size) * share[-1], side="right").astype(np.int64)


def _mixed(latent: Ints, row: Ints) -> Floats:
    """Return a number in [0, 1) that depends on latent and row alone."""
    x = latent.astype(np.uint32) * np.uint32(2654435761) ^ row.astype(np.uint32) * np.uint32(40503)
    x ^= x >> np.uint32(15)
    x *= np.uint32(2246822519)
    x ^= x >> np.uint32(13)
    return (x >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def _nth(counts: Ints) -> Ints:
    """Return 0, 1, ... within each run of `counts`."""
    return _ragged(np.zeros(len(counts), dtype=np.int64), counts)


def _ragged(starts: Ints, lengths: Ints) -> Ints:
    """Return the ranges `starts[i] .. starts[i] + lengths[i]` behind one another."""
    shift = starts - (np.cumsum(lengths) - lengths)
    return np.arange(int(lengths.sum())) + np.repeat(shift, lengths)


def _offset(owner: Ints, n: int) -> Ints:
    return np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=n))]).astype(np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--features", type=int, default=7168)
    parser.add_argument("--examples", type=int, default=10)
    parser.add_argument("--context", type=int, default=10, help="tokens on each side")
    parser.add_argument("--per-fifth", type=int, default=2, help="samples of each fifth")
    parser.add_argument("--texts", type=int, default=40, help="rollouts that are kept whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("features.h5"))
    given = parser.parse_args()
    begun = time.perf_counter()
    index = synthetic(
        given.features,
        given.examples,
        given.context,
        per_fifth=given.per_fifth,
        n_texts=given.texts,
        seed=given.seed,
    )
    made = time.perf_counter()
    index.save(given.output)
    took = time.perf_counter()
    print(
        f"{len(index):,} features, {len(index.example_value):,} examples, "
        f"{len(index.window_token_id):,} window tokens: "
        f"{made - begun:.1f} s, and {took - made:.1f} s to save"
    )


if __name__ == "__main__":
    main()
