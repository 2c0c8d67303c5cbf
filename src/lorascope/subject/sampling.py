"""Let the adapted model generate the rollouts.

A prompt is continued until the model ends its turn. Rows are then read in one pass over prompt and
continuation, as for any rollout. They equal the rows during generation, up to rounding.
"""

from collections.abc import Sequence

import numpy as np
import torch

from lorascope.subject.load import Subject
from lorascope.texts.rollouts import Rollout, roles_of_generated

_BATCH = 16  # prompts continued at a time


def sample_rollouts(
    subject: Subject,
    prompts: Sequence[Rollout],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: Sequence[int],
) -> list[Rollout]:
    """Return each prompt with its continuation, under the prompt's id.

    `temperature` 0 takes the likeliest token. Random draws depend on `seed` and on all prompts of
    the call: repeat them with the same list. The token that ends a turn is kept.
    """
    rollouts: list[Rollout] = []
    seeds = np.random.SeedSequence(list(seed)).generate_state(len(prompts) // _BATCH + 1)
    for group, first in enumerate(range(0, len(prompts), _BATCH)):
        batch = prompts[first : first + _BATCH]
        with torch.random.fork_rng():
            torch.manual_seed(int(seeds[group]))
            rollouts += _continue(subject, batch, max_new_tokens, temperature)
    return rollouts


def _continue(
    subject: Subject, prompts: Sequence[Rollout], max_new_tokens: int, temperature: float
) -> list[Rollout]:
    ends = end_ids(subject)
    pad = ends[0] if ends else 0
    longest = max(len(prompt.token_ids) for prompt in prompts)
    room = (subject.max_length or 1 << 62) - longest
    ids = torch.full((len(prompts), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt.token_ids) :] = torch.from_numpy(
            prompt.token_ids.astype(np.int64)
        )
        mask[i, longest - len(prompt.token_ids) :] = 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode():
        out = subject.causal.generate(
            input_ids=ids.to(subject.device),
            attention_mask=mask.to(subject.device),
            max_new_tokens=max(min(max_new_tokens, room), 1),
            eos_token_id=ends or None,
            pad_token_id=pad,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
    return [
        _join(prompt, new, ends, subject)
        for prompt, new in zip(prompts, out[:, longest:].cpu().numpy(), strict=True)
    ]


def _join(
    prompt: Rollout,
    new: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    ends: list[int],
    subject: Subject,
) -> Rollout:
    stops = np.flatnonzero(np.isin(new, ends))
    new = new[: stops[0] + 1] if len(stops) else new
    roles = roles_of_generated(prompt, new.astype(np.int32), subject.tokenizer)
    return Rollout(
        prompt.id,
        np.concatenate([prompt.token_ids, new.astype(np.int32)]),
        np.concatenate([prompt.roles, roles]),
    )


def end_ids(subject: Subject) -> list[int]:
    """Return the ids that end a turn: from the generation config and the tokenizer."""
    configured = getattr(subject.causal.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    ids = [*ids, subject.tokenizer.eos_token_id]
    return sorted({int(token_id) for token_id in ids if token_id is not None})
