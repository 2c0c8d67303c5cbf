import numpy as np
import pytest
import torch
from builders.saes import plain_layout, random_rows, random_sae
from builders.stores import layout_of

from lorascope.errors import ArtifactError
from lorascope.sae.metrics import ColumnMoments, evaluate, fvu
from lorascope.sae.model import SAE
from lorascope.sites import Site, SiteLayout


def exact_sae(threshold=0.0) -> SAE:
    """An SAE of 3 columns that reconstructs every row: one latent for each sign of each column."""
    layout = plain_layout(3)
    eye = torch.eye(3)
    sae = random_sae(3, 6, layout=layout)
    weights = {
        "W_enc": torch.cat([eye, -eye], 1),
        "b_enc": torch.zeros(6),
        "W_dec": torch.cat([eye, -eye]),
        "b_dec": torch.zeros(3),
        "threshold": torch.full((6,), threshold),
    }
    return SAE(**{**vars(sae), **weights}).sealed()


def test_perfect_reconstruction_has_fvu_0_and_cosine_1():
    report = evaluate(exact_sae(), [random_rows(50, 3)])
    assert report["fvu"] == report["fvu_raw"] == 0.0
    assert report["cosine"] == pytest.approx(1.0)
    assert report["l0"] == 3.0
    assert (report["alive"], report["never_fired"]) == (6, 0.0)


def test_the_mean_predictor_has_fvu_1():
    rows = random_rows(50, 3) + 100
    sae = exact_sae(threshold=1e9)
    mean = rows.double().mean(0).float()
    report = evaluate(SAE(**{**vars(sae), "b_dec": mean}), [rows])
    assert report["fvu"] == pytest.approx(1.0, abs=1e-9)
    assert (report["l0"], report["alive"], report["never_fired"]) == (0.0, 0, 1.0)
    assert report["density"]["never"] == 6


def test_three_rows_by_hand():
    """Threshold 1: row (2, 0, 0) is kept, (0, 1, 0) is lost, (0, 0, -3) is kept.

    Residual 1. Mean (2/3, 1/3, -1), spread 4 + 1 + 9 - 3 * (4/9 + 1/9 + 1) = 14 - 14/3.
    """
    rows = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, -3]])
    report = evaluate(exact_sae(threshold=1.0), [rows])
    assert report["fvu"] == pytest.approx(1 / (14 - 14 / 3))
    assert report["n_rows"] == 3
    assert report["l0"] == pytest.approx(2 / 3)
    assert report["alive"] == 2
    assert report["cosine"] == 1.0  # the lost row is reconstructed as zero: it has no direction
    assert report["density"] == {
        "never": 4, "1e-6": 0, "1e-5": 0, "1e-4": 0, "1e-3": 0, "1e-2": 0, "1e-1": 2
    }  # fmt: skip
    assert report["worst_columns"][0] == {"column": "1.gate_proj", "fvu": pytest.approx(1.5)}


def test_the_metrics_do_not_depend_on_how_the_rows_are_cut():
    sae, rows = random_sae(), random_rows(261, 14) * 10 + 50
    whole = evaluate(sae, [rows])
    for size in (3, 64, 260):
        cut = evaluate(sae, rows.split(size))
        for name in ("fvu", "fvu_raw", "fvu_effect", "l0", "cosine", "never_fired"):
            assert cut[name] == pytest.approx(whole[name], rel=1e-10)


def test_every_unit_agrees_with_numpy():
    layout = layout_of()
    scale = np.linspace(0.1, 3, 14)
    sae = random_sae(layout=layout).sealed(scale=scale.tolist())
    rows = random_rows(100, 14)
    x = rows.double().numpy()
    x_hat = sae.decode(sae.encode(rows)).double().numpy()
    report = evaluate(sae, [rows])
    units = {"fvu": scale.astype(np.float32), "fvu_raw": 1.0, "fvu_effect": layout.effect_scale}
    for name, unit in units.items():
        a, b = x * unit, x_hat * unit
        expected = ((a - b) ** 2).sum() / ((a - a.mean(0)) ** 2).sum()
        assert report[name] == pytest.approx(expected, rel=1e-6)
    a, b = x * units["fvu"], x_hat * units["fvu"]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert report["cosine"] == pytest.approx(cosine.mean(), rel=1e-6)


def test_effect_units_are_not_claimed_where_b_is_unknown():
    sites = [Site(layer=0, projection="q_proj"), Site(layer=0, projection="o_proj", b_norms=(2.0,))]
    sae = random_sae(2, 6, layout=SiteLayout.from_sites(sites))
    assert evaluate(sae, [random_rows(5, 2)])["fvu_effect"] is None


def test_rows_that_do_not_vary_have_no_fvu():
    assert evaluate(exact_sae(), [torch.ones(4, 3)])["fvu"] is None
    assert fvu(np.ones(2), np.zeros(2)) is None


def test_no_rows_are_refused():
    for blocks in ([], [torch.zeros(0, 3)]):
        with pytest.raises(ArtifactError, match="no held-out rows"):
            evaluate(exact_sae(), blocks)
    with pytest.raises(ArtifactError, match="no rows to measure"):
        ColumnMoments.from_blocks([])


def test_moments_keep_their_digits_where_the_mean_is_large():
    rows = random_rows(1000, 4).double()
    rows = (rows * torch.tensor([1e-3, 1, 10, 0]) + torch.tensor([1e3, 0, -5, 7])).float()
    moments = ColumnMoments.from_blocks(rows.split(33))
    x = rows.double().numpy()
    assert np.allclose(moments.mean, x.mean(0), rtol=1e-12)
    assert np.allclose(moments.std, x.std(0), rtol=1e-9)
    assert moments.constant.tolist() == [False, False, False, True]
