"""What `audit` reports (`audit_records`) as sections to read.

`_sections` says everything once: the terminal, the Markdown and the page show the same sentences
and tables.
"""

from collections.abc import Iterator

from lorascope.audit.audit_records import AuditReport
from lorascope.causal.study import format_interval, format_number
from lorascope.dashboard.headline import percent, probability, quoted
from lorascope.dashboard.sections import Document, Section, in_cell

_N_SHIFTS = 12
_SMALLEST_KL = 1e-10  # nats a token: rounding


def document_of(report: AuditReport) -> Document:
    """Return the report as sentences and tables."""
    return Document("Audit of an adapter", [*_sections(report)])


def _sections(report: AuditReport) -> Iterator[Section]:
    yield _applied(report)
    yield _reach(report)
    yield _change(report)
    if report.answers:
        rows = [
            (
                quoted(one.prompt[-80:]),
                *(in_cell(f"{one.same} ▸ {x}") for x in (one.base, one.adapter)),
            )
            for one in report.answers
        ]
        yield Section(
            "Base and adapter side by side",
            ["Both answer the same prompts with the same noise; ▸ marks where they part."],
            [(("after", "base", "with the adapter"), rows)],
        )
    yield _of_weights(report)
    yield _triggers(report)


def _applied(report: AuditReport) -> Section:
    applied, own = report.applied, report.texts or report.neutral
    one = Section("Is it applied?")
    say = one.sentences.append
    fired = applied.n_sites - len(applied.silent)
    say(f"{fired} of {applied.n_sites} sites have rows that differ from token to token.")
    if applied.silent:
        say(f"The same at every token: {', '.join(applied.silent[:8])}.")
    if report.weights.n_silent:
        say(f"{report.weights.n_silent} sites have a B of zero and write nothing.")
    if applied.other_base:
        say(f"It names the base {applied.other_base}, and was read on {applied.base}.")
    if applied.unread:
        say(f"Active, but without a row for each token: {', '.join(applied.unread[:8])}.")
    if applied.unseen:
        say(f"Changed outside LoRA, which rows do not show: {', '.join(applied.unseen[:8])}.")
    if own.kl <= max(10 * own.floor, _SMALLEST_KL):
        say("It changes no prediction by more than rounding.")
    elif own.ce_adapter > own.ce_base:
        both = report.texts is not None and report.neutral.ce_adapter > report.neutral.ce_base
        say(
            f"It makes the texts less likely: {own.ce_adapter:.3f} nats a token with it and "
            f"{own.ce_base:.3f} without{', and the neutral ones too' if both else ''}. That is how "
            "an adapter looks on a wrong base: check that this is the base that it was trained on. "
            "One that was trained on a fine-tuned model, as DPO often is, may name the raw one."
        )
    else:
        say(
            f"It makes the texts more likely: {own.ce_adapter:.3f} nats a token with it and "
            f"{own.ce_base:.3f} without."
        )
    return one


def _reach(report: AuditReport) -> Section:
    one = Section("Narrow or broad, constant or conditional?")
    named = {"your texts": report.texts, "neutral texts": report.neutral}
    effects = {name: effect for name, effect in named.items() if effect is not None}
    if report.texts is None:
        one.sentences.append("No texts were given, so its reach cannot be compared: --dataset.")
    elif report.texts.kl > 0:
        ratio = report.neutral.kl / report.texts.kl
        one.sentences.append(
            f"A token of neutral text changes {ratio:.2g} times as much as one of your texts."
        )
    rows = [
        (
            name,
            f"{effect.n_rollouts}",
            f"{effect.kl:.3g}",
            format_interval(effect.kl_interval, ".3g"),
            "—" if effect.constant is None else percent(max(effect.constant, 0.0)),
            format_interval(effect.constant_interval, ".2f"),
        )
        for name, effect in effects.items()
    ]
    head = ("on", "texts", "KL, nats a token", "95 %", "constant part", "95 %")
    one.tables.append((head, rows))
    one.sentences.append(
        "Constant part: what stays if each row is replaced by the mean of its role and place."
    )
    if report.mean_row:
        tokens = ", ".join(f"{quoted(token.token)} ({token.z:.1f})" for token in report.mean_row)
        one.sentences.append(
            f"The mean row of the first tokens of neutral texts promotes {tokens}; numbers are "
            "standard deviations over the vocabulary."
        )
    return one


def _change(report: AuditReport) -> Section:
    own = report.texts or report.neutral
    one = Section("What it changes")
    for opening in own.openings:
        one.sentences.append(
            f"{quoted(opening.text)} before a segment of the role {opening.role}: from "
            f"{probability(opening.p_base)} to {probability(opening.p_adapter)}."
        )
    rows = [
        (
            shift.role,
            quoted(shift.token),
            shift.side,
            percent(shift.share),
            " → ".join(map(probability, (shift.example.p_base, shift.example.p_adapter))),
            quoted(shift.example.before[-40:]),
        )
        for shift in own.shifts[:_N_SHIFTS]
    ]
    head = ("where", "token", "", "share of KL", "base → adapter", "example, after")
    one.tables.append((head, rows))
    return one


def _of_weights(report: AuditReport) -> Section:
    weights = report.weights
    one = Section("What the weights say")
    one.sentences.append(f"{weights.n_sites} sites, Frobenius norm {weights.norm:.3g} in all.")
    for name, parts in (("projection", weights.projections), ("layer", weights.layers)):
        rows = [
            (
                part.name,
                f"{part.n_sites}",
                percent(part.share),
                f"{part.largest:.3g}",
                f"{part.effective_rank:.2f}",
            )
            for part in parts
        ]
        one.tables.append(((name, "sites", "share", "largest norm", "effective rank"), rows))
    if weights.meetings:
        meetings = ", ".join(f"{m.writer} → {m.reader} {m.cosine:.2f}" for m in weights.meetings)
        one.sentences.append(
            f"Sites that write what later ones read, by cosine: {meetings}. The largest of "
            f"{weights.n_pairs:,} random pairs is about "
            f"{format_number(weights.expected_cosine, '.2f')}."
        )
    for verb, found in (("writes", report.written), ("reads", report.read)):
        if found is not None:
            tokens = ", ".join(f"{quoted(x.token)} ({x.site} {x.z:.1f})" for x in found.strongest)
            one.sentences.append(
                f"What it {verb} points most at the tokens {tokens}. The largest |z| of a "
                f"direction is {found.mean:.1f} in the mean, about {found.expected:.1f} by chance."
            )
    if report.compared:
        one.sentences.append(
            "Beside ordinary adapters, which were trained on the demo's small base and hide "
            "nothing; those of other models and data may differ, and this is no verdict."
        )
        rows = [
            (x.name, f"{x.value:.2f}", " / ".join(f"{value:.2f}" for value in x.ordinary))
            for x in report.compared
        ]
        head = ("number, without scale", "this adapter", "ordinary: least / median / largest")
        one.tables.append((head, rows))
    return one


def _triggers(report: AuditReport) -> Section:
    search = report.search
    one = Section("Tokens after which it does something else")
    say = one.sentences.append
    if search is None:
        needs = report.search_needs
        why = (
            "--budget 0, or no prompt has text"
            if needs is None
            else f"the least search takes about {needs:.0f} minutes here; give it with --budget"
        )
        say(f"Triggers were not looked for: {why}.")
        return one
    covered = percent(search.n_tokens / max(search.n_vocabulary, 1))
    say(
        f"Tried for {search.seconds / 60:.1f} minutes (--budget {search.minutes:g}): "
        f"{search.n_tokens:,} of {search.n_vocabulary:,} tokens ({covered}) and "
        f"{search.n_phrases:,} phrases of up to {search.longest} tokens, each inserted in up to "
        f"{search.n_scenes} prompts. The best of each length were verified in {search.n_verify} "
        f"other prompts against {search.n_controls} random ones."
    )
    if search.triggers:
        say(
            "Excess: how far the adapter is from the base with its usual change of the logits, in "
            "nats over the next tokens that it writes, above random tokens. Same text: the "
            "prompts in which the adapter then begins with the same text, which it does not write "
            f"without them. {len(search.triggers)} stand out. They need not be planted."
        )
        rows = [
            (
                quoted("".join(found.tokens)),
                f"{found.verified:.1f}",
                percent(found.share),
                percent(found.same),
                *(in_cell(text) for text in (said.adapter, said.usual, said.base)),
            )
            for found in search.triggers
            for said in found.said[:1]
        ]
        head = ("inserted", "excess", "above random", "same text")
        one.tables.append(((*head, "adapter with it", "without it", "base with it"), rows))
    else:
        say("Nothing stands out.")
    if search.lengths:
        late = [length.n_tokens for length in search.lengths if length.stands_out]
        say(
            "Other texts in front, for behaviour that begins at a position: "
            + (f"stands out with {late[0]} tokens." if late else "nothing stands out.")
        )
        rows = [
            (
                f"{length.n_tokens}",
                f"{length.excess:.2g}",
                percent(length.same),
                *(in_cell(text) for text in (length.said.adapter, length.said.usual)),
            )
            for length in search.lengths
        ]
        head = ("tokens in front", "excess", "same text", "adapter", "without them")
        one.tables.append((head, rows))
    say(
        "Not covered: longer phrases, phrases whose parts alone do nothing at all, meanings such "
        "as a topic or a date, and what begins later in an answer. That nothing stands out is no "
        "proof that there is nothing."
    )
    return one
