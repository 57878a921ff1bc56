#!/usr/bin/env python3
"""The ops against a copy of the same bytes and against the torch calls that other pruners use.

    python benchmarks/bench_ops.py [--device cuda|cpu] [--shapes 4096x4096,4096x11008] [--dtype bfloat16] [--json FILE]

Prints one row for each op and shape: microseconds (median of repeats); GB/s (the weight or the activations read once
and, if changed, written once); the time in units of a ``copy_`` of as many bytes between two existing tensors, measured
in turn with the op; the ratio to each baseline; and peak extra memory in per cent of the weight. ``copy_percent`` of
the JSON is the op's GB/s in per cent of the copy's.

Baselines: Wanda's sequence of torch calls (abs, sqrt, stable sort of every row, scatter, index assignment),
``torch.topk`` with a scatter, a Python loop over N:M groups of columns, and for moments Wanda's ``torch.norm`` and
``torch.var_mean``. For ``balance`` it is the selection of the mask that it starts from: at ``0.5x selection`` it takes
twice its time. Each repeat prunes a fresh copy of the weight, or balances one of the mask; making it is not timed.

On a GPU the second-level cache is flushed before each measurement, so that nothing is read from it, and a kernel that
waits keeps the device busy while the host queues the events and the op between them: launches are not timed, and
nothing synchronises before the first event. On a CPU a weight that fits into the last-level cache is read from there,
and so is the copy that it is compared with.

Extra memory on a GPU is the growth of the allocator's peak. On a CPU (Linux only) it is the growth of the resident peak
(VmHWM) of a fresh process over one call. That process returns freed memory to the system at once, so that no memory is
reused without being counted. The kernel counts in batches of pages, so the figure is accurate to about 0.3 MB.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ace_ext import ops
from ace_ext.process_memory import peak_memory_bytes, reset_peak, resident_bytes
from ace_ext.pruning.stages.admm import torch_change_, torch_update_

DEFAULT_SHAPES = {"cuda": "4096x4096,4096x11008,11008x4096,8192x28672", "cpu": "4096x4096,4096x11008"}
TOKENS = {"cuda": 16384, "cpu": 2048}


# Baselines


def wanda_rows(weight: Tensor, square_sum: Tensor, pruned: int) -> None:
    """Wanda's unstructured pruning with the same torch calls."""
    metric = torch.abs(weight) * torch.sqrt(square_sum.reshape(1, -1))
    mask = torch.zeros_like(metric, dtype=torch.bool)
    indices = torch.sort(metric, dim=-1, stable=True)[1][:, :pruned]
    mask.scatter_(1, indices, True)
    weight[mask] = 0


def wanda_nm(weight: Tensor, square_sum: Tensor, pruned: int, group_m: int) -> None:
    """Wanda's N:M pruning: a Python loop over groups of columns."""
    metric = torch.abs(weight) * torch.sqrt(square_sum.reshape(1, -1))
    mask = torch.zeros_like(metric, dtype=torch.bool)
    for j in range(0, metric.shape[1], group_m):
        group = metric[:, j : j + group_m].float()
        mask.scatter_(1, j + torch.topk(group, pruned, dim=1, largest=False)[1], True)
    weight[mask] = 0


def topk_rows(weight: Tensor, column: Tensor, keep_k: int) -> None:
    score = weight.abs() * column
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, score.topk(keep_k, dim=1, sorted=False)[1], True)
    weight.mul_(kept)


def topk_matrix(weight: Tensor, column: Tensor, keep_k: int) -> None:
    score = (weight.abs() * column).flatten()
    kept = torch.zeros_like(score, dtype=torch.bool).scatter_(0, score.topk(keep_k, sorted=False)[1], True)
    weight.mul_(kept.view_as(weight))


def wanda_square_sum(x: Tensor) -> None:
    torch.norm(x.t().float(), p=2, dim=1) ** 2


def two_pass_moments(x: Tensor) -> None:
    torch.var_mean(x.float(), dim=0, correction=0)


def add_product(gram: Tensor, x: Tensor) -> None:
    rows = x.float()
    gram.addmm_(rows.T, rows)


# Cases


@dataclass
class Case:
    op: str
    shape: str
    tensor: Tensor
    """The tensor whose size extra memory is relative to, and which the reference copy copies."""
    written: bool
    action: Callable[[], None]
    prepare: Callable[[], None]
    baselines: dict[str, Callable[[], None]]


def prune_cases(rows: int, cols: int, dtype: torch.dtype, device: str) -> list[Case]:
    source = torch.randn(rows, cols, device=device).to(dtype)
    square_sum = torch.rand(cols, device=device) + 0.1
    column = square_sum.sqrt()
    weight = torch.empty_like(source)
    half = cols // 2

    def case(op: str, action: Callable, baselines: dict[str, Callable[[], None]], written: bool = True) -> Case:
        return Case(op, f"{rows}x{cols}", weight, written, action, lambda: weight.copy_(source), baselines)

    cases = [
        case(
            "top-k by row",
            lambda: ops.prune_topk_(weight, "scaled", half, column=column),
            {
                "Wanda": lambda: wanda_rows(weight, square_sum, cols - half),
                "torch.topk": lambda: topk_rows(weight, column, half),
            },
        ),
        case(
            "top-k by matrix",
            lambda: ops.prune_topk_(weight, "scaled", rows * half, column=column, group="matrix"),
            {"torch.topk": lambda: topk_matrix(weight, column, rows * half)},
        ),
        case("mask by row", lambda: ops.topk_mask(weight, "scaled", half, column=column), {}, written=False),
        case("mask 2:4", lambda: ops.nm_mask(weight, "scaled", 2, 4, column=column), {}, written=False),
    ]
    for keep_n, group_m in ((2, 4), (4, 8)):
        cases.append(
            case(
                f"{keep_n}:{group_m}",
                lambda n=keep_n, m=group_m: ops.prune_nm_(weight, "scaled", n, m, column=column),
                {"Python loop": lambda n=keep_n, m=group_m: wanda_nm(weight, square_sum, m - n, m)},
            )
        )
    return cases


def mean_cases(rows: int, cols: int, dtype: torch.dtype, device: str) -> list[Case]:
    """Balancing the mask of a selection, which is the baseline."""
    weight = (torch.randn(rows, cols, device=device) * 0.02).to(dtype)
    variance = torch.rand(cols, device=device) + 0.1
    mean = torch.randn(cols, device=device) * variance.sqrt() / 2
    column = variance.sqrt()

    def case(name: str, select: Callable[[], Tensor], group_m: int) -> Case:
        start = select()
        mask = start.clone()
        return Case(
            f"balance {name}",
            f"{rows}x{cols}",
            weight,
            False,
            lambda: ops.balance_mean_(mask, weight, variance, mean, group_m),
            lambda: mask.copy_(start),
            {"selection": select},
        )

    return [
        case("by row", lambda: ops.topk_mask(weight, "scaled", cols // 2, column=column), 0),
        case("2:4", lambda: ops.nm_mask(weight, "scaled", 2, 4, column=column), 4),
    ]


def admm_cases(rows: int, cols: int, dtype: torch.dtype, device: str) -> list[Case]:
    """What an iteration of ADMM does beside its mask and its product, which has the dtype."""
    if device != "cpu" or dtype == torch.float16:
        return []  # on a GPU these are torch's operations
    weight, dense = torch.randn(rows, cols), torch.randn(rows, cols)
    product, norm = torch.randn(rows, cols).to(dtype), torch.rand(cols) + 0.1
    change, mask, start = torch.empty_like(product), weight > 0, weight.clone()

    def step(change_: Callable[..., None], update_: Callable[..., None]) -> None:
        change_(change, weight, mask, dense, norm)
        update_(weight, product, mask, dense, norm, 0.4)

    return [
        Case(
            "ADMM",
            f"{rows}x{cols}",
            weight,
            False,
            lambda: step(ops.admm_change_, ops.admm_update_),
            lambda: weight.copy_(start),
            {"torch": lambda: step(torch_change_, torch_update_)},
        )
    ]


def moment_cases(tokens: int, cols: int, dtype: torch.dtype, device: str) -> list[Case]:
    x = torch.randn(tokens, cols, device=device).to(dtype)
    state = [torch.zeros(size, device=device) for size in ((), (cols,), (cols,))]

    def case(op: str, action: Callable[[], None], baselines: dict[str, Callable[[], None]]) -> Case:
        return Case(op, f"{tokens}x{cols}", x, False, action, lambda: None, baselines)

    baselines = {"torch.norm": lambda: wanda_square_sum(x), "var_mean": lambda: two_pass_moments(x)}
    cases = [
        case("moments", lambda: ops.update_moments_(*state, x), baselines),
        case("1/|a|^2", lambda: ops.inverse_square_norm(x), {}),
    ]
    if device == "cpu":  # on a GPU it is torch's product
        gram = torch.zeros(cols, cols)
        cases.append(case("Gram", lambda: ops.update_gram_(gram, x), {"addmm": lambda: add_product(gram, x)}))
    return cases


# Measuring


class CudaTimer:
    """Times what is queued on the current stream, without what queuing it costs the host."""

    WAIT_CYCLES = 4_000_000  # about two milliseconds: longer than the host takes to queue an op

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flushed = torch.empty(4 * cache, dtype=torch.uint8, device="cuda")
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def __call__(self, prepare: Callable[[], None], action: Callable[[], None]) -> float:
        """Seconds of ``action`` after ``prepare``, which is not timed."""
        prepare()
        self.flushed.zero_()
        torch.cuda._sleep(self.WAIT_CYCLES)
        self.events[0].record()
        action()
        self.events[1].record()
        self.events[1].synchronize()
        return self.events[0].elapsed_time(self.events[1]) / 1e3


def seconds(actions: list[Callable[[], None]], prepare: Callable[[], None], device: str, budget: float) -> list[float]:
    """Each action's median seconds. The actions take turns, as often as the budget allows (3 to 50 repeats), after one
    repeat to warm up."""
    times: list[list[float]] = []
    timer = CudaTimer() if device == "cuda" else None
    started = time.perf_counter()
    while len(times) < 4 or (len(times) < 51 and time.perf_counter() - started < budget):
        times.append([])
        for action in actions:
            if timer is not None:
                times[-1].append(timer(prepare, action))
            else:
                prepare()
                clock = time.perf_counter()
                action()
                times[-1].append(time.perf_counter() - clock)
    return [statistics.median(column) for column in zip(*times[1:], strict=True)]


def cuda_extra_bytes(case: Case) -> int:
    case.prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure_resident_growth(build: Callable, sizes: tuple[int, int], dtype: torch.dtype, index: int) -> int:
    """Runs in a separate process. A first call on a few rows starts the threads and loads the code; the second call is
    measured."""
    with torch.no_grad():
        few = build(min(sizes[0], 128), *sizes[1:], dtype, "cpu")[index]
        few.prepare()
        few.action()
        case = build(*sizes, dtype, "cpu")[index]
        case.prepare()
        ctypes.CDLL(None).malloc_trim(0)
        if not reset_peak():
            sys.exit("this system does not let a process reset its peak")
        before = resident_bytes()
        case.action()
        return max(peak_memory_bytes() - before, 0)


def cpu_extra_bytes(build: Callable, sizes: tuple[int, int], dtype: torch.dtype, index: int) -> int | None:
    if sys.platform != "linux":
        return None
    # Otherwise glibc keeps freed blocks for later calls, and more of them if they are large.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "16384"
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_resident_growth, build, sizes, dtype, index).result()


class Bench:
    def __init__(self, device: str, dtype: torch.dtype, budget: float):
        self.device, self.dtype, self.budget = device, dtype, budget
        self.rows: list[dict] = []

    def run(self, build: Callable, *sizes: int) -> None:
        """Measures and prints the cases that ``build(*sizes, dtype, device)`` makes."""
        for index, case in enumerate(build(*sizes, self.dtype, self.device)):
            if self.device == "cuda":
                extra = cuda_extra_bytes(case)
            else:
                extra = cpu_extra_bytes(build, sizes, self.dtype, index)
            self.report(case, extra)

    def report(self, case: Case, extra: int | None) -> None:
        source, target = torch.ones_like(case.tensor), torch.ones_like(case.tensor)
        actions = [case.action, lambda: target.copy_(source)]
        time_s, copy_s = seconds(actions, case.prepare, self.device, self.budget)
        size = case.tensor.numel() * case.tensor.element_size()
        row = {
            "op": case.op,
            "shape": case.shape,
            "us": time_s * 1e6,
            "gb_s": size * (2 if case.written else 1) / time_s / 1e9,
            "copy_us": copy_s * 1e6,
            "copies": time_s / copy_s,
            "copy_percent": 100 * copy_s / time_s * (2 if case.written else 1) / 2,
            "extra_percent": None if extra is None else 100 * extra / size,
            "times_faster_than": {
                name: seconds([baseline], case.prepare, self.device, self.budget)[0] / time_s
                for name, baseline in case.baselines.items()
            },
        }
        self.rows.append(row)
        ratios = ", ".join(f"{ratio:.3g}x {name}" for name, ratio in row["times_faster_than"].items())
        memory = "n/a" if extra is None else f"{row['extra_percent']:.2f} %"
        print(
            f"{case.op:<16}{case.shape:>12}{row['us']:>11.1f} us{row['gb_s']:>8.1f} GB/s"
            f"{row['copies']:>7.2f} copies   extra {memory}   {ratios}",
            flush=True,
        )


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.+)", cpu.read_text()) if cpu.exists() else []
    level = torch.backends.cpu.get_cpu_capability()
    return f"{models[0] if models else platform.machine()} ({level}), {torch.get_num_threads()} threads"


def shapes_of(text: str) -> list[tuple[int, int]]:
    """The shapes of ``--shapes``."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part) for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(f"must be ROWSxCOLS, separated by commas (got {text!r})")
    return [(int(match[1]), int(match[2])) for match in found if match]


def file_to_write(text: str) -> Path:
    """A file that is written at the end: found out before minutes of measurements whether that is possible."""
    path = Path(text)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"cannot be written (got {text!r}); give a file in a folder that exists")
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=shapes_of, help="ROWSxCOLS, separated by commas")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds for one measurement, about")
    parser.add_argument("--json", type=file_to_write, help="also write the rows to this file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_ops: --device cuda, but torch finds no CUDA device")
    name = device_name(args.device)
    note = "" if args.device == "cuda" else "  (CPU figures: not run on a GPU)"
    print(f"device: {name}; torch {torch.__version__}; {args.dtype}{note}")
    bench = Bench(args.device, getattr(torch, args.dtype), args.budget)
    shapes = args.shapes or shapes_of(DEFAULT_SHAPES[args.device])
    with torch.no_grad():
        for rows, cols in shapes:
            bench.run(prune_cases, rows, cols)
            bench.run(mean_cases, rows, cols)
            bench.run(admm_cases, rows, cols)
        for cols in sorted({cols for _, cols in shapes}):
            bench.run(moment_cases, TOKENS[args.device], cols)
    if args.json:
        with args.json.open("w") as file:
            json.dump(
                {"device": name, "torch": torch.__version__, "dtype": args.dtype, "rows": bench.rows}, file, indent=1
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
