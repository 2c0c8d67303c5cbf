import numpy as np
import pytest
from builders.stores import layout_of
from hypothesis import given
from hypothesis import strategies as st

from lorascope.errors import ArtifactError, ConfigError
from lorascope.sites import (
    PROJECTIONS,
    Site,
    SiteLayout,
    in_column_order,
    join_initials,
    name_modules,
    parse_adapter_types,
)


def test_columns_are_layer_major_and_gate_up_down_q_k_v_o_inside():
    sites = [Site(layer=i, projection=p) for p in reversed(PROJECTIONS) for i in (1, 0)]
    layout = SiteLayout.from_sites(sites)
    assert layout.column_names[:8] == (
        "0.gate_proj", "0.up_proj", "0.down_proj", "0.q_proj", "0.k_proj", "0.v_proj", "0.o_proj",
        "1.gate_proj",
    )  # fmt: skip


@pytest.mark.parametrize(("types", "d_in"), [(PROJECTIONS[:3], 192), (PROJECTIONS, 448)])
def test_sixty_four_layers_give_192_and_448_columns(types, d_in):
    layout = SiteLayout.from_sites([Site(layer=i, projection=p) for i in range(64) for p in types])
    assert layout.d_in == d_in
    assert layout.initials == ("g-u-d" if d_in == 192 else "g-u-d-q-k-v-o")
    chosen, columns = layout.select(["down_proj"])
    assert chosen.d_in == 64
    assert [layout.column_names[c] for c in columns] == list(chosen.column_names)


def test_layer_ten_comes_after_layer_nine():
    layout = SiteLayout.from_sites([Site(layer=i, projection="q_proj") for i in (10, 9)])
    assert layout.column_names == ("9.q_proj", "10.q_proj")


def test_a_rank_above_one_names_its_columns_by_rank_index():
    layout = SiteLayout.from_sites(
        [
            Site(layer=0, projection="q_proj", rank=2, scale=3.0, b_norms=(1.0, 2.0)),
            Site(layer=0, projection="up_proj"),
        ]
    )
    assert layout.column_names == ("0.up_proj", "0.q_proj:0", "0.q_proj:1")
    np.testing.assert_array_equal(layout.effect_scale, [1, 3, 6])


def test_json_keeps_the_layout_and_any_change_changes_it():
    layout = layout_of()
    assert SiteLayout.from_json(layout.to_json()) == layout
    assert layout_of(adapter="b" * 64).to_json() != layout.to_json()
    assert layout_of(seed=1).to_json() != layout.to_json()


def test_other_adapters_and_other_columns_are_refused_with_both_sides_named():
    with pytest.raises(ArtifactError, match=r"here.* 14.*there.* 21.*different adapters"):
        layout_of(2).require_same(layout_of(3), "here", "there")
    with pytest.raises(ArtifactError, match="aaaa.*bbbb"):
        layout_of().require_same(layout_of(adapter="b" * 64), "here", "there")
    layout_of().require_same(layout_of(adapter=None, seed=3), "here", "there")


def test_a_projection_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ConfigError, match=r"qkv_proj is not among.*gate_proj"):
        layout_of().select(["qkv_proj"])


@pytest.mark.parametrize(
    ("given_names", "expected"),
    [
        (["g-u-d"], PROJECTIONS[:3]),
        (["down_proj", "gate_proj"], ("gate_proj", "down_proj")),
        (["mlp"], PROJECTIONS[:3]),
        (["attention", "gate"], ("gate_proj", "q_proj", "k_proj", "v_proj", "o_proj")),
        (["all"], PROJECTIONS),
        (["q,k", "o_proj"], ("q_proj", "k_proj", "o_proj")),
        (["qkv_proj", "up"], ("up_proj", "qkv_proj")),
        (["attn.c_proj", "c_attn"], ("attn.c_proj", "c_attn")),
        (["o-attn.c_proj-query_key_value"], ("o_proj", "attn.c_proj", "query_key_value")),
        ([], ()),
    ],
)
def test_adapter_types_are_read_from_names_initials_and_groups(given_names, expected):
    assert parse_adapter_types(given_names) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("gate", ("gate",)),
        ("g", ("gate_proj",)),
        ("gate_proj", ("gate_proj",)),
        ("q", ("q",)),
        ("w-1", ("w-1",)),
        ("up,q", ("up_proj", "q")),
        ("mlp", PROJECTIONS[:3]),
        ("all", ("gate_proj", "gate", "q", "w-1")),
    ],
)
def test_names_of_the_model_come_before_initials(word, expected):
    assert parse_adapter_types([word], ["gate_proj", "gate", "q", "w-1"]) == expected


OTHERS = ("c_attn", "attn.c_proj", "mlp.c_proj", "qkv_proj", "query_key_value", "lm_head")
INITIALS = ("g", "gate", "up", "down", "q", "k", "v", "o", "mlp")


@given(st.sets(st.sampled_from(PROJECTIONS + OTHERS + INITIALS), min_size=1))
def test_initials_name_the_same_projections_when_read_back(types):
    joined = join_initials(in_column_order(types))
    assert set(parse_adapter_types([joined], types)) == types


def test_every_set_of_projections_has_initials_of_its_own():
    names = [(), ("q",), ("q_proj",), ("q", "q_proj"), ("gate",), ("gate_proj",)]
    assert len({join_initials(in_column_order(types)) for types in names}) == len(names) - 1


@pytest.mark.parametrize("damage", [{"sites": [{"layer": 0}]}, {"adapter": 5}, {"adapter": ["a"]}])
def test_a_damaged_layout_is_one_line(damage):
    whole = SiteLayout(()).to_json()
    assert SiteLayout.from_json(whole) == SiteLayout(())
    with pytest.raises(ArtifactError, match="layout is damaged"):
        SiteLayout.from_json({**whole, **damage})


def named(*paths):
    return {path: f"{layer}:{name}" for path, (layer, name) in name_modules(paths).items()}


def test_modules_are_named_by_their_last_part():
    paths = [f"model.layers.{i}.{p}" for i in (0, 10) for p in ("mlp.up_proj", "self_attn.q_proj")]
    assert list(named(*paths).values()) == ["0:up_proj", "10:up_proj", "0:q_proj", "10:q_proj"]


def test_modules_of_one_last_part_in_a_layer_are_named_by_more_of_their_paths():
    # GPT-2; the second layer has only one of the two, and its name is of the same form
    names = named("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "h.0.attn.c_attn")
    assert names == {
        "h.0.attn.c_proj": "0:attn.c_proj",
        "h.0.mlp.c_proj": "0:mlp.c_proj",
        "h.1.mlp.c_proj": "1:mlp.c_proj",
        "h.0.attn.c_attn": "0:c_attn",
    }


def test_experts_and_shared_experts_are_told_apart():
    paths = [f"layers.3.mlp.{p}.up_proj" for p in ("experts.0", "experts.1", "shared_expert")]
    assert list(named(*paths).values()) == [
        "3:experts.0.up_proj",
        "3:experts.1.up_proj",
        "3:mlp.shared_expert.up_proj",
    ]


def test_modules_outside_layers_and_in_two_towers_are_named_by_their_whole_paths():
    assert named("lm_head", "model.layers.0.self_attn.q_proj")["lm_head"] == "-1:lm_head"
    towers = [f"{tower}.layers.0.self_attn.q_proj" for tower in ("text", "vision")]
    assert list(named(*towers).values()) == [f"0:{path}" for path in towers]


@given(
    st.sets(
        st.lists(st.sampled_from(["a", "b", "0", "1", "c_proj"]), min_size=1, max_size=5).map(
            lambda parts: ".".join([*parts, "p"])
        )
    )
)
def test_no_two_modules_share_layer_and_name_and_the_order_of_paths_is_nothing(paths):
    names = name_modules(paths)
    assert len(set(names.values())) == len(paths) == len(names)
    assert names == name_modules(sorted(paths, reverse=True))


def test_sites_of_different_gauges_never_meet():
    plain = SiteLayout.from_sites([Site(layer=0, projection="q_proj", rank=2)], "a" * 64)
    svd = SiteLayout.from_sites([Site(layer=0, projection="q_proj", rank=2, gauge="svd")], "a" * 64)
    with pytest.raises(ArtifactError, match=r"store has 0\.q_proj in gauge raw, sae in svd"):
        plain.require_same(svd, "store", "sae")
    svd.require_same(SiteLayout.from_json(svd.to_json()), "here", "there")


def test_lora_kind_and_gauge_are_written_only_if_an_older_version_must_refuse_the_layout():
    plain = layout_of()
    assert plain.to_json()["sites"][0].keys() == {
        "layer", "projection", "rank", "module", "scale", "b_norms"
    }  # fmt: skip
    site = Site(layer=0, projection="q_proj", lora_kind="dora", gauge="svd")
    layout = SiteLayout.from_sites([site])
    assert SiteLayout.from_json(layout.to_json()).sites == (site,)


def test_a_joint_layout_names_the_adapter_of_each_column_in_rising_order():
    layout = SiteLayout((Site(layer=0, projection="q_proj"),), "a")
    with pytest.raises(ValueError, match="column order"):
        SiteLayout.joint({"B": layout, "A": layout})
    both = SiteLayout.joint({"A": layout, "B": layout})
    assert both.column_names == ("A:0.q_proj", "B:0.q_proj")
    assert both.columns_of("B").tolist() == [1]
    assert SiteLayout.from_json(both.to_json()) == both
    with pytest.raises(ArtifactError, match="of the adapters A, C"):
        both.require_same(SiteLayout.joint({"A": layout, "C": layout}), "here", "there")
