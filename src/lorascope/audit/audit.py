"""Say what a careful person wants to know of an adapter before using it.

1. Its weights are read: how much is written where, and what sites read of each other (`weights`).
2. Base and adapter read a neutral corpus that comes with lorascope, and the user's texts if there
   are any: `generate` makes a store of each.
3. On half of the rollouts the two are compared: KL(adapter ‖ base), losses, the tokens whose
   probability moves most, and how much of that a constant row does, which is fitted on the others.
4. The mean row of the first tokens of neutral texts is read through `scale·B` and the unembedding:
   what the adapter adds wherever it is (Minder et al. 2025, arXiv 2510.13900, for activations).
5. Both answer eight prompts, with the same noise (`continuation`).
6. Tokens and phrases are inserted in prompts, to find some after which the adapter does what it
   does nowhere else (`triggers`).

In: adapter, base model, texts. Out: a folder with `audit.json`, `audit.md` and `audit.html`, which
say the same, and the two stores. Nothing here is a verdict, and finding nothing proves nothing.
"""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import torch

from lorascope import runtime
from lorascope.activations import generate
from lorascope.activations.batches import read_blocks
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.audit.audit_options import AuditConfig
from lorascope.audit.audit_records import Applied, AuditReport, EffectOn, Search
from lorascope.audit.audit_report import document_of
from lorascope.audit.triggers import look_for_triggers
from lorascope.audit.weights import compare, read_alignments, read_weights, statistics
from lorascope.causal.baselines import ConstantRows, rows_of
from lorascope.causal.continuation import answers_of, zero_is_base
from lorascope.causal.direct import Readout
from lorascope.causal.effects import log_probabilities
from lorascope.causal.held_out import HeldOut, fitting_tokens, load_subject_of
from lorascope.causal.openings import openings_of
from lorascope.causal.report_records import ScoredToken
from lorascope.causal.shifts import ShiftAccumulator
from lorascope.causal.splice import Compared, Shares, SplicedBatch, of_all_batches
from lorascope.causal.study import Made, read_report, report_at
from lorascope.config import Config
from lorascope.errors import AdapterError, ConfigError, DatasetError
from lorascope.sites import SiteLayout
from lorascope.subject.base import other_base
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject
from lorascope.subject.unembedding import residual_writes

log = logging.getLogger(__name__)

NEUTRAL = Path(__file__).parent / "neutral.jsonl"
_N_ANSWERS = 8
_N_PROMOTED = 10
_FIRST = slice(1, 5)  # positions of a text whose rows are read; position 0 is often a sink


def run(config: AuditConfig) -> Path:
    """Write the report unless it is finished already, and return its page."""
    out = config.output
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output is {out}, which is a file, expected a folder")
    stores = {}
    if config.dataset is not None:
        stores["texts"] = _store(config, config.dataset, out / "texts", config.num_examples)
    stores["neutral"] = _store(config, str(NEUTRAL), out / "neutral", 1000)

    def make() -> Made:
        neutral = stores["neutral"]
        subject = load_subject_of(neutral, config, device=config.device, dtype="auto")
        search = _search(config, stores, subject)  # before inference mode: it needs gradients
        report, layout = _audit(config, stores, subject)
        content = {"n_neutral": neutral.n_rollouts}
        needs = isinstance(search, float)
        found = {"search_needs": search} if needs else {"search": search}
        return Made(dataclasses.replace(report, **found), layout, content)

    path = report_at(
        out / "audit.json",
        AuditReport,
        settings=config.settings(),
        parents={name: store.digest for name, store in stores.items()},
        overwrite=config.overwrite,
        make=make,
        table=lambda report: document_of(report).as_text(),
    )
    report, manifest = read_report(path, (AuditReport,))
    document_of(report).write(path, manifest)
    return out / "audit.html"


def _store(config: AuditConfig, dataset: str, folder: Path, n: int) -> ActivationStore:
    """Make the store of some texts unless it is there, and open it."""
    given: dict[str, Config | object] = {"dataset": dataset, "num_examples": n, "output": folder}
    if dataset == str(NEUTRAL):
        given |= {"columns": (), "split": "train"}
    options = GenerateConfig.from_shared(config, **given, skip_unhookable=True)
    store = ActivationStore.open(generate.run(options))
    if store.n_rollouts < 2:
        raise DatasetError(
            f"{dataset} has one usable text, audit needs two or more: it fits constant rows on one "
            "half of the texts and compares on the other; give more"
        )
    return store


def _halves(store: ActivationStore) -> tuple[np.ndarray, np.ndarray]:
    """Return the rollouts that are fitted or searched, and those that are compared or verified."""
    return np.arange(0, store.n_rollouts, 2), np.arange(1, store.n_rollouts, 2)


def _search(
    config: AuditConfig, stores: dict[str, ActivationStore], subject: Subject
) -> Search | float | None:
    own = stores.get("texts", stores["neutral"])
    if not config.budget:
        return None
    return look_for_triggers(subject, own, _halves(own), minutes=config.budget, seed=config.seed)


@torch.inference_mode()
def _audit(
    config: AuditConfig, stores: dict[str, ActivationStore], subject: Subject
) -> tuple[AuditReport, SiteLayout]:
    neutral = stores["neutral"]
    tokens = fitting_tokens(subject)
    halves = {name: _halves(store) for name, store in stores.items()}
    held = {
        name: HeldOut(subject, store, halves[name][1], tokens) for name, store in stores.items()
    }
    own = held.get("texts", held["neutral"])
    rows = torch.cat(list(read_blocks(neutral, np.arange(neutral.n_rows))))
    layout = neutral.layout
    with RowEditor(subject) as editor:
        effects = {
            name: _effect_on(editor, one, halves[name][0], config.seed)
            for name, one in held.items()
        }
        plain = zero_is_base(subject)
        answers = answers_of(editor, own, _N_ANSWERS, config.seed) if plain else ()
    spread = rows.std(0) > 0
    weights, (written, read) = read_weights(subject.adapter), read_alignments(subject)
    report = AuditReport(
        applied=Applied(
            n_sites=len(layout.sites),
            silent=tuple(
                site.name
                for site, columns in zip(layout.sites, layout.slices, strict=True)
                if not spread[columns].any()
            ),
            unread=subject.unhooked,
            unseen=subject.unseen,
            base=subject.base.name,
            other_base=other_base(subject.adapter, subject.base),
        ),
        weights=weights,
        neutral=effects["neutral"],
        texts=effects.get("texts"),
        mean_row=_read_mean_row(subject, neutral, rows),
        answers=answers,
        written=written,
        read=read,
        compared=compare(statistics(weights, written, read)),
    )
    return report, layout


def _effect_on(editor: RowEditor, held_out: HeldOut, fitted: np.ndarray, seed: int) -> EffectOn:
    """Compare base and adapter on rollouts, and with constant rows fitted on other ones."""
    store, layout = held_out.store, held_out.subject.layout
    training = rows_of(store, fitted)
    constant = ConstantRows(store, training, torch.cat(list(read_blocks(store, training))))
    shifts, floor = ShiftAccumulator(), 0.0
    measured: list[np.ndarray] = []
    found: dict[str, list[Compared]] = {"base": [], "adapter": [], "constant": []}
    with runtime.progress(held_out.n_tokens, "compare", "tokens") as bar:
        for batch in held_out.batches():
            spliced = SplicedBatch(editor, batch, np.arange(layout.d_in))
            base = spliced.base()
            given = constant.at(batch.rows.numpy().ravel()).view(spliced.x.shape)
            found["base"].append(spliced.compared(base))
            found["adapter"].append(spliced.adapter())
            found["constant"].append(spliced.written(given.to(spliced.x.device)))
            floor = max(floor, float(spliced.written(spliced.x).kl.mean()))
            predicted = held_out.role_of(batch.measured)
            shifts.add(spliced.log_p, log_probabilities(base), batch.measured, predicted)
            measured.append(batch.measured)
            bar.update(int(batch.own.sum()))
    rows = np.concatenate(measured)
    runs = of_all_batches(found)
    shares = Shares(held_out, rows, runs, zero="base", rounding=floor, seed=seed)
    base, adapter, usual = (shares.of_run(name, None) for name in ("base", "adapter", "constant"))
    return EffectOn(
        n_rollouts=shares.n_rollouts,
        n_tokens=len(rows),
        kl=base.kl,
        kl_interval=shares.interval("base"),
        floor=floor,
        ce_base=(base.generated or base).ce,
        ce_adapter=(adapter.generated or adapter).ce,
        constant=usual.recovered,
        constant_interval=usual.recovered_interval,
        shifts=shifts.strongest(held_out),
        openings=openings_of(store, rows, (runs["base"].ce, runs["adapter"].ce)),
    )


def _read_mean_row(
    subject: Subject, store: ActivationStore, rows: torch.Tensor
) -> tuple[ScoredToken, ...]:
    """Return the tokens that the mean row of the first tokens of texts promotes most."""
    try:
        readout = Readout(subject)
    except AdapterError as error:
        log.warning("%s", error)
        return ()
    starts = store.rollout_start[:-1]
    position = np.arange(store.n_rows) - np.repeat(starts, np.diff(store.rollout_start))
    mean = rows[torch.from_numpy((position >= _FIRST.start) & (position < _FIRST.stop))].mean(0)
    written = torch.zeros(readout.width)
    for writer in residual_writes(subject, store.layout):
        written += writer.matrix @ mean[writer.columns]
    return readout.strongest(written[None], _N_PROMOTED)[0][0] if written.any() else ()
