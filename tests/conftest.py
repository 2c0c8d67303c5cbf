"""A tiny adapted model, its tokenizer and small stores, made in memory and on disk by the tests."""

import gc
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
from builders.records import CHAT_TEMPLATE, s1_records
from builders.stores import write_store
from hypothesis import HealthCheck, settings

from lorascope.activations.store import ActivationStore
from lorascope.sites import PROJECTIONS

if TYPE_CHECKING:
    from builders.browser import Shown
    from playwright.sync_api import Browser


# A busy machine is slow: that is no failure of a test.
settings.register_profile("lorascope", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lorascope")


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the level that a command line with --quiet sets, whatever the order of the tests."""
    log = logging.getLogger("lorascope")
    level = log.level
    yield
    log.setLevel(level)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Hide what collecting imports from the garbage collector: each pass over it takes 0.3 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that cannot run here: without a GPU, or without a package they need."""

    def runs_here(item: pytest.Item) -> bool:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                return False
        modules = [marker.args[0] for marker in item.iter_markers("needs")]
        return all(importlib.util.find_spec(module) for module in modules)

    kept: list[pytest.Item] = []
    deselected: list[pytest.Item] = []
    for item in items:
        (kept if runs_here(item) else deselected).append(item)
    config.hook.pytest_deselected(items=deselected)
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[Any]:
    """Escape lone surrogates in captured output: workers cannot send them."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_runtest_setup() -> None:
    """Seed the global generators, so that a test does not depend on those that ran before it."""
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer with a ChatML template, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(record.values()) for record in s1_records(20)]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[2],
        additional_special_tokens=[special[1]],
    )
    fast.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_subject(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path):
    """Return a function that saves a tiny random Qwen2 and an adapter; it returns both folders."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    def make(
        *,
        seed: int = 0,
        r: int = 1,
        n_layers: int = 2,
        hidden: int = 16,
        targets: Sequence[str] = PROJECTIONS,
        dropout: float = 0.5,
        **lora: object,
    ) -> tuple[Path, Path]:
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("subject")
        config = Qwen2Config(
            vocab_size=320,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
        base = Qwen2ForCausalLM(config)
        base.save_pretrained(folder / "base")
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder / "base")
        lora_config = LoraConfig(
            r=r,
            lora_alpha=16,
            lora_dropout=dropout,
            target_modules=list(targets),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
            **lora,
        )
        base.name_or_path = base.config._name_or_path = "../base"
        model = get_peft_model(base, lora_config)
        model.peft_config["default"].base_model_name_or_path = "../base"
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        return folder / "base", folder / "adapter"

    return make


@pytest.fixture(scope="session")
def subject_dirs(make_subject) -> tuple[Path, Path]:
    """The folders of one tiny base model and its rank-1 adapter on all seven projections."""
    return make_subject()


@pytest.fixture(scope="session")
def dataset_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 70 records in the s1 form: more than one shard."""
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in s1_records(70)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def make_store(tmp_path: Path):
    """Return `write_store` into a folder of this test: `make_store(rows, name="store", ...)`."""

    def make(rows: np.ndarray | None = None, *, name: str = "store", **given) -> ActivationStore:
        return write_store(tmp_path / name, rows, **given)

    return make


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """One browser for all tests of a process: each takes two seconds to start and to end."""
    from builders.browser import open_browser

    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def tab(browser: "Browser") -> Iterator["Shown"]:
    """One tab for the tests of a file: a new one for each would take longer than all of them."""
    from builders.browser import Shown

    with browser.new_context(offline=True) as context:  # a page has everything in its file
        shown = Shown(context.new_page(), [])
        shown.page.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        shown.page.on("console", lambda message: shown.complaints.append(message.text))
        shown.page.on("pageerror", lambda error: shown.complaints.append(str(error)))
        shown.page.on("request", lambda request: shown.complaints.append(request.url))
        yield shown


@pytest.fixture
def show(tab: "Shown", tmp_path: Path) -> Iterator[Any]:
    """Open the page of an index; at the end, the console must be clean and nothing requested."""
    from lorascope.dashboard.render import DashboardConfig, run
    from lorascope.features.index import FeatureIndex

    output = tmp_path / "page.html"

    def start(
        source: Any,
        address: str = "#/feature",
        *,
        scheme: Any = "light",
        width: int = 1200,
        effects: tuple[Path, ...] = (),
        title: str = "T",
    ) -> "Shown":
        if isinstance(source, FeatureIndex):
            source.save(tmp_path / "features.h5")
            source = tmp_path / "features.h5"
        config = DashboardConfig(
            input=source, output=output, title=title, overwrite=True, effects=effects
        )
        run(config)
        tab.page.set_viewport_size({"width": width, "height": 800})
        tab.page.emulate_media(color_scheme=scheme)
        tab.page.mouse.move(0, 0)
        tab.page.evaluate("try { localStorage.clear(); } catch {}")  # all files share it
        tab.page.goto("about:blank")  # another part of the same address would be no new page
        tab.complaints.clear()
        tab.page.goto(output.resolve().as_uri() + address, wait_until="domcontentloaded")
        tab.page.wait_for_selector("html[data-ready=true]")
        return tab

    yield start
    uri = output.resolve().as_uri()
    assert [text for text in tab.complaints if text.partition("#")[0] != uri] == []
    assert tab.page.url.partition("#")[0] == uri
    assert tab.page.evaluate("typeof window.hacked") == "undefined"
