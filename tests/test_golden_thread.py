"""One number from `A·x` to the page, on the shipped subject.

`x` is computed here in NumPy float64 from the safetensors files alone: the whole forward pass of
base and adapter, without torch, transformers or PEFT.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_problems import write_jsonl
from safetensors.numpy import load_file

from lorascope.activations import generate
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.artifact import read_manifest
from lorascope.dashboard import render
from lorascope.dashboard.render import DashboardConfig
from lorascope.demo.demo import SUBJECT
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.sae import train
from lorascope.sae.model import load_sae
from lorascope.sae.settings import TrainConfig

Array = np.ndarray[Any, np.dtype[np.float64]]


class ByHand:
    """Qwen2 with LoRA, in NumPy: `rows(token_ids)` gives `A·x` of every site by module path."""

    def __init__(self, base: Path, adapter: Path) -> None:
        self.config = json.loads((base / "config.json").read_text())
        lora = json.loads((adapter / "adapter_config.json").read_text())
        self.scale = lora["lora_alpha"] / lora["r"]
        self.base = {
            n: t.astype(np.float64) for n, t in load_file(base / "model.safetensors").items()
        }
        weights = load_file(adapter / "adapter_model.safetensors")
        self.lora = {
            n.removeprefix("base_model.model."): t.astype(np.float64) for n, t in weights.items()
        }

    def linear(self, path: str, x: Array, rows: dict[str, Array]) -> Array:
        rows[path] = x @ self.lora[f"{path}.lora_A.weight"].T
        out = x @ self.base[f"{path}.weight"].T + self.base.get(f"{path}.bias", 0.0)
        return out + self.scale * rows[path] @ self.lora[f"{path}.lora_B.weight"].T

    def norm(self, name: str, x: Array) -> Array:
        root = np.sqrt((x**2).mean(-1, keepdims=True) + self.config["rms_norm_eps"])
        return x / root * self.base[f"{name}.weight"]

    def attend(self, path: str, x: Array, rows: dict[str, Array]) -> Array:
        n, n_heads = len(x), self.config["num_attention_heads"]
        n_kv = self.config["num_key_value_heads"]
        q, k, v = (
            self.linear(f"{path}.{name}_proj", x, rows).reshape(n, heads, -1).swapaxes(0, 1)
            for name, heads in (("q", n_heads), ("k", n_kv), ("v", n_kv))
        )
        d_head = q.shape[-1]
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        angle = np.outer(np.arange(n), theta ** (-np.arange(0, d_head, 2) / d_head))
        cos, sin = (np.concatenate([f(angle)] * 2, axis=-1) for f in (np.cos, np.sin))

        def turned(z: Array) -> Array:
            first, second = np.split(z, 2, axis=-1)
            return z * cos + np.concatenate([-second, first], axis=-1) * sin

        k, v = (np.repeat(z, n_heads // n_kv, axis=0) for z in (turned(k), v))
        score = turned(q) @ k.swapaxes(1, 2) / np.sqrt(d_head)
        score[:, np.triu_indices(n, 1)[0], np.triu_indices(n, 1)[1]] = -np.inf
        weight = np.exp(score - score.max(-1, keepdims=True))
        mixed = weight / weight.sum(-1, keepdims=True) @ v
        return self.linear(f"{path}.o_proj", mixed.swapaxes(0, 1).reshape(n, -1), rows)

    def rows(self, token_ids: Any) -> dict[str, Array]:
        found: dict[str, Array] = {}
        x = self.base["model.embed_tokens.weight"][np.asarray(token_ids)]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x = x + self.attend(
                f"{layer}.self_attn", self.norm(f"{layer}.input_layernorm", x), found
            )
            y = self.norm(f"{layer}.post_attention_layernorm", x)
            gate = self.linear(f"{layer}.mlp.gate_proj", y, found)
            up = self.linear(f"{layer}.mlp.up_proj", y, found)
            x = x + self.linear(f"{layer}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up, found)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Every artifact of 24 problems."""
    folder = tmp_path_factory.mktemp("thread")
    write_jsonl(folder / "p.jsonl", 24, "demo", 5000)
    store = generate.run(
        GenerateConfig(
            lora_path=str(SUBJECT / "adapter"),
            dataset=str(folder / "p.jsonl"),
            output=folder / "store",
        )
    )
    sae = train.run(
        TrainConfig(
            data_dir=store,
            output=folder / "sae",
            expansion_factor=4,
            k=6,
            batch_size=256,
            epochs=3,
            lr="0.005",  # at twice the rate, rounding moves the weights by 5 %
        )
    )
    index = collect.run(CollectConfig(data_dir=store, sae=sae, output=folder / "features.h5"))
    page = render.run(DashboardConfig(input=index, output=folder / "page.html"))
    return store, sae, index, page


def test_one_number_is_the_same_from_the_weights_to_the_page(browser, made):
    store, sae, index = ActivationStore.open(made[0]), load_sae(made[1]), FeatureIndex.open(made[2])
    feature = max((index[i] for i in range(len(index))), key=lambda f: f.stats.max or 0.0)
    example = feature.examples[0]
    weights = read_manifest(made[0]).parents["base_weights"]
    assert sae.manifest.content["base_weights"] == weights

    # 1. weights -> row: float16 keeps 11 bits, and float32 arithmetic some more error
    rollout = int(store.rollout_of(np.array([example.row]))[0])
    start, stop = store.rollout_start[rollout : rollout + 2]
    by_hand = ByHand(SUBJECT / "base", SUBJECT / "adapter").rows(store.token_ids[start:stop])
    expected = np.concatenate([by_hand[site.module] for site in store.layout.sites], axis=1)
    stored = store.rows(start, stop).astype(np.float64)
    np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)

    # 2. row -> code: the SAE takes the raw row
    row = stored[example.row - start]
    pre = row @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    assert sae.threshold is not None
    assert pre[feature.latent] > float(sae.threshold[feature.latent])

    # 3. code -> index
    assert example.value == pytest.approx(pre[feature.latent], rel=1e-4)

    # 4. index -> page: its own value exactly, those around it within the bound that the page states
    with browser.new_context() as context:
        tab = context.new_page()
        address = made[3].resolve().as_uri() + f"#/feature/{feature.latent}"
        tab.goto(address, wait_until="domcontentloaded")
        tab.wait_for_selector(f"[data-testid=feature-view][data-feature='{feature.latent}']")
        window = tab.get_by_test_id("window").first
        shown = window.get_by_test_id("token").evaluate_all("n => n.map(t => t.dataset.value)")
        texts = window.get_by_test_id("token").all_text_contents()
    assert np.float32(shown[example.target]) == np.float32(example.value)
    windows = [np.abs(e.activations).max() for e in (*feature.examples, *feature.samples)]
    np.testing.assert_allclose(
        np.float64(shown), example.activations, rtol=0, atol=max(windows) / 32767
    )
    assert texts == list(example.tokens)
    assert "".join(texts).encode() == b"".join(store.vocabulary[i] for i in example.token_ids)


def test_every_row_of_several_texts_equals_the_weights_own_arithmetic(made):
    store = ActivationStore.open(made[0])
    model = ByHand(SUBJECT / "base", SUBJECT / "adapter")
    for rollout in (0, 11, 23):
        start, stop = store.rollout_start[rollout : rollout + 2]
        by_hand = model.rows(store.token_ids[start:stop])
        expected = np.concatenate([by_hand[site.module] for site in store.layout.sites], axis=1)
        stored = store.rows(start, stop)
        np.testing.assert_allclose(stored, expected, rtol=2e-3, atol=2e-3)
        assert np.abs(expected).max() > 0.1


TOUR = Path(__file__).parent.parent / "docs" / "tour.md"


@pytest.mark.slow
def test_every_number_of_the_tour_is_what_the_pipeline_makes(made):
    """Numbers that depend on the trained SAE may move a little between processors."""
    store, sae, index = ActivationStore.open(made[0]), load_sae(made[1]), FeatureIndex.open(made[2])
    rollout, position, latent, column = 20, 151, 127, store.layout.column_names.index("5.o_proj")
    start, stop = store.rollout_start[rollout : rollout + 2]
    row = int(start) + position
    text = b"".join(store.vocabulary[i] for i in store.token_ids[start:stop]).decode()
    h = float(store.rows(row, row + 1)[0, column])
    code = sae.encode_dense(torch.from_numpy(store.rows(row, row + 1).astype(np.float32)))[0]
    example = index.examples(latent)[0]
    measured = {
        "1. A record": store.rollout_id[rollout],
        "2. A rendered text": len(text),
        "3. A token": store.token_ids[row],
        "4. The bottleneck": h,
        "5. A row of the store": example.row,
        "6. The dictionary": h * float(sae.W_enc[column, latent]),
        "7. The code": float(code[latent]),
        "8. The strongest examples": index.stats(latent).n_active,
        "9. The feature index": float(example.activations[example.target]),
        "10. The page": example.value,
    }
    tour = TOUR.read_text(encoding="utf-8")
    stops = re.findall(
        r"^## (.+)\n(?:.*\n)*?- \*\*where\*\* `(.+)`, `(.+)`\n.*\n- \*\*number\*\* .*`(.+)`",
        tour,
        re.MULTILINE,
    )
    assert [title for title, *_ in stops] == list(measured)
    for title, file, name, stated in stops:
        found: Any = importlib.import_module(f"lorascope.{file[:-3].replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), title
        decimals = len(stated.partition(".")[2])
        printed = 0.5 * 10**-decimals if decimals else 0
        trained = 0.01 if title[:2] in ("6.", "7.", "8.", "9.", "10") else 0  # 0.002 was seen
        assert abs(float(stated) - measured[title]) <= printed + trained * abs(measured[title]), (
            title
        )
    assert store.roles[row] == 3
    assert len(store.token_ids[start:stop]) == 154
    assert store.rows(0, store.n_rows).shape == (3821, 56)
    assert sae.W_enc.shape == (56, 224)
    assert 12 <= int((code > 0).sum()) <= 14
    assert int((example.activations > 0).sum()) == 1
    assert (len(example.tokens), example.target) == (13, 10)


def test_the_path_of_a_token_is_short_and_its_files_exist():
    table = TOUR.read_text(encoding="utf-8").split("## The whole path")[1]
    rows = re.findall(r"^\| `(\w+)/` \| (.*) \|$", table, re.MULTILINE)
    files = [f"{folder}/{name}" for folder, names in rows for name in re.findall(r"`(.*?)`", names)]
    package = Path(train.__file__).parents[1]
    assert [file for file in files if not (package / file).exists()] == []
    assert 20 < len(files) <= 30
    named = set(re.findall(r"\*\*where\*\* `(.*?)`", TOUR.read_text(encoding="utf-8")))
    assert named <= set(files)
