"""Several processes make one store: the same bytes, whoever is killed."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from builders.records import s1_records
from builders.stores import layout_of
from safetensors.torch import load_file, save_file

from lorascope import runtime
from lorascope.activations import generate
from lorascope.activations.generate import Corpus, GenerateConfig
from lorascope.cli import call, stage_parser
from lorascope.commands import COMMANDS
from lorascope.config import load_config
from lorascope.errors import ConfigError, WorkerError
from lorascope.sae.team import join_team


@pytest.fixture(scope="module")
def uneven_dataset(tmp_path_factory):
    """330 records, the later ones many times as long as the first: six uneven units."""
    path = tmp_path_factory.mktemp("data") / "uneven.jsonl"
    records = s1_records(330)
    for i, record in enumerate(records):
        record["deepseek_thinking_trajectory"] *= 1 + i // 150
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


@pytest.fixture
def config(subject_dirs, uneven_dataset, tmp_path):
    return lambda name: GenerateConfig(
        lora_path=str(subject_dirs[1]),
        dataset=str(uneven_dataset),
        output=tmp_path / name,
        batch_tokens=256,
    )


@pytest.fixture(scope="module")
def calm(subject_dirs, uneven_dataset, tmp_path_factory):
    """The files of the store that one process makes undisturbed, in a process of its own."""
    out = tmp_path_factory.mktemp("calm") / "store"
    command = [sys.executable, "-m", "lorascope", "generate", "--lora-path", str(subject_dirs[1])]
    command += ["--dataset", str(uneven_dataset), "--output", str(out), "--batch-tokens", "256"]
    subprocess.run(command, check=True, env=one_thread(), capture_output=True)
    return content(out)


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def content(out: Path) -> dict[str, bytes]:
    files = (file for file in out.rglob("*") if file.is_file())
    return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}


def workers() -> list[int]:
    """Return the process ids of this process's children that are workers of a job."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            command = (place / "cmdline").read_bytes()
            parent = re.search(r"PPid:\s*(\d+)", (place / "status").read_text())
        except OSError:
            continue
        if runtime.WORKER.encode() in command and parent and int(parent[1]) == os.getpid():
            found.append(int(place.name))
    return found


def kill_at_next_shard(folder: Path, n: int) -> threading.Thread:
    """Kill `n` workers once there is a shard more than now."""
    before = len(list(folder.glob("shard-*.h5")))

    def watch():
        stop = time.monotonic() + 120
        while len(list(folder.glob("shard-*.h5"))) <= before and time.monotonic() < stop:
            time.sleep(0.005)
        for process in workers()[:n]:
            os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.dist
def test_under_torchrun_the_store_is_that_of_one_process(config, calm):  # pitfall 9, B36
    given = config("store")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["3", "-m", "lorascope", "generate", "--lora-path", given.lora_path]
    command += ["--dataset", given.dataset, "--batch-tokens", "256"]
    command += ["--output", str(given.output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=one_thread())
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(given.output)
    assert content(given.output) == calm


@pytest.mark.dist
def test_killed_workers_end_the_job_and_any_other_number_finishes_it(
    config, calm, tmp_path, monkeypatch
):
    given = config("store")
    partial = tmp_path / "store.partial"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    watch = kill_at_next_shard(partial, 1)
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank \d of 2 was killed by SIGKILL: finished"):
        runtime.launch(2, "generate", given)
    watch.join()
    assert time.monotonic() - begun < 120
    assert workers() == []
    kept = sorted(file.name for file in partial.glob("shard-*.h5"))
    assert kept
    assert not given.output.exists()
    stamps = {name: (partial / name).stat().st_mtime_ns for name in kept}
    watch = kill_at_next_shard(partial, 3)
    with pytest.raises(WorkerError, match="of 3"):
        runtime.launch(3, "generate", given)
    watch.join()
    assert {name: (partial / name).stat().st_mtime_ns for name in kept} == stamps
    runtime.launch(1, "generate", given)
    assert content(given.output) == calm


@pytest.mark.dist
def test_what_a_worker_found_wrong_names_rank_and_unit(subject_dirs, config, tmp_path, capfd):
    loud = tmp_path / "loud"
    shutil.copytree(subject_dirs[1], loud)
    tensors = load_file(loud / "adapter_model.safetensors")
    name = next(n for n in tensors if "layers.1.mlp.down_proj.lora_A" in n)
    save_file({**tensors, name: tensors[name] * 1e9}, loud / "adapter_model.safetensors")
    changed = {"lora_path": str(loud), "base_model": str(subject_dirs[0])}
    with pytest.raises(WorkerError, match=r"rank \d of 2 ended with exit code 2") as failed:
        runtime.launch(
            2, "generate", GenerateConfig.from_json({**config("store").to_json(), **changed})
        )
    assert failed.value.exit_code == 2
    assert re.search(
        r"NumberError: rank \d, work unit \d: site 1.down_proj", capfd.readouterr().err
    )


def test_finished_and_foreign_units_are_not_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    targets = [tmp_path / f"{i}" for i in range(4)]
    targets[1].touch()
    found: list[int] = []

    def idle():
        raise TimeoutError  # the next wait is for the other process

    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys, time; f = open(sys.argv[1], 'a');"
            "fcntl.lockf(f, fcntl.LOCK_EX, 1, 2); print(1, flush=True); time.sleep(60)",
            str(tmp_path / "locks"),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout
    child.stdout.readline()
    taken = []
    with pytest.raises(TimeoutError):
        for unit in runtime.claim_work_units(targets, tmp_path / "locks", found.append, idle):
            taken.append(unit)
            targets[unit].touch()
    assert (taken, found) == ([0, 3], [1, 0, 3])
    child.kill()
    child.communicate()
    again = runtime.claim_work_units(targets, tmp_path / "locks", found.append, idle)
    assert next(again) == 2  # the lock died with its holder
    again.close()


def test_a_process_that_comes_late_leaves_nothing_in_a_finished_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    targets, found = [tmp_path / f"{i}" for i in range(3)], []
    for target in targets:
        target.touch()
    assert list(runtime.claim_work_units(targets, tmp_path / "locks", found.append, list)) == []
    assert found == [0, 1, 2]
    assert not (tmp_path / "locks").exists()
    gone = tmp_path / "published"
    assert list(runtime.claim_work_units([gone / "0"], gone / "locks", found.append, list)) == []


def test_without_locks_the_units_are_dealt_out_by_rank(tmp_path, monkeypatch):  # B28
    def no_locks(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    targets = [tmp_path / f"{i}" for i in range(7)]

    def idle():
        for target in targets:
            target.touch()

    found: list[int] = []
    taken = runtime.claim_work_units(targets, tmp_path / "locks", found.append, idle)
    assert list(taken) == [1, 4]
    assert sorted(found) == list(range(7))


def test_a_bad_environment_is_one_line(monkeypatch, capsys):
    def call_with(words, **environment):
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            return call(words), capsys.readouterr().err

    for name, value in (("RANK", ""), ("WORLD_SIZE", ""), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "")):
        assert call_with(["--version"], **{name: value}) == (0, "")
    for name, value in (("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "0"), ("WORLD_SIZE", "1.5")):
        code, line = call_with(["--version"], **{name: value})
        assert code == 2
        assert f"{name} is '{value}'" in line
        assert line.count("\n") == 1
    assert call_with(["--version"], RANK="1")[0] == 2  # it would wait for rank 0
    for environment in ({}, {"RANK": "0"}, {"RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "y"}):
        monkeypatch.setenv("WORLD_SIZE", "2")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(ConfigError, match="cannot meet .*; start them with torchrun"),
            join_team(torch.device("cpu")),
        ):
            pass


def test_more_gpus_than_there_are_are_not_started(monkeypatch):
    assert runtime.n_workers("auto", 4) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [runtime.n_workers("auto", n) for n in (None, 1, 2, 4, 0)] == [2, 1, 2, 2, 1]
    assert runtime.n_workers("cpu", 2) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime.n_workers("auto", 2) == 1
    assert runtime.pick_device("auto") == torch.device("cuda", 1)


def test_run_is_not_for_torchrun(subject_dirs, dataset_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["run", "--lora-path", str(subject_dirs[1]), "--dataset", str(dataset_file)]
    assert call([*words, "--output", str(tmp_path / "out")]) == 2
    assert "cannot be started by torchrun" in capsys.readouterr().err


def test_a_config_survives_the_way_to_another_process(config):
    given = config("store")
    assert GenerateConfig.from_json(given.to_json()) == given
    with pytest.raises(ConfigError):
        GenerateConfig.from_json({**given.to_json(), "batch_tokens": 0})


def test_a_full_disk_is_said_and_loses_nothing(
    subject_dirs, dataset_file, tmp_path, monkeypatch, capsys
):  # B27
    real, out = generate.write_shard, tmp_path / "store"

    def full(path, *args):
        if "shard-00001" in path.name:
            raise OSError(errno.ENOSPC, "Can't write data (file write failed)")  # as h5py says it
        real(path, *args)

    words = ["generate", "--lora-path", str(subject_dirs[1]), "--dataset", str(dataset_file)]
    words += ["--output", str(out)]
    monkeypatch.setattr(generate, "write_shard", full)
    assert call(words) == 2
    assert "no space left on device; finished work is kept" in capsys.readouterr().err
    kept = out.with_name("store.partial") / "shard-00000.h5"
    stamp = kept.stat().st_mtime_ns
    monkeypatch.setattr(generate, "write_shard", real)
    assert call(words) == 0
    assert (out / "shard-00000.h5").stat().st_mtime_ns == stamp


def test_out_of_memory_is_one_line(make_store, tmp_path, monkeypatch, capsys):
    words = ["train", "--data-dir", str(make_store().path), "--output", str(tmp_path / "sae")]
    words += ["--quiet", "--batch-size", "64"]
    assert call([*words, "--expansion-factor", str(10**12)]) == 2  # petabytes
    said = capsys.readouterr().err
    assert "GB of memory" in said
    assert "lower --expansion-factor to" in said
    assert said.count("\n") == 1
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), MemoryError()):
        monkeypatch.setattr("lorascope.sae.train._prepare", Mock(side_effect=error))
        assert call(words) == 2
        said = capsys.readouterr().err
        assert "lower --expansion-factor or --batch-size; finished work is kept" in said
        assert said.count("\n") == 1
    monkeypatch.setattr("lorascope.sae.train._prepare", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError):
        call(words)


def test_a_run_that_goes_on_needs_space_for_the_rest_only(tmp_path, monkeypatch):
    asked: list[int] = []
    monkeypatch.setattr(generate, "require_space", lambda _folder, n: asked.append(n))
    texts, config = Corpus([], {}, None, 0), GenerateConfig(sample=10, max_new_tokens=1000)
    for _ in range(2):
        generate._require_space(config, layout_of(), texts, tmp_path / "store")
        (tmp_path / "store.partial").mkdir(exist_ok=True)
        (tmp_path / "store.partial" / "shard-00000.h5").write_bytes(bytes(1000))
    assert asked[0] - asked[1] == 1000


RECORD = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv) + "\\n")
"""


def commands_of(script: list[str], folder: Path, **environment: str) -> tuple[list, list[str]]:
    """Run a script with programs that note how they are called; return torchrun's flags and the
    commands of lorascope, both as their own parsers understand them."""
    from torch.distributed.run import get_args_parser

    folder.mkdir(exist_ok=True)
    for name in ("torchrun", "lorascope"):
        (folder / name).write_text(RECORD.format(python=sys.executable), encoding="utf-8")
    (folder / "srun").write_text('#!/bin/sh\nexec "$@"\n', encoding="utf-8")
    (folder / "scontrol").write_text("#!/bin/sh\nprintf 'node1\\nnode2\\n'\n", encoding="utf-8")
    for program in folder.iterdir():
        program.chmod(0o755)
    log = folder / "calls.jsonl"
    own = {"PATH": f"{folder}:/usr/bin:/bin", "CALLS": str(log), "OUT": "/shared/out put"}
    own |= {"ADAPTER": "my adapter", "TEXTS": "texts.jsonl", **environment}
    subprocess.run(script, env=own, check=True)
    all_flags, commands = [], []
    for line in log.read_text().splitlines():
        program, *words = json.loads(line)
        if Path(program).name == "torchrun":
            flags = get_args_parser().parse_args(words)
            assert flags.module and flags.training_script == "lorascope"
            all_flags.append(flags)
            words = flags.training_script_args
        name, *rest = words
        given = vars(stage_parser(name).parse_args(rest))
        options = load_config(COMMANDS[name].config_class(), given, [])
        commands.append(name)
        assert str(getattr(options, "output", None) or "/shared").startswith("/shared")
    log.unlink()
    return all_flags, commands


ON_ALL, ON_ONE = ["generate", "train", "collect"], ["evaluate", "label", "dashboard"]


def test_the_slurm_script_starts_what_torchrun_and_lorascope_understand(tmp_path):
    """On two nodes that do not exist."""
    script = Path(__file__).parents[1] / "examples" / "slurm.sh"
    job = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}
    all_flags, commands = commands_of(["bash", str(script)], tmp_path / "bin", **job)
    assert commands == ON_ALL + ON_ONE
    text = script.read_text(encoding="utf-8")
    for flags in all_flags:
        assert (flags.rdzv_backend, flags.rdzv_endpoint) == ("c10d", "node1:29500")
        assert flags.rdzv_id == f"77-{flags.training_script_args[0]}"
        assert f"#SBATCH --gpus-per-node={flags.nproc_per_node}\n" in text
        assert f"#SBATCH --nodes={flags.nnodes}\n" in text
    bare = {"PATH": "/bin"}
    missing = subprocess.run(["bash", script], env=bare, capture_output=True, check=False)
    assert b"set ADAPTER to a folder" in missing.stderr


def test_the_kubernetes_job_starts_what_torchrun_and_lorascope_understand(tmp_path):
    file = Path(__file__).parents[1] / "examples" / "kubernetes.yaml"
    service, job = yaml.safe_load_all(file.read_text(encoding="utf-8"))
    pods, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    (container,) = pods["containers"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["spec"]["clusterIP"] == "None"  # a headless service: it names the pods
    assert service["spec"]["selector"] == {"job-name": name}  # a label that a Job gives its pods
    assert pods["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"  # sets JOB_COMPLETION_INDEX and host names
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pods["volumes"]}
    script = container["command"] + container["args"]
    for index, expected in (("0", ON_ALL + ON_ONE), ("1", ON_ALL)):
        all_flags, commands = commands_of(script, tmp_path / "bin", JOB_COMPLETION_INDEX=index)
        assert commands == expected
        for flags in all_flags:
            assert int(flags.nnodes) == job["spec"]["completions"]
            assert int(flags.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
            assert flags.rdzv_endpoint == f"{name}-0.{pods['subdomain']}:29500"
            assert flags.rdzv_id == flags.training_script_args[0]
    done = tmp_path / "done"
    (done / "activations").mkdir(parents=True)
    again = {"JOB_COMPLETION_INDEX": "1", "OUT": str(done)}
    (done / "sae").mkdir()
    (done / "features.h5").touch()
    with pytest.raises(FileNotFoundError):  # no program was called
        commands_of(script, tmp_path / "bin", **again)


@pytest.mark.slow
@pytest.mark.needs("moto")
@pytest.mark.needs("s3fs")
def test_a_store_comes_back_from_an_object_store_and_damage_is_found(make_store, tmp_path):
    """As docs/scale.md does it, with a server that speaks S3."""
    import fsspec
    from moto.server import ThreadedMotoServer

    store = make_store()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"key": "k", "secret": "s", "endpoint_url": f"http://{host}:{port}"}
        files = fsspec.filesystem("s3", **keys)
        files.mkdir("bucket")
        files.put(f"{store.path}/", "bucket/activations/", recursive=True)
        files.get("bucket/activations/", f"{tmp_path / 'local'}/", recursive=True)
    finally:
        server.stop()
    assert content(tmp_path / "local") == content(store.path)
    assert call(["verify", str(tmp_path / "local")]) == 0
    shard = next((tmp_path / "local").glob("shard-*.h5"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert call(["verify", str(tmp_path / "local")]) == 1
