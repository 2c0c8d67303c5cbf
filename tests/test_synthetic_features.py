"""The index that page tests and benchmarks are made of keeps the promises of a real one."""

import numpy as np
import pytest
from builders.indexes import synthetic


@pytest.mark.parametrize("n_features", [0, 1, 2, 40, 700])
def test_a_synthetic_index_keeps_every_promise(n_features: int):
    index = synthetic(n_features, 5, 4, n_texts=3, n_rollouts=20, n_layers=3)
    index.verify()
    assert len(index) == n_features


def test_an_index_of_dead_latents_keeps_every_promise():
    index = synthetic(30, 5, 4, n_texts=3, n_rollouts=20, dead=1.0)
    index.verify()
    assert index.n_examples.sum() == 0


def test_a_seed_gives_the_same_index_and_another_seed_another():
    first, again, other = (synthetic(50, 3, 3, n_rollouts=20, seed=s) for s in (1, 1, 2))
    for name, array in first.arrays.items():
        assert np.array_equal(array, again.arrays[name], equal_nan=array.dtype.kind == "f"), name
    assert not np.array_equal(first.window_token_id, other.window_token_id)


@pytest.mark.slow
def test_texts_that_are_kept_say_what_the_windows_say():
    index = synthetic(300, 8, 4, n_texts=10, n_rollouts=20)
    start = dict(zip(index.text_rollout.tolist(), index.text_offset.tolist(), strict=False))
    found = 0
    for latent in range(len(index)):
        for e in index[latent].examples:
            if e.rollout not in start:
                continue
            for i, (token_id, activation) in enumerate(
                zip(e.token_ids, e.activations, strict=True)
            ):
                at = start[e.rollout] + e.position - e.target + i
                assert index.text_token_id[at] == token_id
                fired = slice(*index.text_code_offset[at : at + 2].tolist())
                code = dict(
                    zip(
                        index.text_latent[fired].tolist(),
                        index.text_value[fired].tolist(),
                        strict=True,
                    )
                )
                if activation:
                    assert code[latent] == activation
                    found += 1
    assert found > 500
