"""Compare a store of the shipped model with a tokenisation that shares no code with lorascope.

    python benchmarks/reconcile.py train.jsonl        # records with `question` and `answer`

Runs `generate` on the whole file into a temporary folder. Then it renders every record with a
format string, encodes it with the `tokenizers` library alone, and compares rollouts, token ids
and rows.
"""

import argparse
import collections
import hashlib
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import lorascope
from lorascope import GenerateConfig
from lorascope.activations.store import ActivationStore
from lorascope.inspection import verify

SUBJECT = Path(lorascope.__file__).parent / "demo" / "subject"
TURNS = (
    "<|im_start|>system\nYou solve problems.<|im_end|>\n"
    "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
)


def main() -> None:
    """Compare and print; exit 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path)
    given = parser.parse_args()
    records = [json.loads(line) for line in given.dataset.read_text(encoding="utf-8").splitlines()]
    tokenizer = Tokenizer.from_file(str(SUBJECT / "base" / "tokenizer.json"))
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        out = lorascope.generate(
            GenerateConfig(
                lora_path=str(SUBJECT / "adapter"),
                dataset=str(given.dataset),
                num_examples=None,
                output=Path(folder) / "store",
                long_texts="window",
            )
        )
        seconds = time.perf_counter() - begun
        store = ActivationStore.open(out)
        broken = verify(out)
        seen: set[bytes] = set()
        counts: collections.Counter[str] = collections.Counter()
        place = 0
        for number, record in enumerate(records):
            text = TURNS.format(**{k: record[k].strip() for k in ("question", "answer")})
            ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
            digest = hashlib.sha256(ids.tobytes()).digest()
            if digest in seen:
                counts["duplicates"] += 1
                continue
            seen.add(digest)
            here = slice(store.rollout_start[place], store.rollout_start[place + 1])
            same = store.rollout_id[place] == number and np.array_equal(store.token_ids[here], ids)
            if not same:
                raise SystemExit(f"record {number} differs")
            counts["rollouts"] += 1
            counts["tokens"] += len(ids)
            place += 1
        rows = sum(len(block) for _, block in store.blocks(1 << 16))
        whole = place == store.n_rollouts and counts["tokens"] == store.n_rows == rows
        if broken or not whole or store.content["dropped"]["duplicate"] != counts["duplicates"]:
            raise SystemExit(f"{broken} {counts} {store.content} {rows}")
        print(
            f"{len(records)} records: {counts['rollouts']} rollouts, {counts['duplicates']} "
            f"duplicates, {counts['tokens']} tokens, {rows} rows of {store.d_in}, "
            f"{len(store.shards)} shards, {store.content['longer']['n']} longer than "
            f"{store.content['longest']}; every token id equal, checksums whole; {seconds:.0f} s, "
            f"{rows / seconds:.0f} tokens/s"
        )


if __name__ == "__main__":
    main()
