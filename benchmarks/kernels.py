"""How long each kernel takes beside plain torch, and beside moving its bytes, in one run.

    python benchmarks/kernels.py --rows 1024 --d-in 448 --latents 7168 --k 50

For `best_indices`, `by_latent`, `gather_sum` (decoding by rows, and the gradient of a table by
latents) and `pair_dot`, on random data of the given sizes: the median time in ms of lorascope's
kernel for the device and of what torch offers, the ways alternating; and that time over the time
in which the machine copies as many bytes as the operation must read and write. The copy rate is
measured in the same run, on 256 MiB. `product` is the dense encoder product, for scale. The ways
are compared with each other before they are timed.

On CUDA each way is timed by events, and lorascope's also as a captured graph, which leaves out the
launches. Every timed run follows an untimed one of the same way: data that fits into a cache is
there, for every way. torch's `topk` leaves open which of equal scores it takes and does not order
the indices; the kernel does both.

Nothing has been measured on a GPU so far: no figure from one is in `results.md`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from lorascope import kernels

Ways = dict[str, Callable[[], Any]]
COPIED = 256 << 20


def main() -> None:
    given = _arguments()
    device = torch.device(given.device)
    ours = kernels.for_device(device)
    generator = torch.Generator(device).manual_seed(0)
    rate = _copy_rate(device, given.repeats)
    print(f"{_name(device)}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{given.rows} rows, d_in {given.d_in}, {given.latents} latents, k {given.k}")
    print(f"copy: {rate / 1e9:.1f} GB/s read and written\n")
    print(f"{'operation':<14} {'way':<28} {'ms':>9} {'over copy':>10}")

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, table = draw(given.rows, given.d_in), draw(given.latents, given.d_in)
    scores = x @ table.T / given.d_in**0.5
    n = round(given.k * given.rows)
    indices = ours.best_indices(scores, n)[0]
    rows, latents = indices // given.latents, indices % given.latents
    values = scores.view(-1)[indices].float()
    row_offsets = ours.row_offsets(rows, given.rows)
    order, latent_offsets = ours.by_latent(latents, given.latents)
    by_latent = (values[order], rows[order], latent_offsets, x)
    row_bytes, score_bytes = 4 * given.d_in, scores.element_size()

    moved = (x.numel() + table.numel() + scores.numel()) * score_bytes
    _report("product", {"torch.mm": lambda: x @ table.T}, moved, rate, device, given.repeats)

    ways: Ways = {
        "lorascope": lambda: ours.best_indices(scores, n)[0],
        "torch.topk": lambda: torch.topk(scores.view(-1), n, sorted=False).indices,
    }
    assert torch.equal(*(scores.view(-1)[way()].float().sort().values for way in ways.values()))
    moved = scores.numel() * score_bytes + n * 8
    _report("best_indices", ways, moved, rate, device, given.repeats)

    ways = {
        "lorascope": lambda: ours.by_latent(latents, given.latents),
        "torch.sort and bincount": lambda: (
            latents.sort(stable=True).indices,
            latents.bincount(minlength=given.latents).cumsum(0),
        ),
    }
    assert torch.equal(*(way()[0] for way in ways.values()))
    moved = (2 * n + given.latents) * 8
    _report("by_latent", ways, moved, rate, device, given.repeats, capture={"lorascope"})

    decode = _sum_ways(ours, values, latents, row_offsets, table, rows)
    moved = n * (row_bytes + 12) + given.rows * row_bytes
    _report("gather_sum", decode, moved, rate, device, given.repeats)
    gradient = _sum_ways(ours, *by_latent, latents[order])
    moved = n * (row_bytes + 12) + given.latents * row_bytes
    _report("its gradient", gradient, moved, rate, device, given.repeats)

    ways = {
        "lorascope": lambda: ours.pair_dot(x, rows, table, latents),
        "(left[i] * right[j]).sum(1)": lambda: (x[rows] * table[latents]).sum(1),
        "torch.mm, then gathered": lambda: (x @ table.T).view(-1)[indices],
    }
    moved = n * (row_bytes + 12) + given.rows * row_bytes
    _check(ways)
    _report("pair_dot", ways, moved, rate, device, given.repeats)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--d-in", type=int, default=448)
    parser.add_argument("--latents", type=int, default=7168)
    parser.add_argument("--k", type=float, default=50)
    parser.add_argument("--repeats", type=int, default=20, help="of each way; medians are printed")
    return parser.parse_args()


def _sum_ways(
    ours: Any, values: Tensor, index: Tensor, offsets: Tensor, table: Tensor, bags: Tensor
) -> Ways:
    """Return the ways of one `gather_sum`; `bags` is the bag of each pair."""
    zeros = table.new_zeros(len(offsets) - 1, table.shape[1])
    ways: Ways = {
        "lorascope": lambda: ours.gather_sum(values, index, offsets, table),
        "torch embedding_bag": lambda: embedding_bag(
            index, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True
        ),
        "torch index_add": lambda: zeros.index_add(0, bags, values[:, None] * table[index]),
    }
    _check(ways)
    return ways


def _check(ways: Ways) -> None:
    first, *others = (way() for way in ways.values())
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-3, atol=1e-3)


def _report(
    operation: str,
    ways: Ways,
    moved: int,
    rate: float,
    device: torch.device,
    repeats: int,
    capture: set[str] | None = None,
) -> None:
    """Time the ways in turn and print a line for each."""
    if device.type == "cuda":
        names = capture if capture is not None else {"lorascope"}
        ways |= {f"{name}, captured": _captured(ways[name]) for name in names & set(ways)}
    for name, ms in _milliseconds(ways, device, repeats).items():
        print(f"{operation:<14} {name:<28} {ms:9.3f} {ms / (1e3 * moved / rate):10.2f}")


def _milliseconds(ways: Ways, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the median time of each way; the first three rounds do not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(repeats + 3):
        for name, way in ways.items():
            way()  # so that none finds in the cache what the one before it left
            ms = _timed(way, device)
            if round_ >= 3:
                times[name].append(ms)
    return {name: statistics.median(found) for name, found in times.items()}


def _timed(way: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        way()
        return 1e3 * (time.perf_counter() - begun)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    way()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _captured(way: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a way captured into a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        way()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        way()
    return graph.replay


def _copy_rate(device: torch.device, repeats: int) -> float:
    """Return the bytes per second, read and written together, of a copy inside the device."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    ms = _milliseconds({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * COPIED / (ms / 1e3)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    main()
