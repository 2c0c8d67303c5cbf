"""Say what differs between adapters of one base: checkpoints, seeds, other data, other ranks.

1. Each adapter reads the same texts (`generate`). Their rows side by side are one store (`joint`),
   and on it one dictionary is trained, whose features have a part in each adapter (`train`).
2. `collect`, `label` and `dashboard` make the features' page, as for one adapter.
3. On held-out texts: KL between adapters and to the base, the predictions that differ most, and how
   much of the difference each feature explains (`differences`).
4. Each feature is *shared*, *changed*, or *only in* one adapter of a pair. It is *news* if it
   explains what differs more than between other seeds of the first adapter (`--null`), or without
   seeds more than chance.

The first adapter is compared with each of the others; a checkpoint with the one before it.

In: adapters of one base, texts. Out: a folder with `compare.json`, `compare.md` and `compare.html`,
`dashboard.html`, and what they were made from. A feature that is no news may still differ: weakly,
or on texts that are not these.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lorascope.activations import generate
from lorascope.activations.generate import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.causal.effects import sum_by
from lorascope.causal.held_out import HeldOut, fitting_tokens, held_out_rollouts
from lorascope.causal.study import Made, read_report, report_at
from lorascope.compare.compare_options import CompareConfig
from lorascope.compare.compare_page import document_of
from lorascope.compare.compare_records import (
    PRESENT,
    ComparisonReport,
    DifferentText,
    JointExample,
    JointFeature,
)
from lorascope.compare.differences import Differences, Pair
from lorascope.compare.joint import Member, find_members, find_shared_base, join
from lorascope.compare.judge import N_REPORTED, Judge
from lorascope.dashboard import render
from lorascope.dashboard.render import DashboardConfig
from lorascope.errors import ArtifactError, ConfigError
from lorascope.features import collect
from lorascope.features.collect import CollectConfig
from lorascope.features.index import FeatureIndex
from lorascope.features.label_file import FILE as LABELS
from lorascope.labels import label
from lorascope.labels.label import LabelConfig
from lorascope.runtime import pick_device
from lorascope.sae import train
from lorascope.sae.model import SAE, load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.subject.load import SharedBase, Subject, load_tokenizer
from lorascope.texts.roles import ROLES
from lorascope.texts.tokens import display_texts

log = logging.getLogger(__name__)

_N_EXAMPLES = 3
_N_TEXTS, _N_SHOWN = 6, 300  # texts with the largest difference, tokens of each


def run(config: CompareConfig) -> Path:
    """Write the report unless it is finished already, and return its page.

    Raises AdapterError if the adapters have several bases, ArtifactError if they read the texts as
    other tokens.
    """
    out = config.output
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output is {out}, which is a file, expected a folder")
    members, nulls = find_members(config.adapters, config.null)
    base = find_shared_base(members, config.base_model, config.base_revision)
    shared = SharedBase()
    stores: dict[str, ActivationStore] = {}
    for member in members:
        log.info("adapter %s: %s", member.name, member.given)
        options = GenerateConfig.from_shared(
            config, lora_path=member.given, output=out / "rows" / member.name
        )
        stores[member.name] = ActivationStore.open(generate.run(options, load=shared.load))
    folder = join(stores, out / "activations", overwrite=config.overwrite)
    joint = ActivationStore.open(folder)
    own = max(store.d_in for store in stores.values())
    options = TrainConfig.from_shared(
        _for_columns(config, own, joint.d_in), data_dir=folder, output=out / "sae"
    )
    read: dict[str, Any] = {"data_dir": folder, "sae": train.run(options)}
    index = out / "features.h5"
    collect.run(
        CollectConfig.from_shared(config, output=index, roles=ROLES, max_rollouts=None, **read)
    )
    label.run(LabelConfig.from_shared(config, input=index, output=out / LABELS, **read))
    names = ", ".join(member.name for member in members)
    title = f"Features of the adapters {names} together"
    page = DashboardConfig.from_shared(
        config, input=index, output=out / "dashboard.html", title=title
    )
    render.run(page)
    sae = load_sae(read["sae"], joint)
    features = FeatureIndex.open(index)

    def make() -> Made:
        subjects = {
            member.name: shared.load(
                member.adapter,
                base,
                load_tokenizer(member.adapter, base),
                pick_device(config.device),
                config.dtype,
                gauge=config.gauge,
                skip_unhookable=config.skip_unhookable,
                device_map=config.device_map,
            )
            for member in members
        }
        report = _measure(config, members, nulls, base.name, subjects, sae, joint, features)
        return Made(report, sae.layout, {"sae_name": read["sae"].name})

    path = report_at(
        out / "compare.json",
        ComparisonReport,
        settings=_settings(config, nulls),
        parents={
            "activations": joint.digest,
            "sae": sae.digest,
            "features": features.manifest.digest,
            **({"labels": features.labels.manifest.digest} if features.labels else {}),
        },
        overwrite=config.overwrite,
        make=make,
        table=lambda report: document_of(report).as_text(),
    )
    report, manifest = read_report(path, (ComparisonReport,))
    document_of(report).write(path, manifest)
    return out / "compare.html"


def _for_columns(config: CompareConfig, own: int, joint: int) -> CompareConfig:
    """Return the options with those that follow the number of columns.

    The adapters' columns say much the same, so a joint dictionary is as large as that of the
    largest adapter, and as sparse.
    """
    chosen = config.for_columns(own)
    factor = -(-int(chosen.values_of("expansion_factor")[0]) * own // joint)
    return replace(config, k=chosen.k, expansion_factor=config.expansion_factor or max(1, factor))


def _settings(config: CompareConfig, nulls: Sequence[str]) -> dict[str, Any]:
    """Return the options that decide the report, besides what its inputs are made from."""
    own = ("max_rollouts", "verify", "steps", "dtype", "batch_tokens")
    settings = {name: value for name, value in config.settings().items() if name in own}
    return settings | {"nulls": list(nulls), "seed": config.values_of("seed")[0]}


def _measure(
    config: CompareConfig,
    members: Sequence[Member],
    nulls: Sequence[str],
    base: str,
    subjects: Mapping[str, Subject],
    sae: SAE,
    store: ActivationStore,
    index: FeatureIndex,
) -> ComparisonReport:
    first = members[0].name
    rollouts = held_out_rollouts(sae, store)[: config.max_rollouts]
    if len(rollouts) < 2:
        raise ArtifactError(
            f"{len(rollouts)} texts are held out, expected two or more: raise --holdout or give "
            "more texts"
        )
    subject = subjects[first]
    tokens = config.batch_tokens or fitting_tokens(subject)
    differences = Differences(subjects, HeldOut(subject, store, rollouts, tokens), sae)
    by_step = members[0].step is not None
    others = [member.name for member in members[1:] if member.name not in nulls]
    pairs: list[Pair] = [(first, other) for other in others]
    if by_step:
        pairs = list(pairwise(member.name for member in members))
    null_pairs = [(first, null) for null in nulls]
    seed = int(config.values_of("seed")[0])
    with differences:
        found = differences.predictions([*null_pairs, *pairs])
        judge = Judge(config, differences, found, seed)
        levels = judge.seeds(null_pairs)
        reported = [*map(judge.pair, pairs), *levels]
    chosen = {one.feature for pair in reported for one in pair.features}
    if by_step:
        chosen |= set(_strongest(differences))
    return ComparisonReport(
        base=base,
        nulls=tuple(nulls),
        adapters=tuple(judge.adapter(member) for member in members),
        n_rollouts=len(rollouts),
        n_tokens=int(found.written.sum()),
        n_features=sae.d_sae,
        n_fired=int((differences.n_fired > 0).sum()),
        fvu=sae.manifest.content["report"]["fvu"],
        l0=sae.manifest.content["report"]["l0"],
        pairs=tuple(reported),
        features=tuple(
            _feature(one, members if by_step else (), differences, index, store)
            for one in sorted(chosen)
        ),
        texts=_texts(store, found.rows[found.written], found.kl[pairs[0]][found.written]),
    )


def _strongest(differences: Differences) -> list[int]:
    """Return the features that write most, over all adapters and tokens."""
    written = differences.total * differences.writes.sizes(list(differences.subjects))
    order = np.argsort(-written, kind="stable")[:N_REPORTED]
    return order[written[order] > 0].tolist()


def _feature(
    latent: int,
    checkpoints: Sequence[Member],
    differences: Differences,
    index: FeatureIndex,
    store: ActivationStore,
) -> JointFeature:
    n = int(differences.n_fired[latent])
    mean = float(differences.total[latent]) / n if n else 0.0
    sizes = {
        name: mean * float(differences.writes.size(name)[latent]) for name in differences.subjects
    }
    largest = max(sizes.values())
    there = [
        (one.step, sizes[one.name])
        for one in checkpoints
        if largest and sizes[one.name] >= PRESENT * largest
    ]
    label = index.label(latent)
    return JointFeature(
        feature=latent,
        label="" if label is None else label.name,
        n_fired=n,
        mean=mean,
        sizes=sizes,
        examples=_examples(latent, differences, index, store),
        born=there[0][0] if there else None,
        peak=max(there, key=lambda one: one[1])[0] if there else None,
        died=there[-1][0] if there and there[-1][0] != checkpoints[-1].step else None,
    )


def _examples(
    latent: int, differences: Differences, index: FeatureIndex, store: ActivationStore
) -> tuple[JointExample, ...]:
    """Return the strongest examples, with what each adapter's row adds to the feature's value."""
    sae, examples = differences.sae, index[latent].strongest[:_N_EXAMPLES]
    rows = store.take(np.array([one.row for one in examples], np.int64)).astype(np.float32)
    weighted = (torch.from_numpy(rows) - sae.b_dec) * sae.W_enc[:, latent]
    return tuple(
        JointExample(
            rollout=one.rollout,
            value=one.value,
            before="".join(one.tokens[: one.target]),
            token=one.tokens[one.target],
            after="".join(one.tokens[one.target + 1 :]),
            parts={name: float(w[here].sum()) for name, here in differences.columns.items()},
        )
        for one, w in zip(examples, weighted, strict=True)
    )


def _texts(
    store: ActivationStore, rows: npt.NDArray[np.int64], kl: npt.NDArray[np.float64]
) -> tuple[DifferentText, ...]:
    """Return the texts with the largest difference a token, largest first."""
    owner = store.rollout_of(rows)
    names, number = np.unique(owner, return_inverse=True)
    mean = sum_by(number, kl, len(names)) / sum_by(number, np.ones(len(kl)), len(names))
    at = dict(zip((rows + 1).tolist(), kl.tolist(), strict=True))  # by the token that is predicted
    texts = []
    for rollout in names[np.argsort(-mean, kind="stable")[:_N_TEXTS]].tolist():
        begin, end = store.rollout_start[rollout : rollout + 2].tolist()
        here = range(begin, min(end, begin + _N_SHOWN))
        spelled = [store.vocabulary[i] for i in store.token_ids[here.start : here.stop].tolist()]
        texts.append(
            DifferentText(
                rollout=int(store.rollout_id[rollout]),
                tokens=tuple(display_texts(spelled)),
                kl=tuple(at.get(row) for row in here),
            )
        )
    return tuple(texts)
