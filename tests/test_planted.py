"""Behaviours planted in an adapter, end to end: found as features, removed with them, alone."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = Path(__file__).parent.parent / "benchmarks" / "planted.py"
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted"] = module
    spec.loader.exec_module(module)
    return module.study(tmp_path_factory.mktemp("planted"), n_texts=100, seed=0)


def test_the_adapter_does_what_was_planted_and_the_base_does_not(found):
    assert len(found["results"]) == 6
    for one in found["results"]:
        assert one["p_base"] < 0.02
        assert one["p_adapter"] > 0.9


def test_taking_out_what_was_planted_removes_it_and_only_that(found):
    """Of a dictionary that has just the planted directions: theory leaves nothing to chance."""
    for one in found["truth"]:
        assert one["f1"] > 0.95
        assert one["removed"] > 0.95
        assert one["spilt"] < 0.05


def test_attribution_names_what_was_planted(found):
    for one in found["truth"]:
        assert one["named"] == 1
    removed = [one["named"] for one in found["results"] if one["removed"] > 0.9]
    assert sum(removed) >= 0.5 * len(removed) > 0  # of the SAE's own features most are named


def test_rules_of_planted_features_name_the_planted_tokens(found):
    """The style acts at every digit of the thinking, the others at one token each."""
    for one, trigger in zip(found["truth"], found["triggers"], strict=True):
        assert one["rule_f1"] > 0.95
        if one["name"] == "style":
            assert one["rule"] == "a digit in the think segment"
        else:
            assert f'"{trigger.casefold()}"' in one["rule"]


def test_a_trained_sae_finds_planted_behaviours_and_they_go_with_its_features(found):
    assert found["recall"] >= 0.8
    assert found["precision"] >= 0.8
    for one in found["results"]:
        if one["f1"] > 0.9:
            assert one["removed"] > 0.5
