#!/usr/bin/env python3
"""obs_block_ against SparseGPT's Python loop over columns, refine_swaps_, and factorisations one by one and as a batch.

    python benchmarks/bench_solvers.py [--device cuda|cpu] [--shapes 576x576,1536x576] [--json FILE]

For each shape (rows x columns), at 50 % and 2:4: the recursion over one block of 128 columns, median of repeats, with
the ratio to the same recursion as a loop of torch calls; then refine_swaps_ from the mask of ``|W| ||X||``, with the
swaps per row and the loss ``sum e^T G e`` after in per cent of before. Inputs are random, correlated and of different
scales; those of a real layer differ. Each repeat starts from a fresh copy; making the copy is not timed.

Then what a solver factorises of a mixture's experts (float64): the Cholesky factors of several Gram matrices of one
size and the inverses of the factors, one after the other as ace_ext does, and as one batch.

Last, ADMM's inverse of a normalised Gram matrix for a result in float32 and in bfloat16, with LAPACK's time relative to
its own.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from bench_ops import file_to_write, shapes_of
from torch import Tensor

from ace_ext import ops
from ace_ext.pruning.symmetric import inverse, invert_damped_

SHAPES = {"cpu": "576x576,1536x576,576x1536,192x4096", "cuda": "576x576,1536x576,576x1536,4096x4096"}
WIDTH = 128
PATTERNS = {"50 %": (0, 0), "2:4": (2, 4)}
BATCHES = {"cpu": ((64, 256), (16, 768)), "cuda": ((128, 768), (64, 2048), (8, 4096))}
"""How many matrices, of how many columns."""
INVERSES = (576, 896, 2048, 4864)
"""Columns of the matrices that ADMM inverts."""


def loop_over_columns(weight: Tensor, error: Tensor, mask: Tensor, factor: Tensor, keep_n: int, group_m: int) -> None:
    """SparseGPT's inner loop: the same recursion by torch calls, one column at a time."""
    diagonal = factor.diagonal()
    for c in range(weight.shape[1]):
        if group_m and c % group_m == 0:
            group = slice(c, c + group_m)
            kept = (weight[:, group] ** 2 / diagonal[group] ** 2).topk(keep_n, dim=1)[1]
            mask[:, group] = torch.zeros_like(mask[:, group]).scatter_(1, kept, True)
        quantized = torch.where(mask[:, c], weight[:, c], 0.0)
        d = (weight[:, c] - quantized) / diagonal[c]
        weight[:, c + 1 :] -= d[:, None] * factor[c, c + 1 :]
        weight[:, c] = quantized
        error[:, c] = d


def make_gram(cols: int, device: str) -> Tensor:
    x = torch.randn(2 * cols, cols, device=device) @ (torch.randn(cols, cols, device=device) / cols**0.5)
    x = (x + 0.3 * torch.randn_like(x)) * (torch.randn(cols, device=device).abs() + 0.1)
    return x.T @ x


def make_factor(gram: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, its first block."""
    hessian = gram.double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return torch.linalg.cholesky(inverse, upper=True)[:WIDTH, :WIDTH].float().contiguous()


def make_mask(weight: Tensor, gram: Tensor, keep_n: int, group_m: int) -> Tensor:
    pruned, column = weight.clone(), gram.diagonal().sqrt().contiguous()
    if group_m:
        ops.prune_nm_(pruned, "scaled", keep_n, group_m, column=column)
    else:
        ops.prune_topk_(pruned, "scaled", weight.shape[1] // 2, column=column)
    return pruned != 0


def loss(mask: Tensor, weight: Tensor, gram: Tensor) -> float:
    removed = torch.where(mask, 0.0, weight).double()
    return float(((removed @ gram.double()) * removed).sum())


def seconds(action: Callable[..., object], prepare: Callable[[], tuple], device: str, budget: float) -> float:
    """Median over as many repeats as fit into the budget, at least 3, after one to warm up."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 4 or (len(times) < 50 and time.perf_counter() - started < budget):
        arguments = prepare()
        if device == "cuda":
            torch.cuda.synchronize()
        clock = time.perf_counter()
        action(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - clock)
    return statistics.median(times[1:])


def bench(rows: int, cols: int, device: str, budget: float) -> list[dict]:
    weight, gram = torch.randn(rows, cols, device=device), make_gram(cols, device)
    factor, results = make_factor(gram), []
    block = weight[:, : factor.shape[1]]
    for name, (keep_n, group_m) in PATTERNS.items():
        mask = make_mask(weight, gram, keep_n, group_m)

        def fresh_block(mask=mask) -> tuple:
            return block.clone(), torch.empty_like(block), mask[:, : block.shape[1]].clone()

        def obs(*tensors, pattern=(keep_n, group_m)) -> None:
            ops.obs_block_(*tensors, factor, *pattern)

        def loop(*tensors, pattern=(keep_n, group_m)) -> None:
            loop_over_columns(*tensors, factor, *pattern)

        def swap(refined: Tensor, pattern=(keep_n, group_m)) -> Tensor:
            return ops.refine_swaps_(refined, weight, gram, *pattern)

        refined = mask.clone()
        swaps = swap(refined)
        obs_s = seconds(obs, fresh_block, device, budget)
        row = {
            "shape": f"{rows}x{cols}",
            "pattern": name,
            "obs_ms": obs_s * 1e3,
            "times_faster_than_loop": seconds(loop, fresh_block, device, budget) / obs_s,
            "swap_s": seconds(swap, lambda mask=mask: (mask.clone(),), device, budget),
            "swaps_per_row": float(swaps.double().mean()),
            "loss_left_percent": 100 * loss(refined, weight, gram) / loss(mask, weight, gram),
        }
        results.append(row)
        print(
            f"{row['shape']:>10} {name:>5}  obs_block_ {row['obs_ms']:8.3f} ms, {row['times_faster_than_loop']:6.1f}x "
            f"the loop   refine_swaps_ {row['swap_s']:7.3f} s, {row['swaps_per_row']:5.1f} swaps a row, "
            f"{row['loss_left_percent']:5.1f} % of the loss left",
            flush=True,
        )
    return results


def inverse_factors(grams: Tensor) -> Tensor:
    """Of ``[..., d, d]`` float64, as :mod:`ace_ext.pruning.gram` factorises one."""
    lower, _ = torch.linalg.cholesky_ex(grams)
    eye = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)


def bench_factors(count: int, cols: int, device: str, budget: float) -> dict:
    grams = torch.stack([make_gram(cols, device) for _ in range(count)]).double()
    grams.diagonal(dim1=1, dim2=2).add_(0.01 * grams.diagonal(dim1=1, dim2=2).mean(1, keepdim=True))
    alone = seconds(lambda: [inverse_factors(gram) for gram in grams], tuple, device, budget)
    batch = seconds(lambda: inverse_factors(grams), tuple, device, budget)
    same = all(torch.equal(inverse_factors(gram), one) for gram, one in zip(grams, inverse_factors(grams), strict=True))
    row = {"matrices": count, "columns": cols, "one_by_one_ms": alone * 1e3, "batch_ms": batch * 1e3, "same_bits": same}
    print(
        f"{count} matrices of {cols}: factorised one by one {alone * 1e3:.1f} ms, as a batch {batch * 1e3:.1f} ms, "
        f"{'the same bits' if same else 'other bits'}",
        flush=True,
    )
    return row


def bench_inverse(cols: int, device: str, budget: float) -> dict:
    matrix = make_gram(cols, device)
    norm = matrix.diagonal().sqrt()
    matrix /= norm * norm[:, None]
    matrix.diagonal().add_(1.1)  # ADMM's damping and penalty

    def fresh() -> tuple[Tensor]:
        return (matrix.clone(),)

    lapack = seconds(inverse, fresh, device, budget)
    row: dict = {"columns": cols, "lapack_ms": lapack * 1e3}
    for dtype in (torch.float32, torch.bfloat16):
        own = seconds(lambda made, dtype=dtype: invert_damped_(made, dtype), fresh, device, budget)
        row[str(dtype).removeprefix("torch.")] = lapack / own
    print(
        f"inverse of {cols} columns: {row['lapack_ms']:.1f} ms by LAPACK; {row['float32']:.2f} times as fast for "
        f"float32, {row['bfloat16']:.2f} for bfloat16",
        flush=True,
    )
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", type=shapes_of, help="ROWSxCOLS, separated by commas")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for one measurement, about")
    parser.add_argument("--json", type=file_to_write, help="also write the rows to this file")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench_solvers: --device cuda, but torch finds no CUDA device")
    on_cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if args.device == "cuda" else on_cpu
    note = "" if args.device == "cuda" else "  (CPU figures: not run on a GPU)"
    print(f"device: {name}; torch {torch.__version__}; float32{note}")
    torch.manual_seed(0)
    shapes = args.shapes or shapes_of(SHAPES[args.device])
    with torch.no_grad():
        rows = [row for shape in shapes for row in bench(*shape, args.device, args.budget)]
        rows += [bench_factors(*batch, args.device, args.budget) for batch in BATCHES[args.device]]
        if args.device == "cpu":  # a GPU's inverse is LAPACK's counterpart
            rows += [bench_inverse(cols, args.device, args.budget) for cols in INVERSES]
    if args.json:
        with args.json.open("w") as file:
            json.dump({"device": name, "torch": torch.__version__, "rows": rows}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
