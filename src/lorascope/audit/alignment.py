"""Which tokens an adapter's weights point at: what it writes, and what it reads.

1. A site that writes into the residual stream has a direction for each column of B. Final norm and
   unembedding turn it into logits, which are standardised over the vocabulary: the token of the
   largest |z| is the one that the direction promotes or suppresses most.
2. A site that reads the stream has a direction for each row of A. Its products with the embeddings
   are standardised in the same way. Gains of norms before it are not included.
3. Of V random numbers the largest |z| is about `sqrt(2 ln 2V)`.

The gauge is that of the rows (`bottlenecks`). Of more than `_N_DIRECTIONS` directions of a kind,
those of the largest norm are read.
"""

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from lorascope.audit.audit_records import Alignment, PointedToken
from lorascope.errors import AdapterError
from lorascope.subject.load import Subject
from lorascope.subject.unembedding import Unembedding, residual_writes
from lorascope.texts.tokens import token_bytes

_N_DIRECTIONS = 256
_N_SHOWN = 5

Scores = Callable[[Tensor], Tensor]
Named = tuple[str, Float[Tensor, "d_model"]]


def read_alignments(subject: Subject) -> tuple[Alignment | None, Alignment | None]:
    """Return the alignment of what is written and of what is read; None where there is nothing."""
    writes = residual_writes(subject, subject.layout)
    written = [(one.name, column) for one in writes for column in one.matrix.T]
    writers = {one.name for one in writes}
    try:
        head = Unembedding(subject)
        of_written = _aligned(subject, written, head.logits)
    except AdapterError:
        of_written = None
    embed = subject.causal.get_input_embeddings()
    table = getattr(embed, "base_layer", embed).weight.detach()
    read = [
        (site.name, row)
        for site, module, mix in zip(
            subject.layout.sites, subject.sites, subject.mixes, strict=True
        )
        if site.name not in writers
        and (weight := getattr(module, "weight", None)) is not None
        and weight.shape[1] == table.shape[1]
        for row in (weight if mix is None else mix.to(weight) @ weight).detach().float().cpu()
    ]
    of_read = _aligned(subject, read, lambda some: (some.to(table) @ table.T).float().cpu())
    return of_written, of_read


def _aligned(subject: Subject, directions: list[Named], scores_of: Scores) -> Alignment | None:
    directions = [one for one in directions if one[1].any()]
    directions = sorted(directions, key=lambda one: -float(one[1].norm()))[:_N_DIRECTIONS]
    found: list[tuple[float, str, int]] = []
    n_vocab = 0
    for name, direction in directions:
        scores = scores_of(direction[None])[0]
        n_vocab = len(scores)
        z = ((scores - scores.mean()) / scores.std().clamp(min=1e-30)).abs()
        best = int(z.argmax())
        found.append((float(z[best]), name, best))
    if not found:
        return None
    spelled = token_bytes(subject.tokenizer, n_vocab)
    return Alignment(
        n_directions=len(found),
        mean=sum(z for z, _, _ in found) / len(found),
        expected=math.sqrt(2 * math.log(2 * n_vocab)),
        strongest=tuple(
            PointedToken(site=name, token_id=i, token=spelled[i].decode(errors="replace"), z=z)
            for z, name, i in sorted(found, reverse=True)[:_N_SHOWN]
        ),
    )
