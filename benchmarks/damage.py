"""Count how much damage `lorascope verify` finds, and whether a damaged file can end the process.

    python benchmarks/damage.py --cases 150

Every kind of artifact is made once, small, by the stages themselves, from the shipped subject.
Each case copies one, damages the copy in a seeded random way, and looks at it in a child process:

- `found`: cases of which `verify` exits with 1 (flipped bits, truncations, swapped parts or files,
  missing and added files).
- `crashes`: child processes of `verify` and `info` that a signal ended, that took over a minute,
  or that raised anything but an error of one line.

Then the same damage is *resealed*: checksums and seals are written anew over the damaged bytes, as
an attacker would. Nothing can be found then but wrong contents, and nothing may crash. For files of
other tools (published stores and `.pt` files), which have no checksums, all damage is of this sort.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from lorascope import artifact, cli, inspection
from lorascope.errors import LorascopeError

_MINUTE = 60


def damage(path: Path, rng: random.Random) -> str:
    """Damage an artifact, a folder or a file, in one random way, and return what was done.

    The bytes are other ones afterwards, always.
    """
    if not path.is_dir():
        return _damage_file(path, rng, ("flip", "truncate", "swap", "extra"))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = rng.choice(files)
    how = rng.choice(("flip", "flip", "flip", "truncate", "swap", "missing", "extra"))
    if how == "missing":
        file.unlink()
    elif how == "extra":
        (file.parent / f"extra-{file.name}").write_bytes(file.read_bytes())
    elif how == "swap":
        other = rng.choice([f for f in files if f.read_bytes() != file.read_bytes()])
        first, second = file.read_bytes(), other.read_bytes()
        file.write_bytes(second)
        other.write_bytes(first)
    else:
        return _damage_file(file, rng, (how,))
    return f"{how} {file.relative_to(path)}"


def _damage_file(file: Path, rng: random.Random, ways: tuple[str, ...]) -> str:
    data = bytearray(file.read_bytes())
    how = rng.choice(ways if len(data) > 64 else ("extra",))
    at = rng.randrange(len(data)) if data else 0
    if rng.random() < 0.3:
        at = min(at, rng.randrange(4096))  # headers are small and matter most
    if how == "flip":
        data[at] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        del data[at:]
    elif how == "extra":
        data += bytes([rng.randrange(256)])
    else:
        other, size = rng.randrange(len(data)), rng.randrange(1, 64)
        first, second = bytes(data[at : at + size]), bytes(data[other : other + size])
        if len(first) != len(second) or first == second or abs(at - other) < size:
            data[at] ^= 255
        else:
            data[at : at + size], data[other : other + size] = second, first
    file.write_bytes(data)
    return f"{how} {file.name} at {at}"


def reseal(path: Path) -> None:
    """Write checksums and seals anew, as if the damaged bytes were the right ones."""
    target = path
    if path.is_dir():
        target = path / artifact.MANIFEST
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            data = json.loads(target.read_text())
            for name, known in data["files"].items():
                file = path / name
                if file.is_file():
                    known["bytes"] = file.stat().st_size
                    known["sha256"] = artifact.digest_file(file)
            target.write_text(json.dumps(data, indent=1))
    if target.is_file():
        content = target.read_bytes()
        found = content.rfind(artifact.SEAL)
        start = found + len(artifact.SEAL)
        if found >= 0 and start + 64 <= len(content):
            target.write_bytes(content[:start] + b"0" * 64 + content[start + 64 :])
            artifact.seal_file(target)


def in_child(work: Callable[[], int]) -> tuple[int, str]:
    """Run work in a forked process; return its exit code, negative for a signal, and stderr."""
    with tempfile.TemporaryFile("w+") as log:
        child = os.fork()
        if child == 0:
            os.dup2(log.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 70
            try:
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        begun = time.monotonic()
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() - begun > _MINUTE:
                os.kill(child, 9)
            time.sleep(0.001)
        log.seek(0)
        return os.waitstatus_to_exitcode(status), log.read()


def _look(path: Path) -> int:
    """Run `info` and `verify` and return what `verify` exits with.

    Raises AssertionError where an exit code is none that the commands promise.
    """
    codes = {}
    for name, allowed in (("info", (0, 2)), ("verify", (0, 1))):
        with contextlib.redirect_stderr(io.StringIO()) as text:
            codes[name] = cli.call([name, str(path)])
        assert codes[name] in allowed, f"{name} exits with {codes[name]}"
        assert codes[name] != 2 or len(text.getvalue().splitlines()) == 1, text.getvalue()
    return codes["verify"]


def _read_all(path: Path, store: Path) -> int:
    """Read a file of another tool, as `train` and `collect` would."""
    from lorascope.activations.store import ActivationStore
    from lorascope.sae.model import load_sae

    try:
        if path.is_dir():
            opened = ActivationStore.open(path)
            opened.rows(0, opened.n_rows)
        else:
            load_sae(path, ActivationStore.open(store))
    except LorascopeError:
        return 2
    return 0


def check(source: Path, store: Path, scratch: Path, seed: int) -> dict[str, int]:
    """Damage a copy of an artifact and return what was seen: `found` and `crashes`, 0 or more."""
    copy = scratch / source.name
    is_ours = artifact.read_manifest(source) is not None
    seen = {"found": 0, "crashes": 0}
    for resealed in (False, True) if is_ours else (True,):
        if copy.is_dir():
            shutil.rmtree(copy)
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copyfile(source, copy)
        done = damage(copy, random.Random(seed))
        if resealed and is_ours:
            reseal(copy)
        code, text = in_child(lambda: _look(copy) if is_ours else _read_all(copy, store))
        what = f"{source.name}, seed {seed}, resealed {resealed}: {done}"
        if not resealed:
            seen["found"] += code == 1
            if code == 0:
                print(f"not found: {what}", file=sys.stderr)
        if code not in (0, 1, 2):
            seen["crashes"] += 1
            print(f"exit code {code}: {what}: {text.strip().splitlines()[-6:]}", file=sys.stderr)
    return seen


def make_all(folder: Path) -> dict[str, Path]:
    """Make a small artifact of every kind and return the paths by kind; foreign ones come last."""
    from lorascope import pipeline
    from lorascope.activations.store import ActivationStore
    from lorascope.causal import edit, evaluate, steer
    from lorascope.demo.demo import DemoConfig, demo_run

    sys.path.append(str(Path(__file__).parents[1] / "examples"))
    from demo_problems import write_jsonl

    from lorascope.features import export
    from lorascope.sae.model import load_sae

    problems, sae, store = folder / "problems.jsonl", folder / "sae", folder / "activations"
    write_jsonl(problems, 66, "demo")
    config = demo_run(problems, DemoConfig(output=folder, num_examples=66, effect_texts=1))
    pipeline.run(config)
    index = folder / "features.h5"
    export.run(export.ExportConfig(input=index, output=folder / "json.json"))
    load_sae(sae).save(folder / "sae.pt")
    given = {
        "lora_path": config.lora_path,
        "base_model": config.base_model,
        "data_dir": store,
        "sae": sae,
        "device": "cpu",
        "max_rollouts": 1,
    }
    evaluate.run(evaluate.EvaluateConfig(**given, output=folder / "evaluation.json"))
    steer.run(
        steer.SteerConfig(
            **given, features=(1,), num_prompts=1, max_new_tokens=4, output=folder / "steering.json"
        )
    )
    for name, tolerance in (("edit-adapter", 1e9), ("edit-patch", 0.0)):
        edit.run(edit.EditConfig(**given, features=(1,), tolerance=tolerance, output=folder / name))
    opened = ActivationStore.open(store)
    _write_published(folder / "published", opened)
    _write_published_sae(folder / "published.pt", sae)
    effects = folder / "effects"
    return {
        "activation store": store,
        "SAE, folder": sae,
        "SAE, .pt": folder / "sae.pt",
        "features.h5": index,
        "features JSON": folder / "json.json",
        "ablation": effects / "ablation.json",
        "attribution": effects / "attribution.json",
        "direct": effects / "direct.json",
        "evaluation": folder / "evaluation.json",
        "steering": folder / "steering.json",
        "edit, adapter": folder / "edit-adapter",
        "edit, patch": folder / "edit-patch",
        "page": folder / "dashboard.html",
        "published store": folder / "published",
        "published .pt": folder / "published.pt",
    }


def _write_published(folder: Path, store) -> None:
    """Write three rollouts of a store as the published scripts do."""
    import h5py

    folder.mkdir()
    tokens = {}
    types = store.layout.adapter_types
    for i in range(3):
        first, last = store.rollout_start[i : i + 2].tolist()
        rows = store.rows(first, last).reshape(last - first, -1, len(types))
        with h5py.File(folder / f"rollout_{i}.h5", "w") as file:
            file.create_dataset("activations", data=rows, compression="gzip", compression_opts=1)
            file.attrs.update(num_tokens=len(rows), num_layers=rows.shape[1], rollout_idx=i)
            file.attrs["adapter_types"] = list(types)
        tokens[i] = [f"t{id_}" for id_ in store.token_ids_of(first, last)]
    (folder / "rollout_tokens.json").write_text(json.dumps(tokens))


def _write_published_sae(path: Path, sae: Path) -> None:
    import torch

    from lorascope.sae.model import load_sae

    loaded = load_sae(sae)
    state = {name: getattr(loaded, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    torch.save({"model_state_dict": state, "config": {"k": 3}}, path)


def count(job: tuple[str, Path, Path, list[int]]) -> str:
    """Run the cases of one kind, one for each seed, and return its line of the table."""
    kind, source, store, seeds = job
    is_ours = artifact.read_manifest(source) is not None
    if is_ours:
        assert inspection.verify(source) == [], f"{kind} is whole, but verify says otherwise"
    with tempfile.TemporaryDirectory() as scratch:
        seen = [check(source, store, Path(scratch), seed) for seed in seeds]
    found = str(sum(one["found"] for one in seen)) if is_ours else "-"
    resealed = str(len(seen)) if is_ours else "-"
    crashes = sum(one["crashes"] for one in seen)
    return f"{kind:<18}{len(seen):>7}{found:>8}{resealed:>10}{crashes:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the damage that verify finds.")
    parser.add_argument("--cases", type=int, default=150, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        kinds = make_all(Path(temporary))
        store = kinds["activation store"]
        jobs = []
        for number, (kind, source) in enumerate(kinds.items()):
            first = flags.seed + 1_000_000 * number
            jobs.append((kind, source, store, list(range(first, first + flags.cases))))
        begun = time.monotonic()
        print(f"{'kind':<18}{'cases':>7}{'found':>8}{'resealed':>10}{'crashes':>9}")
        with multiprocessing.get_context("spawn").Pool(flags.processes) as pool:
            for line in pool.imap(count, jobs):
                print(line, flush=True)
        print(f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
