"""Let the adapted model generate the rollouts.

A prompt is continued until the model ends its turn. Rows are then read in one pass over prompt and
continuation, as for any rollout. They equal the rows during generation, up to rounding, unless the
text grew into another length class (`rotary`).

1. Each text may grow by `max_new_tokens`, at most to the end of the model's context.
2. Texts of similar length and one class are extended together, left-padded, by as many tokens as
   all of them have room for in this class. Those that did not end are extended further, in another
   batch. So each token is the one that a single pass over the text before it predicts.
3. `draw` chooses every token, here and in `steer`. Nothing in the base's `generation_config.json`
   but the tokens that end a turn has an effect: `load` drops the rest, and
   `log_ignored_settings` names it.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig

from lorascope.errors import AdapterError
from lorascope.hub import read_json_object
from lorascope.subject.base import Base
from lorascope.subject.load import Subject
from lorascope.texts.rollouts import Rollout, roles_of_generated

log = logging.getLogger(__name__)

_BATCH = 16  # texts extended at a time
_NOT_IGNORED = {  # in generation_config.json: used, or without an effect on texts
    *(f"{kind}_token_id" for kind in ("bos", "eos", "pad", "decoder_start")),
    "transformers_version",
    "use_cache",
}


def sample_rollouts(
    subject: Subject,
    prompts: Sequence[Rollout],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: Sequence[int],
) -> list[Rollout]:
    """Return each prompt with its continuation, under the prompt's id.

    `temperature` 0 takes the likeliest token. Random draws depend on `seed` and on the prompt's
    index. The token that ends a turn is kept.
    """
    context, ends = subject.max_length or 1 << 62, end_ids(subject)
    texts = [prompt.token_ids.astype(np.int64) for prompt in prompts]
    limits = [min(len(text) + max_new_tokens, context) for text in texts]
    pending = [i for i, text in enumerate(texts) if len(text) < limits[i]]
    if len(pending) < len(texts):
        log.warning(
            "%d of %d prompts fill the context of %d tokens: nothing is written after them",
            len(texts) - len(pending),
            len(texts),
            context,
        )
    while pending:
        pending.sort(key=lambda i: -len(texts[i]))
        first = subject.length_class(len(texts[pending[0]]))
        batch = [i for i in pending if subject.length_class(len(texts[i])) == first][:_BATCH]
        pending = [i for i in pending if i not in batch]
        room = min(_room(len(texts[i]), limits[i], subject) for i in batch)
        seeds = [(*seed, i, len(texts[i]) - len(prompts[i].token_ids)) for i in batch]
        written = _extend(subject, [texts[i] for i in batch], room, ends, temperature, seeds)
        for i, new in zip(batch, written, strict=True):
            texts[i] = np.concatenate([texts[i], new])
            if new[-1] not in ends and len(texts[i]) < limits[i]:
                pending.append(i)
    rollouts: list[Rollout] = []
    for prompt, text in zip(prompts, texts, strict=True):
        new = text[len(prompt.token_ids) :].astype(np.int32)
        roles = np.concatenate([prompt.roles, roles_of_generated(prompt, new, subject.tokenizer)])
        rollouts.append(Rollout(prompt.id, text.astype(np.int32), roles))
    return rollouts


def _room(n: int, limit: int, subject: Subject) -> int:
    """Return how many tokens a text of `n` may grow by until its class changes, or to `limit`."""
    ends = (i for i in range(n + 1, limit) if subject.length_class(i) != subject.length_class(n))
    return next(ends, limit) - n


def _extend(
    subject: Subject,
    texts: Sequence[npt.NDArray[np.int64]],
    n_tokens: int,
    ends: list[int],
    temperature: float,
    seeds: Sequence[tuple[int, ...]],
) -> list[npt.NDArray[np.int64]]:
    """Return what is written after each text: `n_tokens`, or fewer if it ends its turn.

    The last number of a seed is the number of tokens that were drawn for the text before.
    """
    longest = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, longest - len(text) :] = torch.from_numpy(text)
        mask[i, longest - len(text) :] = 1

    def only_the_drawn(so_far: Tensor, logits: Tensor) -> Tensor:
        step = so_far.shape[1] - longest
        drawn = draw(logits, temperature, [(*first, n + step, 0) for *first, n in seeds])
        return torch.full_like(logits, -torch.inf).scatter_(1, drawn[:, None], 0.0)

    with torch.inference_mode():
        out = subject.causal.generate(
            input_ids=ids.to(subject.device),
            attention_mask=mask.to(subject.device),
            generation_config=GenerationConfig(
                max_new_tokens=n_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=0,  # no text sees it
            ),
            logits_processor=[only_the_drawn],
        )
    written = list(out[:, longest:].cpu().numpy())
    is_end = [np.append(np.isin(new, ends), True) for new in written]
    return [new[: stops.argmax() + 1] for new, stops in zip(written, is_end, strict=True)]


def draw(
    logits: Float[Tensor, "batch vocab"], temperature: float, seeds: Sequence[tuple[int, ...]]
) -> Int[Tensor, "batch"]:
    """Return the next token of each text: the likeliest, or by the Gumbel-max trick.

    The noise (Maddison et al. 2014) depends on a text's seed only; equal seeds have equal noise.
    """
    if not temperature:
        return logits.argmax(-1)
    noise = {}
    for seed in set(seeds):
        state = np.random.SeedSequence(seed).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        # 6 times as fast as exponential_
        uniform = torch.rand(logits.shape[1], generator=generator)
        noise[seed] = -(-uniform.clamp(min=1e-30).log()).log()
    gumbel = torch.stack([noise[seed] for seed in seeds]).to(logits.device)
    return (logits.double() / temperature + gumbel).argmax(-1)


def log_ignored_settings(base: Base) -> None:
    """Log in one line what a base's `generation_config.json` sets that has no effect here."""
    file = base.path / "generation_config.json"
    settings = read_json_object(file) if file.is_file() else {}
    ignored = {
        name: value
        for name, value in settings.items()
        if name not in _NOT_IGNORED and not name.startswith("_") and value not in (None, False)
    }
    if ignored:
        log.info(
            "ignored in generation_config.json of %s: %s; only its end-of-text tokens and "
            "--temperature act on what is sampled",
            base.name,
            ", ".join(f"{name} {json.dumps(value)}" for name, value in ignored.items()),
        )


def end_ids(subject: Subject) -> list[int]:
    """Return the ids that end a turn: from the generation config and the tokenizer."""
    configured = getattr(subject.causal.generation_config, "eos_token_id", None)
    ids: list[Any] = configured if isinstance(configured, list) else [configured]
    ids = [*ids, subject.tokenizer.eos_token_id]
    ids = [token_id for token_id in ids if token_id is not None]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise AdapterError(
            f"eos_token_id of {subject.base.name} is {configured}, expected token ids; correct its "
            "generation_config.json"
        )
    return sorted(set(ids))
