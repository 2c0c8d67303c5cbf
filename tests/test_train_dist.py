"""Training in several processes: the step of one process, and the same bytes whoever is stopped.

Run as a program, this file serves the tests below: it forks the processes of a job from one that
has imported everything and computed nothing, so that a job costs no imports.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from builders.definitions import objective
from builders.saes import weights_of
from builders.stores import planted_rows, write_store

from lorascope import runtime
from lorascope.artifact import digest_file
from lorascope.cli import call
from lorascope.errors import WorkerError
from lorascope.sae import trainer
from lorascope.sae.model import load_sae
from lorascope.sae.objective import Weights, initial_weights
from lorascope.sae.settings import TrainConfig
from lorascope.sae.sparsity import Rule
from lorascope.sae.step import Step
from lorascope.sae.team import Team, join_team
from lorascope.sae.train import run
from lorascope.sae.trainer import Trainer

pytestmark = pytest.mark.dist

ALONE = Team()
BATCH = 33  # odd: the processes have 16 and 17 rows
CASES = {
    f"{rule.architecture} k={rule.k} dead={n_dead}{' by row' * by_row}": (
        rule,
        n_dead,
        by_row,
    )
    for rule in [
        *(Rule(name, k) for name in ("batchtopk", "topk", "matryoshka") for k in (2.0, 0.3, 3.4)),
        Rule("jumprelu", 2.0),
    ]
    for n_dead in (0, 9)
    for by_row in ((False, True) if rule.architecture in ("batchtopk", "matryoshka") else (False,))
}
RUNS = {
    "batchtopk": {"architecture": "batchtopk"},
    "topk": {"architecture": "topk"},
    "matryoshka": {"architecture": "matryoshka"},
    "jumprelu": {"architecture": "jumprelu"},
}


def own(x: torch.Tensor, together: Team) -> torch.Tensor:
    """Return this process's part of a batch, as a plan deals it out."""
    n, rank, world = len(x), together.rank, together.world
    return x[rank * n // world : (rank + 1) * n // world]


def gradients(together: Team) -> dict[str, dict[str, torch.Tensor]]:
    """Take a step of every case, and return its loss and gradients."""
    found = {}
    generator = torch.Generator().manual_seed(1)
    x = own(torch.randn(BATCH, 7, generator=generator, dtype=torch.float64), together)
    for name, (rule, n_dead, by_row) in CASES.items():
        weights = weights_of(jump=rule.architecture == "jumprelu")
        step = Step(rule, k_aux=3, auxk_alpha=0.7, team=together)
        for _ in range(2):  # the second time with the first one's guess
            loss = step.take(weights, x, torch.arange(24) < n_dead, by_row=by_row)
        found[name] = {key: t.grad for key, t in weights.tensors().items()} | vars(loss)
    return found


def trained(together: Team) -> dict[str, dict[str, torch.Tensor]]:
    """Train each of `RUNS` for 64 steps in float64; return the weights and what a run counts."""
    rows = torch.tensor(planted_rows(64 * BATCH) / np.logspace(-2, 2, 14))
    found = {}
    for name, given in RUNS.items():
        jump = given["architecture"] == "jumprelu"
        generator = torch.Generator().manual_seed(0)
        first = initial_weights(rows.float(), 42, generator, learns_threshold=jump)
        one = Trainer(
            Weights(**{key: tensor.double() for key, tensor in first.tensors().items()}),
            **{"k": 2.6, "n_steps": 64, "lr": 0.01, "dead_after": 150, "team": together, **given},
        )
        for x in rows.split(BATCH):
            one.take(own(x, together))
        found[name] = {**one.weights.tensors(), "silent_tokens": one.silent_tokens.double()}
        assert any(line["dead"] for line in one.log), "aux-k is to have its share"
    return found


def arrange(how: str, at: int) -> None:
    """Let rank 1 be hit at a step: by SIGTERM, itself or torchrun, by SIGKILL, or offline."""
    take, told = trainer.Trainer.take, []

    def hit(self, x):
        if self.step == at and how == "offline":
            c10d._set_pg_timeout(timedelta(seconds=3))
        if self.step == at and os.environ["RANK"] == "1":
            if how == "agent":
                runtime.log.warning = lambda *words: told.append(words)  # as the signal arrives
                os.kill(os.getppid(), signal.SIGTERM)
                end = time.monotonic() + 60
                while not told and time.monotonic() < end:
                    time.sleep(0.01)
            elif how == "offline":
                subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
            else:
                os.kill(os.getpid(), signal.SIGTERM if how == "term" else signal.SIGKILL)
        return take(self, x)

    trainer.Trainer.take = hit


def work(rank: int, job: dict) -> int:
    """Do one process's share of a job and return its exit code."""
    torch.set_num_threads(1)
    os.environ.update({**job["env"], "RANK": str(rank), "LOCAL_RANK": str(rank)})
    if job.get("how"):
        arrange(job["how"], job["at"])
    if "words" in job:
        return call(job["words"])
    with join_team(torch.device("cpu")) as together:
        made = {"gradients": gradients(together), "trained": trained(together)}
    torch.save(made, Path(job["folder"]) / f"rank{rank}.pt")
    return 0


def fork(rank: int, job: dict) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for number, name in ((1, "out"), (2, "err")):
                file = os.open(f"{job['folder']}/{rank}.{name}", os.O_CREAT | os.O_WRONLY)
                os.dup2(file, number)
            code = work(rank, job)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            sys.stdout.flush()
            os._exit(code)
    return child


def serve() -> None:
    """Do one job for each line of stdin; answer with the exit codes, in the order of the ranks."""
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job["env"] = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        children = [fork(rank, job) for rank in range(2)]
        codes: dict[int, int] = {}
        end = time.monotonic() + 90
        while len(codes) < 2:
            for child in set(children) - codes.keys():
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > end:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        print(json.dumps([codes[child] for child in children]), flush=True)


def environment(**more: str) -> dict[str, str]:
    source = Path(trainer.__file__).parents[2]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(source), **more}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a function that runs a job in two processes: exit codes, and their output's folder."""
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def start(**job) -> tuple[list[int], Path]:
        assert server.stdin
        assert server.stdout
        folder = tmp_path_factory.mktemp("job")
        server.stdin.write(json.dumps({**job, "folder": str(folder)}) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline()), folder

    yield start
    server.communicate()


@pytest.fixture(scope="module")
def computed(pair):
    """What each of two processes computed: `gradients` and `trained`."""
    codes, folder = pair()
    assert codes == [0, 0], (folder / "0.err").read_text() + (folder / "1.err").read_text()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_of_two_processes_are_those_of_one_with_the_whole_batch(computed, name):
    first, second = (made["gradients"][name] for made in computed)
    expected = gradients_alone()[name]
    assert first.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(first[key], second[key]), key
        if tensor.dtype == torch.bool:
            assert torch.equal(first[key], tensor), key
        else:
            assert torch.allclose(first[key], tensor, rtol=1e-9, atol=1e-13), key


def gradients_alone(kept: list = []) -> dict[str, dict[str, torch.Tensor]]:  # noqa: B006
    if not kept:
        kept.append(gradients(ALONE))
    return kept[0]


def test_the_step_of_one_process_that_others_are_compared_with_is_the_definition():
    rule, n_dead, by_row = CASES["matryoshka k=3.4 dead=9"]
    weights = weights_of()
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, 7, generator=generator, dtype=torch.float64)
    dead = torch.arange(24) < n_dead
    objective(weights, x, rule, dead, k_aux=3, auxk_alpha=0.7, by_row=by_row).total.backward()
    found = gradients_alone()["matryoshka k=3.4 dead=9"]
    for name, tensor in weights.tensors().items():
        assert torch.allclose(found[name], tensor.grad, rtol=1e-9, atol=1e-13), name


@pytest.mark.parametrize("name", RUNS)
def test_many_steps_of_two_processes_give_the_weights_of_one(computed, name):
    first, second = (made["trained"][name] for made in computed)
    for key, tensor in trained_alone()[name].items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(first[key], tensor, rtol=1e-9, atol=1e-12), key


def trained_alone(kept: list = []) -> dict[str, dict[str, torch.Tensor]]:  # noqa: B006
    if not kept:
        kept.append(trained(ALONE))
    return kept[0]


@pytest.mark.parametrize("architecture", ["batchtopk", "topk", "matryoshka", "jumprelu"])
def test_a_process_without_rows_adds_nothing(architecture):
    """As where a batch has fewer rows than there are processes."""

    class Others(Team):
        def share(self, n):
            return 0, n + 3

    weights = weights_of(jump=architecture == "jumprelu")
    step = Step(Rule(architecture, 2.0), k_aux=3, auxk_alpha=0.7, team=Others())
    loss = step.take(weights, torch.zeros(0, 7, dtype=torch.float64), torch.arange(24) < 5)
    assert not loss.fired.any()
    names = weights.tensors().keys() - {"log_threshold"}  # which a term of all processes moves
    for name in names:
        grad = weights.tensors()[name].grad
        assert grad is not None
        assert not grad.any(), name


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    store = write_store(folder / "store", planted_rows(900), n_rollouts=12)
    return TrainConfig(
        data_dir=store.path,
        output=folder / "sae.pt",
        expansion_factor=2,
        k=3,
        batch_size=63,
        epochs=3,
        device="cpu",
        checkpoint_every=0,
    )


def words_of(config: TrainConfig) -> list[str]:
    words = ["train"]
    names = {"data_dir", "output", "expansion_factor", "k", "batch_size", "epochs"}
    for name in sorted(names | {"device", "checkpoint_every"}):
        value = getattr(config, name)
        words.append("--" + name.replace("_", "-"))
        words += map(str, value if isinstance(value, tuple) else [value])
    return words


def torchrun(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return subprocess.run(
        [*command, "2", *words],
        capture_output=True,
        text=True,
        check=False,
        env=environment(**more),
        timeout=120,
    )


@pytest.fixture(scope="module")
def straight(config):
    """The SAE of two processes that torchrun started, undisturbed."""
    done = torchrun("-m", "lorascope", *words_of(config))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == str(config.output)
    return config.output


def assert_close(one: Path, other: Path) -> None:
    """Compare two SAEs up to rounding and the order of latents: weights, what fires, the report.

    Latents that begin with the same weights may change places: rounding decides which of them is
    revived first.
    """
    first, second = load_sae(one), load_sae(other)
    directions = [torch.nn.functional.normalize(sae.W_dec, dim=1) for sae in (first, second)]
    order = (directions[0] @ directions[1].T).argmax(1)
    assert sorted(order.tolist()) == list(range(first.d_sae))
    for name, tensor in first.tensors().items():
        matched = second.tensors()[name]
        if name != "b_dec":
            matched = matched[:, order] if name == "W_enc" else matched[order]
        assert (tensor - matched).abs().max() <= 1e-3 * tensor.abs().max(), name
    rows = torch.tensor(planted_rows(300, seed=5), dtype=torch.float32)
    codes = [first.encode_dense(rows) > 0, second.encode_dense(rows)[:, order] > 0]
    assert (codes[0] != codes[1]).float().mean() < 1e-3
    reports = [sae.manifest.content["report"] for sae in (first, second)]
    for name in ("fvu", "l0", "cosine"):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-2)
    assert first.manifest.settings == second.manifest.settings


def test_under_torchrun_the_sae_is_that_of_one_process_up_to_rounding(config, straight, tmp_path):
    assert_close(run(replace(config, output=tmp_path / "alone.pt")), straight)


def test_the_same_job_gives_the_same_bytes(config, straight, pair, tmp_path):
    again = replace(config, output=tmp_path / "sae.pt")
    codes, folder = pair(words=words_of(again))
    assert codes == [0, 0]
    assert digest_file(again.output) == digest_file(straight)
    assert (folder / "0.out").read_text() == f"{again.output}\n"
    assert (folder / "1.out").read_text() == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sae.jsonl", "sae.pt"]


def test_a_signal_to_one_process_ends_all_with_143_and_loses_nothing(
    config, straight, pair, tmp_path
):
    given = replace(config, output=tmp_path / "sae.pt", checkpoint_every=60)
    codes, folder = pair(words=words_of(given), how="term", at=11)
    assert codes == [143, 143]
    for rank in range(2):
        err = (folder / f"{rank}.err").read_text()
        assert "Traceback" not in err
        assert "interrupted: finished work is kept" in err
    assert not given.output.exists()
    codes, folder = pair(words=words_of(given))
    assert codes == [0, 0]
    assert "resuming from step 12 of" in (folder / "0.err").read_text()
    assert digest_file(given.output) == digest_file(straight)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (RuntimeError("Connection closed by peer"), WorkerError),
        (torch.OutOfMemoryError("2 GiB wanted"), torch.OutOfMemoryError),
    ],
)
def test_memory_that_runs_out_in_an_exchange_is_not_a_lost_process(monkeypatch, raised, expected):
    def all_reduce(_):
        raise raised

    monkeypatch.setattr("torch.distributed.all_reduce", all_reduce)
    with pytest.raises(expected):
        Team(world=2).sum(torch.ones(1))


def test_a_killed_process_ends_the_others_and_one_alone_may_go_on(config, straight, pair, tmp_path):
    given = replace(config, output=tmp_path / "sae.pt")
    codes, folder = pair(words=words_of(given), how="kill", at=7)
    assert codes == [1, -signal.SIGKILL]
    (line,) = [line for line in (folder / "0.err").read_text().splitlines() if "Error" in line]
    assert "WorkerError: rank 0 of 2 has lost the others" in line
    assert not given.output.exists()
    assert_close(run(given), straight)


def test_a_signal_to_torchrun_is_passed_on_and_loses_nothing(config, straight, pair, tmp_path):
    given = replace(config, output=tmp_path / "sae.pt", checkpoint_every=60)
    stopped = torchrun(__file__, *words_of(given), HOW="agent", AT="9")
    assert stopped.returncode != 0
    assert stopped.stdout == ""
    assert not given.output.exists()
    codes, folder = pair(words=words_of(given))
    assert codes == [0, 0]
    assert "resuming from step 10 of" in (folder / "0.err").read_text()
    assert digest_file(given.output) == digest_file(straight)


TWO_NODES = """
set -e
mount -t tmpfs none /run
mkdir /run/netns
ip link add name bridge type bridge
ip link set bridge up
for i in 1 2; do
  ip netns add node$i
  ip link add port$i type veth peer name eth0 netns node$i
  ip link set port$i master bridge up
  ip -n node$i address add 10.7.0.$i/24 dev eth0
  ip -n node$i link set eth0 up
  ip -n node$i link set lo up
done
echo built
job() {
  for rank in 0 1; do
    RANK=$rank AT=$1 ip netns exec node$((rank + 1)) "${@:2}" 2>&1 | sed "s/^/$rank: /" &
  done
  wait
}
job 9 "$@"
ip -n node2 link set eth0 up
job 100000 "$@"
"""


def test_a_network_that_drops_ends_both_nodes_and_the_next_job_continues(
    config, straight, tmp_path
):
    """Two nodes are two network namespaces, in a user namespace of their own."""
    given = replace(config, output=tmp_path / "sae.pt")
    words = [sys.executable, __file__, *words_of(given)]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.7.0.1", "MASTER_PORT": "29500"}
    try:
        done = subprocess.run(
            ["unshare", "-Urnm", "bash", "-c", TWO_NODES, "bash", *words],
            env=environment(**job, HOW="offline", GLOO_SOCKET_IFNAME="eth0"),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if "built" not in done.stdout:
        pytest.skip(f"no network namespaces here: {done.stderr}")
    lines = done.stdout.splitlines()
    for rank in range(2):
        assert any(
            f"{rank}: WorkerError: rank {rank} of 2 has lost the others" in line for line in lines
        ), done.stdout
    assert not any("Traceback" in line for line in lines), done.stdout
    assert any("0: resuming from step 9 of" in line for line in lines), done.stdout
    assert digest_file(given.output) == digest_file(straight)


def test_several_saes_in_two_processes_are_all_published_with_their_table(
    config, pair, straight, tmp_path
):
    many = replace(config, k=(3, 5), output=tmp_path / "sae.pt")
    codes, folder = pair(words=words_of(many))
    assert codes == [0, 0], (folder / "1.err").read_text()[-2000:]
    rows = json.loads((tmp_path / "sae.runs.json").read_text())
    assert [row["sae"] for row in rows] == ["sae_k3.pt", "sae_k5.pt"]
    assert digest_file(tmp_path / "sae_k3.pt") == digest_file(straight)


def test_a_mistake_is_told_by_one_process(config, pair, tmp_path):
    bad = replace(config, k=1000, output=tmp_path / "sae.pt")
    codes, folder = pair(words=words_of(bad))
    assert codes == [2, 2]
    assert "--k is 1000, expected at most 28" in (folder / "0.err").read_text()
    assert list(tmp_path.iterdir()) == []


def main() -> None:
    """Serve the tests, or be a process of torchrun that is hit at a step."""
    if "HOW" not in os.environ:
        return serve()
    arrange(os.environ["HOW"], int(os.environ["AT"]))
    sys.exit(call(sys.argv[1:]))


if __name__ == "__main__":
    main()
