"""How far apart two computations of the same number may be.

A sum of n products may be added in any order, in blocks, with or without fused multiplication: it
depends on the processor, the number of threads and the library. In every order the result is within
n · eps · Σ|terms| of the exact sum (Higham, Accuracy and Stability of Numerical Algorithms, 4.2).
The typical error is √n times smaller, so the largest absolute result may stand for Σ|terms|.
"""

import math
from typing import Any

import numpy as np
import torch


def rounding(n_terms: float, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> float:
    """Return how far apart two sums of `n_terms` terms may be, whose results are of size `scale`.

    Where sums follow each other, as in the layers of a model, `n_terms` is the sum of their
    lengths.
    """
    return n_terms * torch.finfo(dtype).eps * scale


def kl_rounding(kl: float, of_logits: float) -> float:
    """Return how far apart two computations of a KL may be, whose logits differ by `of_logits`.

    The slope of KL(p ‖ q) in the logits of q is q − p, of which Σ|q − p| ≤ √(2·KL) (Pinsker); in
    the logits of p it is of the same size. The second-order term is what is left at KL = 0.
    """
    return 2 * math.sqrt(2 * abs(kl)) * of_logits + of_logits**2


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, np.float64)


def assert_same_up_to_rounding(
    actual: Any,
    expected: Any,
    *,
    n_terms: float,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Check that two arrays or numbers differ by no more than the order of additions explains.

    `dtype` is the coarser one of the two computations, `scale` the size of the values that were
    added: the largest of `expected` unless given. Give it where the result is a small difference of
    large values.
    """
    found, wanted = _array(actual), _array(expected)
    assert found.shape == wanted.shape, f"shape {found.shape}, expected {wanted.shape}"
    largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
    allowed = rounding(n_terms, largest if scale is None else scale, dtype)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=allowed)
