"""The view of one feature, by mouse and by keyboard."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders.indexes import example, feature_with, full_index, index_of, small_index

from lorascope.features.arrays import RANKINGS


def numbers(shown: Any, selector: str) -> list[float]:
    found = shown.page.locator(selector).evaluate_all("nodes => nodes.map(n => n.dataset.value)")
    return [float(value) for value in found]


@pytest.mark.slow
def test_samples_of_each_fifth_are_shown_below_the_examples(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: len(feature.samples) > 4)
    shown = show(index, f"#/feature/{latent}")
    shown.page.wait_for_selector(f"[data-complete='{latent}']")
    samples = index[latent].samples
    assert numbers(shown, "[data-testid=sample-value]") == [s.value for s in samples]
    titles = shown.part("samples").locator("h4").all_text_contents()
    assert titles[0] == "strongest fifth"
    assert len(titles) == len({sample.quantile for sample in samples})


@pytest.mark.slow
def test_a_template_feature_says_so_and_shows_its_special_tokens_first(show: Any):
    index = full_index()
    latents = range(len(index))
    alone = next(i for i in latents if index.stats(i).is_template and not index.n_examples[i])
    mostly = next(i for i in latents if index.stats(i).is_template and index.n_examples[i])
    seldom = next(i for i in latents if not index.stats(i).is_template and index[i].at_special)
    titles = [
        "At special and template tokens",
        "Strongest examples",
        "Examples from strong to weak",
    ]
    for latent, order in (
        (alone, titles[:1]),
        (mostly, titles[:2]),
        (seldom, titles[1:] + titles[:1]),
    ):
        shown = show(index, f"#/feature/{latent}")
        shown.page.wait_for_selector(f"[data-complete='{latent}']")
        stats = index.stats(latent)
        values = [e.value for e in index[latent].at_special]
        assert numbers(shown, "[data-testid=special-example-value]") == values
        assert numbers(shown, "[data-testid=stat-n_special]") == [stats.n_special]
        found = shown.page.locator(".feature-main h3").all_text_contents()
        assert [title for title in order if title in found] == [t for t in found if t in order]
        assert set(order) <= set(found)
        special = shown.part("at-special").locator(".target").all_text_contents()
        assert special == ["<|im_start|>"] * len(values)
        badge, note = (
            shown.part("template"),
            shown.part("row").and_(shown.page.locator("[aria-selected=true]")).locator(".row-note"),
        )
        if stats.is_template:
            n_active = stats.n_active or 0
            assert f"{stats.n_special} of its {stats.n_special + n_active} firings" in shown.text(
                "template"
            )
            assert note.text_content() == "template"
        else:
            assert badge.count() == 0
        assert shown.part("no-examples").count() == 0


@pytest.mark.slow
def test_one_word_from_right_to_left_does_not_mirror_its_text(show: Any):
    tokens = {1: "\u0633\u0644\u0627\u0645".encode(), 2: b" is a greeting", 3: b" in Arabic"}
    shown = show(index_of([[example(2.0, 9, [1, 2, 3], 0)]], tokens))
    assert shown.part("window").evaluate("one => getComputedStyle(one).direction") == "ltr"
    only = index_of([[example(2.0, 9, [1, 1], 0)]], tokens)
    shown = show(only)
    assert shown.part("window").evaluate("one => getComputedStyle(one).direction") == "rtl"


def test_bars_show_how_far_the_first_example_is_above_the_others(show: Any):
    values = (12.0, 3.0, 1.5)
    rows = [example(value, 9 + 10 * i, [1, 2], 0) for i, value in enumerate(values)]
    shown = show(index_of([rows]))
    widths = (
        shown.part("example-share")
        .locator(".meter-fill")
        .evaluate_all("bars => bars.map(bar => bar.getBoundingClientRect().width)")
    )
    assert [round(width / widths[0], 2) for width in widths] == [1, 0.25, 0.12]
    titles = [bar.get_attribute("title") for bar in shown.part("example-share").all()]
    assert titles[1] == "25\u00a0% of the feature's maximum"


def test_the_first_example_is_on_the_first_screen_of_a_phone(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: not feature.stats.is_template)
    shown = show(index, f"#/feature/{latent}", width=390)
    box = shown.part("example").first.bounding_box()
    assert box["y"] + 60 < 800
    assert shown.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_repeated_tokens_are_shown_once_with_their_count(show: Any):
    shown = show(small_index())
    assert shown.part("repeats").all_text_contents() == ["×3"]
    assert shown.part("repeats").get_attribute("aria-label") == "occurs 3 times"


def test_token_rankings_and_densities_by_role_match_the_index(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: all(feature.tokens.values()))
    shown = show(index, f"#/feature/{latent}")
    for name in RANKINGS:
        panel = f"[data-testid=ranked-{name}]"
        shown.page.wait_for_selector(panel)
        expected = index.ranked_tokens(latent, name)
        texts = shown.page.locator(f"{panel} .ranked-token").all_text_contents()
        assert texts == [text for text, _ in expected]
        np.testing.assert_allclose(
            numbers(shown, f"{panel} .meter-value"), [s for _, s in expected], rtol=1 / 256
        )
    for role, share in index[latent].stats.by_role.items():
        found = shown.part(f"role-{role}")
        if found.count():
            assert float(found.get_attribute("data-value")) == pytest.approx(share)


@pytest.mark.slow
def test_links_to_neighbours_work_by_mouse_and_keyboard(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: feature.similar and feature.cofiring)
    shown = show(index, f"#/feature/{latent}")
    near, cosine = index[latent].similar[0]
    link = shown.part("similar").locator("a").first
    assert link.get_attribute("data-feature") == str(near)
    np.testing.assert_allclose(
        numbers(shown, "[data-testid=similar] .meter-value")[0], cosine, rtol=1 / 256
    )
    link.click()
    shown.wait_for(near)
    assert shown.page.evaluate("scrollY") == 0, "another feature begins at its top"
    shown.page.go_back()
    shown.wait_for(latent)
    shown.part("cofiring").locator("a").first.focus()
    shown.press("Enter")
    shown.wait_for(index[latent].cofiring[0][0])


@pytest.mark.slow
def test_the_grid_of_sites_tells_shares_on_hover_and_arrow_keys(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: len([*feature.fingerprint]) > 3)
    shares = index.latent_fingerprint[latent].astype(float)
    site = index.manifest.columns.sites[int(shares.argmax())]
    shown = show(index, f"#/feature/{latent}")
    assert f"{site.layer}.{site.projection}" in shown.text("fingerprint-most")
    best = shown.part("fingerprint").locator("rect[tabindex='0']")
    best.hover()
    place = f"layer {site.layer}, {site.projection}"
    assert place in shown.text("tooltip")
    told = float(shown.text("tooltip").partition(": ")[2].split("\u00a0")[0])
    assert told == pytest.approx(100 * shares.max(), rel=0.01)
    shown.page.mouse.move(0, 0)
    shown.part("fingerprint").locator("summary").focus()
    shown.press("Tab")
    assert place in shown.text("tooltip")
    before = shown.text("tooltip")
    for key in ("ArrowLeft", "ArrowUp", "ArrowRight", "ArrowDown"):
        shown.press(key)
    shown.press("Home")
    assert shown.text("tooltip") != before
    assert shown.text("heading") == f"Feature {latent}"


@pytest.mark.slow
def test_arrow_keys_read_the_bars_of_a_histogram(show: Any):
    index = full_index()
    latent = feature_with(index, lambda feature: feature.stats.histogram.sum() > 3)
    shown = show(index, f"#/feature/{latent}")
    shown.part("histogram").locator("summary").focus()
    told = []
    shown.press("Tab", "Home")
    used = int((index.latent_histogram_edges[:-1] <= np.nanmax(index.latent_max)).sum())
    for _ in range(used):
        told.append(shown.text("tooltip"))
        shown.press("ArrowRight")
    counts = [int(text.split(": ")[1].split()[0].replace(",", "")) for text in told]
    assert counts == index.latent_histogram[latent, :used].tolist()
    assert shown.text("tooltip") == told[-1], "bins that no feature reaches are not drawn"


@pytest.mark.slow
def test_a_long_window_is_folded_around_its_token_and_unfolds(show: Any):
    window = [1, 2] * 30
    shown = show(index_of([[example(1.0, 99, window, 31)]]))
    assert len(shown.tokens()) == 60

    def seen() -> int:
        return len([t for t in shown.part("token").all() if t.is_visible()])

    folded = seen()
    assert 3 <= folded < 60
    shown.part("unfold").click()
    assert seen() == 60
    shown.part("unfold").focus()
    shown.press("Enter")
    assert seen() == folded
    shown.page.locator("[data-target=true]").focus()
    shown.press("ArrowLeft", "Home")
    assert shown.page.evaluate("document.activeElement.getClientRects().length") == 1


def test_the_whole_rollout_of_an_example_opens(show: Any):
    shown = show(small_index())
    shown.part("open-rollout").last.click()
    shown.page.wait_for_selector("[data-testid=rollout-view][data-rollout='7']")
    assert shown.text("heading") == "Rollout 7"
    shown.page.go_back()
    shown.wait_for(0)


def test_data_that_a_published_json_lacks_has_no_panel(show: Any, tmp_path: Path):
    path = tmp_path / "features.json"
    path.write_text(
        '{"features": {"2": {"examples": [{"activation_value": 2, "tokens": ["a", " b"],'
        ' "target_position": 1, "activations": [0, 1.5]}]}}}'
    )
    shown = show(path)
    shown.page.wait_for_selector("[data-complete='2']")
    assert shown.tokens() == ["a", " b"]
    assert shown.page.locator("figure").count() == 0
    for missing in ("stat-max", "example-row"):
        assert shown.part(missing).count() == 0
    assert shown.part("samples").count() == 0
    assert not shown.part("tab-map").is_visible()
    assert not shown.part("tab-rollout").is_visible()
    assert not shown.part("role").is_visible()
    assert numbers(shown, "[data-testid=token]") == [0, 1.5]
    assert numbers(shown, "[data-testid=example-value]") == [2]
    shown.page.locator("[data-target=true]").hover()
    assert "token id" not in shown.text("tooltip")
