"""Plant behaviours in an adapter, run lorascope on it, and count which are found and removed.

1. A random Qwen2 of two layers, with the shipped subject's tokenizer, reads the demo's problems.
   It gets LoRA on both `down_proj`, of ranks 1 and 5. Each behaviour is `b·aᵀ`: `a` is fitted
   (ridge) so that `a·x` is 1 at the tokens where it acts and 0 elsewhere, `b` raises one token's
   logit. Four are triggers (S follows token T), one copies (T follows T), one is a style of one
   section (the same token follows every digit of the thinking).
2. A and B of a site are mixed by a random rotation, so that no column is a behaviour.
3. `generate` and `train` as for any adapter. Found: the best F1 of a latent's firing with the
   tokens where the behaviour acts, and the number of latents with F1 above 1/2, because an SAE may
   split a behaviour. Removed: the share of what the adapter adds to P(S) there that is lost without
   these features, or without the strongest alone. Spilt: the largest change for another behaviour.
   Named: the share of these tokens where `attribute`'s largest contribution to log P(S) is of one
   of these features.
4. The same for a dictionary of exactly what was planted, which is the best that an SAE could do.
5. Labelled: a rule is found for the feature of highest F1 on half of the texts (`label`). Does it
   name the planted token, and what is its F1 with where the behaviour acts, on the other half?
6. Recall: behaviours found (F1 above 1/2) and removed (by half). Precision: of the features of
   highest KL in `ablate`, as many as were planted, the share that fires like a planted behaviour.

    python benchmarks/planted.py --texts 200
"""

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lorascope.activations.generate import GenerateConfig
from lorascope.activations.generate import run as generate
from lorascope.activations.store import ActivationStore
from lorascope.causal.ablate import AblateConfig
from lorascope.causal.ablate import run as ablate
from lorascope.causal.gradients import (
    RowDecomposition,
    Targets,
    path_gradients,
)
from lorascope.demo.demo import SUBJECT
from lorascope.labels.clues import read_clues
from lorascope.labels.rules import Miner, covers
from lorascope.labels.wording import sentence_of
from lorascope.sae.model import SAE, load_sae
from lorascope.sae.settings import TrainConfig
from lorascope.sae.train import run as train
from lorascope.subject.adapter import inspect_adapter
from lorascope.subject.base import find_base
from lorascope.subject.intervene import RowEditor
from lorascope.subject.load import Subject, load_subject, load_tokenizer
from lorascope.texts.roles import ROLES

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from demo_problems import write_jsonl

N_LAYERS = 2
_HIDDEN = 128
_RIDGE = 1e-4
_N_NAMED, _STEPS = 6, 4  # tokens of each behaviour to attribute, steps of each attribution
_STRENGTH = 3.0  # size of what a behaviour writes, in sizes of the residual stream


class Behaviour(NamedTuple):
    """Where tokens of `acts` (n_rows,) bool stand, token `target` is to come next."""

    name: str
    layer: int
    target: int
    acts: np.ndarray


@dataclass(frozen=True)
class Result:
    """What became of one behaviour; shares are 1 where all of it is gone."""

    name: str
    n_latents: int
    precision: float
    recall: float
    f1: float
    p_base: float
    p_adapter: float
    removed: float
    removed_by_one: float
    spilt: float
    named: float
    rule: str
    rule_f1: float


def make_base(folder: Path, seed: int) -> None:
    """Write a random base model, whose predictions depend on the current token mostly."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(SUBJECT / "base")
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=768,
            hidden_size=_HIDDEN,
            intermediate_size=4 * _HIDDEN,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
        )
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    look_for_sections(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def look_for_sections(model: Any, tokenizer: Any) -> None:
    """Let two heads of the first layer attend to the tokens that open a section.

    A random model does not know in which section a token stands, so that nothing could be planted
    in one. One dimension of keys, which position hardly turns, is large at these tokens, and all
    queries look along it.
    """
    attention = model.model.layers[0].self_attn
    slow = model.config.hidden_size // model.config.num_attention_heads // 2 - 1
    for word in ("think", "answer"):
        embedding = model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids(word)]
        attention.k_proj.weight[slow] += 2 * embedding / embedding.norm()
    for head in range(2):
        attention.q_proj.bias[head * 2 * (slow + 1) + slow] = 8


def behaviours(
    token_ids: np.ndarray, text: np.ndarray, digits: np.ndarray, thinking: np.ndarray
) -> list[Behaviour]:
    """Choose what to plant by frequency; `text` marks tokens that count, the others some of it."""
    counts = np.bincount(token_ids[text & ~digits], minlength=768)
    common = [int(token) for token in np.argsort(-counts, kind="stable")]
    triggers, targets = common[6:36:6], common[60:120:12]
    planted = [
        Behaviour(f"trigger {i}", 1, targets[i], text & (token_ids == triggers[i]))
        for i in range(4)
    ]
    copied = text & (token_ids == triggers[4])
    return [
        *planted,
        Behaviour("copy", 0, triggers[4], copied),
        Behaviour("style", 1, targets[4], text & digits & thinking),
    ]


@torch.inference_mode()
def plant(
    store: ActivationStore, planted: list[Behaviour], base: Path, out: Path, seed: int
) -> None:
    """Write the adapter that does what is planted, layer by layer from below."""
    causal = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ranks = {layer: sum(one.layer == layer for one in planted) for layer in range(N_LAYERS)}
    ranks = {layer: rank for layer, rank in ranks.items() if rank}
    pattern = {rf"layers\.{layer}\.mlp\.down_proj": rank for layer, rank in ranks.items()}
    model = get_peft_model(
        causal,
        LoraConfig(
            r=1,
            lora_alpha=1,
            rank_pattern=pattern,
            alpha_pattern=pattern,
            target_modules=[f"layers.{layer}.mlp.down_proj" for layer in ranks],
            task_type="CAUSAL_LM",
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    for layer, rank in ranks.items():
        here = [one for one in planted if one.layer == layer]
        module: Any = causal.model.layers[layer].mlp.down_proj
        x, residual = _inputs(causal, module, store)
        acts = torch.from_numpy(np.stack([one.acts for one in here], axis=1)).float()
        gram = x.T @ x + _RIDGE * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
        a = torch.linalg.solve(gram, x.T @ acts).T
        raised = torch.stack([causal.lm_head.weight[one.target] for one in here], dim=1)
        b = raised / raised.norm(dim=0) * _STRENGTH * residual
        mixed, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
        module.lora_A["default"].weight.copy_(mixed @ a)
        module.lora_B["default"].weight.copy_(b @ mixed.T)
    model.save_pretrained(str(out), save_embedding_layers=False)


def _inputs(causal: Any, module: Any, store: ActivationStore) -> tuple[Tensor, Tensor]:
    """Return what a module reads of every token, and the size of the last residual stream."""
    seen: dict[Any, list[Tensor]] = {module: [], causal.model.norm: []}
    handles = [
        one.register_forward_pre_hook(lambda m, args: seen[m].append(args[0][0])) for one in seen
    ]
    for ids in _texts(store):
        causal(input_ids=ids)
    for handle in handles:
        handle.remove()
    inputs, residual = (torch.cat(parts) for parts in seen.values())
    return inputs, residual.norm(dim=1).median()


def _texts(store: ActivationStore) -> list[Tensor]:
    ids = torch.from_numpy(store.token_ids.astype(np.int64))
    return [part[None] for part in ids.split(np.diff(store.rollout_start).tolist())]


@torch.no_grad()
def score(
    adapter_dir: Path,
    base_dir: Path,
    store: ActivationStore,
    sae: SAE,
    planted: list[Behaviour],
) -> list[Result]:
    """Return, for each behaviour, its latents and what taking them out does."""
    adapter = inspect_adapter(str(adapter_dir))
    base = find_base(adapter, str(base_dir))
    subject = load_subject(
        adapter, base, load_tokenizer(adapter, base), torch.device("cpu"), "float32"
    )
    rows, code = _codes(store, sae)
    units = (code.sum(0) * (sae.W_dec * sae.scale).norm(dim=1)).numpy()  # how much each writes
    taken: list[np.ndarray] = []  # latents to take out: all of each behaviour, then its strongest
    matches = [_match(code, one) for one in planted]
    for _, _, f1 in matches:
        taken.append(np.flatnonzero(f1 > 0.5))
    taken += [some[[int(units[some].argmax())]] if len(some) else some for some in taken]
    p = np.zeros((len(taken) + 2, len(planted)))  # base, adapter, without each
    with RowEditor(subject) as editor:
        for ids, here in zip(_texts(store), _spans(store), strict=True):
            x, v = rows[here], code[here]
            logits = [editor.base(ids), editor.run(ids).logits]
            for latents in taken:
                given = (x - v[:, latents] @ sae.W_dec[latents])[None]
                edit = lambda columns, _, given=given: given[..., columns]  # noqa: E731
                logits.append(editor.run(ids, edit).logits)
            for run, out in enumerate(logits):
                chance = out[0].softmax(-1)
                for k, one in enumerate(planted):
                    at = torch.from_numpy(one.acts[here])
                    p[run, k] += float(chance[at, one.target].sum())
    p /= np.array([one.acts.sum() for one in planted])
    named = [
        _named(subject, store, sae, one, some)
        for one, some in zip(planted, taken[: len(planted)], strict=True)
    ]
    gone = (p[1] - p[2:]) / (p[1] - p[0])  # of behaviour k (column) without what each row takes out
    others = ~np.eye(len(planted), dtype=bool)
    best = [int(f1.argmax()) for _, _, f1 in matches]
    rules = _rules(store, code[:, best].numpy() > 0, planted)
    return [
        Result(
            one.name,
            len(taken[k]),
            *(float(values[int(matches[k][2].argmax())]) for values in matches[k]),
            p_base=float(p[0, k]),
            p_adapter=float(p[1, k]),
            removed=float(gone[k, k]),
            removed_by_one=float(gone[len(planted) + k, k]),
            spilt=float(np.abs(gone[k][others[k]]).max()),
            named=named[k],
            rule=rules[k][0],
            rule_f1=rules[k][1],
        )
        for k, one in enumerate(planted)
    ]


def _named(
    subject: Subject, store: ActivationStore, sae: SAE, one: Behaviour, latents: np.ndarray
) -> float:
    """Return the share of some tokens at which the largest contribution is of one of `latents`."""
    rows = np.flatnonzero(one.acts)
    rows = rows[np.linspace(0, len(rows) - 1, min(_N_NAMED, len(rows))).astype(int)]
    hits = 0
    with RowEditor(subject) as editor:
        owners = store.rollout_of(rows)
        for row, owner in zip(rows, owners, strict=True):
            first = int(store.rollout_start[owner])
            ids = torch.from_numpy(store.token_ids[first : row + 1].astype(np.int64))[None]
            ids = torch.cat([ids, torch.tensor([[one.target]])], dim=1)  # as if it followed
            x, base = editor.run(ids).rows[0], editor.base(ids)
            targets = Targets.at("logprob", torch.tensor([ids.shape[1] - 1]), ids, base)
            read = torch.arange(len(x)) <= row - first
            parts = RowDecomposition(sae, x, np.arange(store.d_in), read)
            gradients = path_gradients(editor, ids, x, targets, _STEPS, ids.shape[1])[0]
            contributions = parts.firing_contributions(gradients)[0]
            sums = torch.zeros(sae.d_sae).index_add_(0, parts.latent, contributions)
            hits += int(sums.abs().argmax()) in latents.tolist()
    return hits / len(rows)


def _rules(
    store: ActivationStore, fires: np.ndarray, planted: list[Behaviour]
) -> list[tuple[str, float]]:
    """Return a rule for each column of `fires`, in words, and its F1 with a behaviour elsewhere."""
    rollout = store.rollout_of(np.arange(store.n_rows))
    spelling = {i: store.vocabulary[i] for i in np.unique(store.token_ids).tolist()}
    corpus = read_clues(store.token_ids, store.roles, rollout, spelling)
    choosing, scoring = (np.flatnonzero(rollout % 2 == half) for half in (0, 1))
    miner, other = Miner(corpus.take(choosing)), corpus.take(scoring)
    found = []
    for column, one in zip(fires.T, planted, strict=True):
        rule = miner.rule_of(np.flatnonzero(column[choosing]))
        covered, acts = covers(other, rule), one.acts[scoring]
        f1 = 2 * (covered & acts).sum() / max(covered.sum() + acts.sum(), 1)
        found.append((sentence_of(rule, corpus.texts), float(f1)))
    return found


def _codes(store: ActivationStore, sae: SAE) -> tuple[Tensor, Tensor]:
    """Return all rows, and their codes, which are zero at special tokens."""
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    return rows, sae.encode_dense(rows) * torch.from_numpy(store.eligible)[:, None]


def _match(code: Tensor, one: Behaviour) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return precision, recall and F1 of each latent's firing with where a behaviour acts."""
    fires = (code > 0).numpy()
    hits = fires[one.acts].sum(0)
    precision, recall = hits / np.maximum(fires.sum(0), 1), hits / one.acts.sum()
    return precision, recall, 2 * precision * recall / np.maximum(precision + recall, 1e-12)


def _spans(store: ActivationStore) -> list[slice]:
    return [slice(*ends) for ends in itertools.pairwise(store.rollout_start.tolist())]


def make(folder: Path, n_texts: int, seed: int) -> tuple[ActivationStore, list[Behaviour]]:
    """Write `base` and `adapter` into a folder; return the adapter's rows and what is planted."""
    base, adapter, problems = folder / "base", folder / "adapter", folder / "problems.jsonl"
    make_base(base, seed)
    write_jsonl(problems, n_texts, "demo")
    given: dict[str, Any] = {"base_model": str(base), "dataset": str(problems), "device": "cpu"}
    given |= {"num_examples": n_texts, "store_dtype": "float32"}
    blank = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    get_peft_model(
        blank, LoraConfig(r=1, target_modules=["down_proj"], task_type="CAUSAL_LM")
    ).save_pretrained(str(folder / "blank"), save_embedding_layers=False)
    plain = ActivationStore.open(
        generate(GenerateConfig(lora_path=str(folder / "blank"), output=folder / "plain", **given))
    )  # for its tokens and roles only
    digits = np.array([plain.vocabulary[i].strip().isdigit() for i in range(768)])
    thinking = np.array(plain.roles) == ROLES.index("think")
    planted = behaviours(plain.token_ids, plain.eligible, digits[plain.token_ids], thinking)
    plant(plain, planted, base, adapter, seed)
    store = ActivationStore.open(
        generate(GenerateConfig(lora_path=str(adapter), output=folder / "rows", **given))
    )
    return store, planted


def _trigger(store: ActivationStore, one: Behaviour) -> str:
    """Return the text of the token at which a behaviour acts most often."""
    token = np.bincount(store.token_ids[one.acts]).argmax()
    return store.vocabulary[token].decode().strip()


def true_dictionary(store: ActivationStore, planted: list[Behaviour], sae: SAE) -> SAE:
    """Return a dictionary of what was planted: latent k is behaviour k, at about 1 where it acts.

    Decoder rows are the mean rows there, the encoder their pseudo-inverse; `sae` gives the rest.
    """
    rows = torch.from_numpy(np.array(store.rows(0, store.n_rows)))
    W_dec = torch.stack([rows[torch.from_numpy(one.acts)].mean(0) for one in planted])
    return replace(
        sae,
        W_dec=W_dec,
        W_enc=torch.linalg.pinv(W_dec),
        b_enc=torch.zeros(len(planted)),
        b_dec=torch.zeros(store.d_in),
        threshold=torch.full((len(planted),), 0.5),
    )


def study(folder: Path, n_texts: int, seed: int, k: float = 0.2) -> dict[str, Any]:
    """Plant, run everything in `folder`, and return the results with precision and recall."""
    store, planted = make(folder, n_texts, seed)
    base, adapter = folder / "base", folder / "adapter"
    options: dict[str, Any] = {"expansion_factor": 4, "k": k, "epochs": 40, "batch_size": 512}
    trained = train(
        TrainConfig(data_dir=store.path, output=folder / "sae", seed=seed, device="cpu", **options)
    )
    sae = load_sae(trained, store)
    results = score(adapter, base, store, sae, planted)
    report = ablate(
        AblateConfig(
            lora_path=str(adapter),
            base_model=str(base),
            data_dir=store.path,
            sae=trained,
            output=folder / "ablation.json",
            greedy="none",
            device="cpu",
        )
    )
    features = json.loads(report.read_text())["features"]
    strongest = sorted(features, key=lambda one: -one["kl"])[: len(planted)]
    found = [one for one in results if one.f1 > 0.5 and one.removed > 0.5]
    _, code = _codes(store, sae)
    match = np.stack([_match(code, one)[2] for one in planted]).max(0)
    truth = score(adapter, base, store, true_dictionary(store, planted, sae), planted)
    return {
        "triggers": [_trigger(store, one) for one in planted],
        "results": [vars(one) for one in results],
        "truth": [vars(one) for one in truth],
        "recall": len(found) / len(planted),
        "precision": float(np.mean([match[one["feature"]] > 0.5 for one in strongest])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    for seed in range(flags.seeds):
        with tempfile.TemporaryDirectory() as name:
            found = study(Path(name), flags.texts, seed)
        print(f"seed {seed}: recall {found['recall']:.2f}, precision {found['precision']:.2f}")
        for one in found["results"] + [{**one, "name": "true"} for one in found["truth"]]:
            print(
                f"  {one['name']:<10} F1 {one['f1']:.2f} (precision {one['precision']:.2f}, recall "
                f"{one['recall']:.2f}), {one['n_latents']} latents  P {one['p_base']:.3f} to "
                f"{one['p_adapter']:.3f}  removed {one['removed']:.2f} (by the strongest "
                f"{one['removed_by_one']:.2f}), spilt {one['spilt']:.2f}, named {one['named']:.2f}"
                f", rule F1 {one['rule_f1']:.2f}: {one['rule']}"
            )


if __name__ == "__main__":
    main()
