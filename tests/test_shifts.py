"""The tokens whose probability an adapter moves: their terms are all of KL, and nothing else."""

import math

import numpy as np
import pytest
import torch

from lorascope.causal import shifts
from lorascope.causal.effects import kl_divergence
from lorascope.causal.shifts import ShiftAccumulator
from lorascope.texts.roles import ROLES

THINK, ANSWER = ROLES.index("think"), ROLES.index("answer")
RISES, FALLS = 0, 1


def log_p(*probabilities: list[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()


def test_terms_are_those_of_the_definition() -> None:
    found = ShiftAccumulator()
    found.add(
        log_p([0.9, 0.1]), log_p([0.1, 0.9]), np.array([7]), np.array([THINK], dtype=np.uint8)
    )
    rise, fall = 0.9 * math.log(9) - 0.8, 0.1 * math.log(1 / 9) + 0.8
    assert found.sums[RISES, THINK].tolist() == pytest.approx([rise, 0], rel=1e-5)
    assert found.sums[FALLS, THINK].tolist() == pytest.approx([0, fall], rel=1e-5)
    assert found.sums[:, ANSWER].sum() == 0
    assert found.total == pytest.approx(0.8 * math.log(9), rel=1e-5)


def test_terms_of_all_predictions_add_up_to_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(50, 31, generator=generator).mul(3).log_softmax(-1) for _ in range(2))
    rows = np.arange(50)
    roles = np.where(rows % 3 == 0, THINK, ANSWER).astype(np.uint8)
    whole, parts = ShiftAccumulator(), ShiftAccumulator()
    whole.add(p, q, rows, roles)
    monkeypatch.setattr(shifts, "_CHUNK", 31 * 4)
    for some in np.array_split(rows[::-1], 3):
        parts.add(p[some.copy()], q[some.copy()], rows[some], roles[some])
    assert whole.total == pytest.approx(float(kl_divergence(p, q).double().sum()), rel=1e-5)
    assert np.allclose(whole.sums, parts.sums, rtol=1e-12)
    assert np.array_equal(whole.best_row, parts.best_row)


def test_a_token_that_one_side_excludes_is_counted() -> None:
    found = ShiftAccumulator()
    p, q = log_p([1.0, 0.0]), log_p([0.5, 0.5])
    found.add(p, q, np.array([0]), np.array([THINK], dtype=np.uint8))
    assert found.total == pytest.approx(math.log(2), rel=1e-5)
    assert found.sums[FALLS, THINK, 1] == pytest.approx(0.5, rel=1e-5)


def test_equal_predictions_shift_nothing() -> None:
    found = ShiftAccumulator()
    same = log_p([0.25, 0.75])
    found.add(same, same, np.array([0]), np.array([THINK], dtype=np.uint8))
    assert found.total == 0
