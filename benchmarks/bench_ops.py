#!/usr/bin/env python3
"""The ops against a copy of the same bytes and against the torch calls that other pruners use.

    python benchmarks/bench_ops.py [--device cuda|cpu] [--shapes 4096x4096,4096x11008] [--dtype bfloat16] [--json FILE]

Prints one row an op and shape: microseconds (median of repeats), GB/s (the weight or the activations read once and,
where they are written, written once), the share of a copy's bandwidth measured in the same run, the ratio to each
baseline, and peak extra memory in per cent of the weight. Baselines: Wanda's sequence of torch calls (abs, sqrt, stable
sort of every row, scatter, index assignment), ``torch.topk`` with a scatter, and a Python loop over N:M groups of
columns. Each repeat prunes a fresh copy of the weight; the copy is not timed. A weight that fits the last cache
(4096x4096 on an H100) is read from there, and so is the copy that it is compared with.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ace_ext import ops

DEFAULT_SHAPES = {"cuda": "4096x4096,4096x11008,11008x4096,8192x28672", "cpu": "1024x1024,1024x2752"}
TOKENS = {"cuda": 16384, "cpu": 2048}


# Baselines


def wanda_rows(weight: Tensor, square_sum: Tensor, pruned: int) -> None:
    """Wanda's unstructured pruning, call for call."""
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


def two_pass_moments(x: Tensor) -> None:
    torch.var_mean(x.float(), dim=0, correction=0)


# Measuring


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], None], prepare: Callable[[], None], device: str, budget: float) -> float:
    """Median over repeats, as many as the budget allows (at least 3, at most 50); one call to warm up."""
    times: list[float] = []
    started = time.perf_counter()
    for repeat in range(51):
        prepare()
        synchronize(device)
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            end.synchronize()
            elapsed = begin.elapsed_time(end) / 1e3
        else:
            clock = time.perf_counter()
            action()
            elapsed = time.perf_counter() - clock
        if repeat:
            times.append(elapsed)
        if len(times) >= 3 and time.perf_counter() - started > budget:
            break
    return statistics.median(times)


def extra_bytes(action: Callable[[], None], prepare: Callable[[], None], device: str) -> int | None:
    """What the action allocates at its peak; only CUDA's allocator counts."""
    if device != "cuda":
        return None
    prepare()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Bench:
    def __init__(self, device: str, dtype: torch.dtype, budget: float):
        self.device, self.dtype, self.budget = device, dtype, budget
        self.rows: list[dict] = []

    def copy_bandwidth(self, size: int) -> float:
        """Bytes read and written a second by ``copy_`` of as many bytes as the op's tensor has."""
        source = torch.empty(size, dtype=torch.uint8, device=self.device).fill_(1)
        target = torch.empty_like(source)
        return 2 * size / seconds(lambda: target.copy_(source), lambda: None, self.device, self.budget)

    def report(self, op: str, shape: str, action, prepare, moved: int, size: int, baselines: dict) -> None:
        """``moved``: bytes that must be read or written; ``size``: the bytes that extra memory is a share of."""
        time_s = seconds(action, prepare, self.device, self.budget)
        copy = self.copy_bandwidth(size)
        extra = extra_bytes(action, prepare, self.device)
        row = {
            "op": op,
            "shape": shape,
            "us": time_s * 1e6,
            "gb_s": moved / time_s / 1e9,
            "copy_gb_s": copy / 1e9,
            "share_of_copy": moved / time_s / copy,
            "extra_percent": None if extra is None else 100 * extra / size,
            "times_faster_than": {
                name: seconds(baseline, prepare, self.device, self.budget) / time_s
                for name, baseline in baselines.items()
            },
        }
        self.rows.append(row)
        ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["times_faster_than"].items())
        memory = "n/a" if extra is None else f"{row['extra_percent']:.3f} %"
        print(
            f"{op:<16}{shape:>12}{row['us']:>12.1f} us{row['gb_s']:>9.1f} GB/s"
            f"{100 * row['share_of_copy']:>7.1f} % of copy   extra {memory}   {ratios}",
            flush=True,
        )

    def prune(self, rows: int, cols: int) -> None:
        source = torch.randn(rows, cols, device=self.device).to(self.dtype)
        square_sum = torch.rand(cols, device=self.device) + 0.1
        column = square_sum.sqrt()
        weight = torch.empty_like(source)
        size, shape = source.numel() * source.element_size(), f"{rows}x{cols}"

        def fresh() -> None:
            weight.copy_(source)

        half = cols // 2
        self.report(
            "top-k by row",
            shape,
            lambda: ops.prune_topk_(weight, "wanda", half, column=column),
            fresh,
            2 * size,
            size,
            {
                "Wanda": lambda: wanda_rows(weight, square_sum, cols - half),
                "torch.topk": lambda: topk_rows(weight, column, half),
            },
        )
        self.report(
            "top-k by matrix",
            shape,
            lambda: ops.prune_topk_(weight, "wanda", rows * half, column=column, group="matrix"),
            fresh,
            2 * size,
            size,
            {"torch.topk": lambda: topk_matrix(weight, column, rows * half)},
        )
        for keep_n, group_m in ((2, 4), (4, 8)):
            self.report(
                f"{keep_n}:{group_m}",
                shape,
                lambda n=keep_n, m=group_m: ops.prune_nm_(weight, "wanda", n, m, column=column),
                fresh,
                2 * size,
                size,
                {"Python loop": lambda n=keep_n, m=group_m: wanda_nm(weight, square_sum, m - n, m)},
            )

    def moments(self, cols: int) -> None:
        tokens = TOKENS[self.device]
        x = torch.randn(tokens, cols, device=self.device).to(self.dtype)
        state = [torch.zeros(size, device=self.device) for size in ((), (cols,), (cols,))]
        size, shape = x.numel() * x.element_size(), f"{tokens}x{cols}"
        self.report(
            "moments",
            shape,
            lambda: ops.update_moments_(*state, x),
            lambda: None,
            size,
            size,
            {"var_mean": lambda: two_pass_moments(x)},
        )
        self.report("1/|a|^2", shape, lambda: ops.inverse_square_norm(x), lambda: None, size, size, {})


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="ROWSxCOLS, separated by commas")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds that one measurement may take, about")
    parser.add_argument("--json", help="also write the rows there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_ops: --device cuda, but torch finds no CUDA device")
    name = (
        torch.cuda.get_device_name()
        if args.device == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    note = "" if args.device == "cuda" else "  (CPU figures: not run on a GPU)"
    print(f"device: {name}; torch {torch.__version__}; {args.dtype}{note}")
    bench = Bench(args.device, getattr(torch, args.dtype), args.budget)
    shapes = [tuple(map(int, shape.split("x"))) for shape in (args.shapes or DEFAULT_SHAPES[args.device]).split(",")]
    with torch.no_grad():
        for rows, cols in shapes:
            bench.prune(rows, cols)
        for cols in sorted({cols for _, cols in shapes}):
            bench.moments(cols)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(
                {"device": name, "torch": torch.__version__, "dtype": args.dtype, "rows": bench.rows}, file, indent=1
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
