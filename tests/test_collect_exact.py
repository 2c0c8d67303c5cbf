"""What collect keeps, compared with the simplest way to find it."""

import numpy as np
import pytest
import torch
from builders.saes import dense_code, make_sae
from builders.stores import layout_of, write_store
from hypothesis import given, settings
from hypothesis import strategies as st

from lorascope.errors import ConfigError
from lorascope.features import accumulators, collect, spans
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.texts.roles import ROLES


def store_of_ties(folder, seed=5, **given):
    rows = np.random.default_rng(seed).integers(-2, 3, (240, 14)).astype(np.float32)
    rows[100:140] = rows[60:100]  # equal rows give equal values
    return write_store(folder, rows, **given)


def made(store, sae_path, out, **given):
    config = CollectConfig(sae=sae_path, data_dir=store.path, output=out, **given)
    index = FeatureIndex.open(collect.run(config))
    index.verify()
    return index


def cut_at(patch, n_rows):
    """Cut spans at the first end of a rollout after `n_rows` rows."""
    patch.setattr(spans, "_ROWS", n_rows)
    patch.setattr(spans, "_ROWS_PER_LATENT", 0)


def context(store, row, reach=5, after=5):
    first, last = store.rollout_start[store.rollout_of(np.array([row]))[0] :][:2].tolist()
    around = range(row - reach, row + after + 1)
    return tuple(int(store.token_ids[r]) if first <= r < last else None for r in around)


def best_by_sorting(store, code, latent, k, per_rollout, collapse, after=5):
    """Return the rows of the examples by their definition, one firing at a time."""
    order = np.lexsort((np.arange(len(code)), -code[:, latent]))
    rows = [int(row) for row in order if code[row, latent] > 0]
    taken: dict[int, list] = {}
    able = []
    for row in rows:
        mine = taken.setdefault(int(store.rollout_of(np.array([row]))[0]), [])
        words = context(store, row, after=after) if collapse else row
        if words not in mine and (not per_rollout or len(mine) < per_rollout):
            mine.append(words)
            able.append((row, words))
    seen, best = set(), []
    for row, words in able if per_rollout else [(r, context(store, r, after=after)) for r in rows]:
        if not collapse or words not in seen:
            seen.add(words)
            best.append(row)
    return best[:k]


@pytest.mark.parametrize(
    ("per_rollout", "same_context"),
    [
        (0, "keep"),
        (3, "collapse"),
        pytest.param(0, "collapse", marks=pytest.mark.slow),
        pytest.param(1, "collapse", marks=pytest.mark.slow),
        pytest.param(1, "keep", marks=pytest.mark.slow),
        pytest.param(3, "keep", marks=pytest.mark.slow),
    ],
)
def test_examples_are_those_of_the_definition(tmp_path, monkeypatch, per_rollout, same_context):
    cut_at(monkeypatch, 1)
    words = np.tile(np.arange(1, 8), 40)[:40]  # the same words again and again in every rollout
    store = store_of_ties(tmp_path / "store", token_ids=np.tile(words, 6), n_special=6)
    sae = make_sae(tmp_path / "sae", threshold=0.5)
    index = made(
        store,
        tmp_path / "sae",
        tmp_path / "f.h5",
        top_k=7,
        max_per_rollout=per_rollout,
        same_context=same_context,
        batch_size=17,
    )
    code = dense_code(store, sae)
    n_examples, n_special = 0, 0
    for latent in range(sae.d_sae):
        kinds = (per_rollout, same_context == "collapse")
        special = np.where(store.eligible[:, None], 0, code)
        best = best_by_sorting(store, special, latent, accumulators.N_SPECIAL, *kinds, after=0)
        assert [e.row for e in index[latent].at_special] == best
        n_special += len(best)
        best = best_by_sorting(store, code - special, latent, 7, *kinds)
        examples = index[latent].examples
        assert [e.row for e in examples] == best
        n_examples += len(best)
        for e in examples[:2]:
            like = [
                r
                for r in np.flatnonzero(store.eligible)
                if context(store, r) == context(store, e.row)
            ]
            assert e.n_alike == len(like)
    assert n_examples > 40
    assert n_special > 20


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    store = store_of_ties(folder / "store", n_rollouts=12)
    make_sae(folder / "sae", threshold=0.5)
    return store, folder / "sae"


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(batch_size=st.integers(1, 300), span=st.integers(1, 300), per_shard=st.integers(1, 12))
def test_spans_shards_and_batches_change_no_byte(
    shared, tmp_path_factory, batch_size, span, per_shard
):
    store, sae = shared
    folder = tmp_path_factory.mktemp("cut")
    other = store_of_ties(folder / "store", n_rollouts=12, rollouts_per_shard=per_shard)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, span)
        cut = made(other, sae, folder / "cut.h5", batch_size=batch_size)
    whole = made(store, sae, folder / "whole.h5")
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(getattr(cut, name), array, err_msg=name)


@pytest.mark.dist
def test_three_processes_give_the_same_bytes_as_one(shared, tmp_path):
    import subprocess
    import sys

    store, sae = shared
    made(store, sae, tmp_path / "one.h5")
    code = (
        "import sys; from lorascope.features import spans\n"
        "spans._ROWS, spans._ROWS_PER_LATENT = 1, 0\n"
        "from lorascope.cli import call; sys.exit(call(sys.argv[1:]))"
    )
    (tmp_path / "small.py").write_text(code)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
        *(str(tmp_path / "small.py"), "collect", "--data-dir", str(store.path)),
        *("--sae", str(sae), "--output", str(tmp_path / "three.h5")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "three.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert not (tmp_path / "three.h5.partial").exists()


def test_a_finished_span_is_not_scanned_again(shared, tmp_path, monkeypatch):
    store, sae = shared
    cut_at(monkeypatch, 1)
    made(store, sae, tmp_path / "calm.h5")
    scanned = []
    real = collect.scan

    def dies_at_the_fourth(span, *args, **given):
        scanned.append(span.first)
        if len(scanned) == 4:
            raise KeyboardInterrupt
        return real(span, *args, **given)

    monkeypatch.setattr(collect, "scan", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        made(store, sae, tmp_path / "f.h5")
    assert len(list((tmp_path / "f.h5.partial").glob("accumulator-*"))) == 3
    made(store, sae, tmp_path / "f.h5")
    assert sorted(scanned) == sorted([*range(12), 3])
    assert (tmp_path / "f.h5").read_bytes() == (tmp_path / "calm.h5").read_bytes()


def test_copies_of_a_context_are_one_example_with_their_count(tmp_path):
    rows = np.random.default_rng(0).standard_normal((30 * 8, 14)).astype(np.float32)
    rows[: 20 * 8] = np.tile(rows[:8], (20, 1))  # twenty rollouts of the same rows
    ids = np.random.default_rng(1).integers(1, 8, 240)
    ids[: 20 * 8] = np.tile(ids[:8], 20)
    store = write_store(tmp_path / "store", rows, n_rollouts=30, token_ids=ids)
    make_sae(tmp_path / "sae", threshold=0.5)
    index = made(store, tmp_path / "sae", tmp_path / "f.h5", max_per_rollout=0)
    counts = []
    for feature in (index[i] for i in range(len(index))):
        copies = [e for e in feature.examples if e.row < 20 * 8]
        assert len({e.row % 8 for e in copies}) == len(copies), "at most one for each position"
        counts += [e.n_alike for e in copies]
    assert len(counts) > 10
    assert min(counts) >= 20


def test_a_rollout_gives_at_most_max_per_rollout_examples(tmp_path):
    rows = np.random.default_rng(0).standard_normal((240, 14)).astype(np.float32)
    rows[40:80] *= 30
    store = write_store(tmp_path / "store", rows)
    make_sae(tmp_path / "sae", threshold=0.5)
    loud = made(store, tmp_path / "sae", tmp_path / "all.h5", max_per_rollout=0)
    fair = made(store, tmp_path / "sae", tmp_path / "few.h5", max_per_rollout=2)
    assert (loud.example_rollout == 1).mean() > 0.9
    for latent in range(len(fair)):
        rollouts = [e.rollout for e in fair[latent].examples]
        assert max(map(rollouts.count, rollouts)) <= 2
        assert len(rollouts) == 10


def test_roles_that_are_not_selected_are_in_no_example_and_no_statistic(tmp_path):
    roles = np.full(240, ROLES.index("answer"), np.uint8)
    roles[np.arange(240) % 40 < 20] = ROLES.index("user")
    store = write_store(tmp_path / "store", n_rollouts=6, length=40, roles=roles)
    sae = make_sae(tmp_path / "sae")
    index = made(store, tmp_path / "sae", tmp_path / "f.h5", roles=("answer",))
    with pytest.raises(ConfigError, match="unknown role anwser.*answer"):
        made(store, tmp_path / "sae", tmp_path / "g.h5", roles=("anwser",))
    counted = store.roles == ROLES.index("answer")
    for rows in (index.example_row, index.sample_row):
        assert counted[rows].all()
    assert index.content["n_eligible"] == counted.sum()
    np.testing.assert_array_equal(
        index.latent_n_active, (dense_code(store, sae)[counted] > 0).sum(0)
    )
    assert index.content["n_by_role"][ROLES.index("user")] == 0


def test_rollouts_of_one_token_and_a_long_one_are_read(tmp_path):
    layout = layout_of()
    store = write_store(tmp_path / "one", n_rollouts=5, length=1, n_special=0, layout=layout)
    make_sae(tmp_path / "sae", layout, threshold=0.1)
    index = made(store, tmp_path / "sae", tmp_path / "f.h5")
    assert index.content["n_tokens"] == 5
    assert set(np.diff(index.window_offset).tolist()) == {1}
    long = write_store(tmp_path / "long", n_rollouts=1, length=3000, layout=layout)
    index = made(long, tmp_path / "sae", tmp_path / "g.h5", batch_size=64)
    assert index.content["n_rollouts"] == 1
    assert max(index.n_examples) == 3  # max_per_rollout


@pytest.mark.slow
def test_memory_does_not_grow_with_the_store(tmp_path):
    """Ten times the rows keep the same number of firings of each latent."""
    sizes = []
    for n_rollouts in (40, 400):
        store = write_store(tmp_path / f"{n_rollouts}", n_rollouts=n_rollouts, length=50)
        sae = make_sae(tmp_path / f"sae{n_rollouts}", threshold=0.3)
        empty = accumulators.Accumulator.empty(sae.d_sae, len(store.vocabulary), 5, None)
        (span,) = spans.cut_spans(store, n_rollouts, sae.d_sae)
        for _ in accumulators.scan(span, sae, empty, 256, collapse=False, reach=5):
            waiting = empty.top._n_buffered + empty.sample._n_buffered
            assert waiting <= empty.top._buffer_size + empty.sample._buffer_size + 256 * sae.d_sae
        sizes.append(len(empty.top.sorted().row) + len(empty.sample.sorted().row))
    assert sizes[0] == sizes[1] == 24 * (5 + accumulators.N_SAMPLED)


def test_spans_cache_no_array_between_uses(shared, tmp_path, monkeypatch):
    """Otherwise memory would grow with the store."""
    cut_at(monkeypatch, 1)
    used = []
    real = collect.cut_spans
    monkeypatch.setattr(collect, "cut_spans", lambda *args: used.extend(real(*args)) or used)
    made(*shared, tmp_path / "f.h5")
    assert len(used) == 12
    assert {name for span in used for name in vars(span)} == {
        "store",
        "first",
        "last",
        "only_roles",
    }


def test_codes_in_whole_rollouts_are_those_of_the_sae(tmp_path):
    store = write_store(tmp_path / "store")
    sae = make_sae(tmp_path / "sae")
    index = made(store, tmp_path / "sae", tmp_path / "f.h5", rollout_tokens=130)
    assert len(index.text_rollout) == 3  # of 40 tokens each
    code = dense_code(store, sae)
    for i, rollout in enumerate(index.text_rollout.tolist()):
        rows = slice(rollout * 40, rollout * 40 + 40)
        tokens = slice(*index.text_offset[i : i + 2].tolist())
        np.testing.assert_array_equal(index.text_token_id[tokens], store.token_ids[rows])
        bounds = index.text_code_offset[tokens.start : tokens.stop + 1]
        mine = np.zeros((40, sae.d_sae), np.float32)
        fired = slice(int(bounds[0]), int(bounds[-1]))
        mine[np.repeat(np.arange(40), np.diff(bounds)), index.text_latent[fired]] = (
            index.text_value[fired]
        )
        np.testing.assert_array_equal(mine, code[rows])
        fires = code[rows][store.eligible[rows]] > 0
        assert index.text_l0[i] == pytest.approx(fires.sum(1).mean())
        density = index.latent_n_active / index.content["n_eligible"]
        rarity = -np.log10(density[np.nonzero(fires)[1]]).mean()
        assert index.text_rarity[i] == pytest.approx(rarity)
        x = torch.from_numpy(np.array(store.rows(rows.start, rows.stop)))[store.eligible[rows]]
        error = (x - sae.decode(sae.encode(x))).square().sum()
        assert index.text_fvu[i] == pytest.approx(float(error / (x - sae.b_dec).square().sum()))
    assert index.text_why.all()


def test_the_rollout_that_fires_most_is_kept_whole(tmp_path):
    rows = np.random.default_rng(0).standard_normal((240, 14)).astype(np.float32)
    rows[80:120] *= 3
    store = write_store(tmp_path / "store", rows)
    make_sae(tmp_path / "sae")
    index = made(store, tmp_path / "sae", tmp_path / "f.h5", rollout_tokens=45)
    assert index.text_rollout.tolist() == [2]
    assert index.text_why[0] & 1
    none = made(store, tmp_path / "sae", tmp_path / "g.h5", rollout_tokens=0)
    assert len(none.text_rollout) == 0
