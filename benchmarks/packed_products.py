"""Times products with packed matrices against torch's dense ones, by turns in one process.

    python benchmarks/packed_products.py [--zeros 0.5 | --zeros 2:4] [--threads 1] [--dtype bfloat16]

Shapes of a Llama with a billion weights; three matrices of each shape take turns, so that they come from
memory. CPU time of the process, which a busy machine changes least. Prints processor, shapes, medians in milliseconds
and the median of the ratios of pairs: more than 1: packed is better.
"""

import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn.functional import linear

from ace_ext import ops
from ace_ext.packed.matrix import PackedMatrix

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
TOKENS = (1, 2, 4, 8, 16, 64, 128, 256)
Pair = tuple[Tensor, PackedMatrix]


def make(rows: int, cols: int, zeros: str, dtype: torch.dtype) -> Pair:
    """A random matrix with this share of zeros in every row, or with an N:M pattern."""
    weight = torch.randn(rows, cols).to(dtype)
    keep_n, _, group_m = zeros.partition(":")
    groups = weight.view(rows, -1, int(group_m) if group_m else cols)
    kept = int(keep_n) if group_m else round(cols * (1 - float(zeros)))
    groups.scatter_(2, torch.rand(groups.shape).argsort(dim=2)[:, :, kept:], 0.0)
    return weight, PackedMatrix.of(weight)


def seconds(x: Tensor, pair: Pair, packed: bool) -> float:
    """CPU time of one product."""
    weight, matrix = pair
    start = time.process_time()
    if packed:
        ops.packed_linear(x, matrix.bitmap, matrix.values, matrix.row_start)
    else:
        linear(x, weight)
    return time.process_time() - start


def compare(pairs: list[Pair], tokens: int, rounds: int) -> tuple[float, float, float]:
    """Median times of dense and packed, and the median ratio of pairs."""
    x = torch.randn(tokens, pairs[0][1].cols).to(pairs[0][0].dtype)
    dense, packed = [], []
    for number in range(rounds + 1):
        for pair in pairs:
            found = {which: seconds(x, pair, which) for which in ((False, True) if number % 2 else (True, False))}
            if number:  # the first round is not counted
                dense.append(found[False])
                packed.append(found[True])
    ratio = statistics.median(d / p for d, p in zip(dense, packed, strict=True))
    return statistics.median(dense), statistics.median(packed), ratio


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="times products with packed matrices against torch's dense ones")
    parser.add_argument("--zeros", default="0.5", help="share of zeros, or N:M (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    processor = torch.backends.cpu.get_cpu_capability()
    print(f"{processor}, {args.threads} threads, {args.dtype}, zeros {args.zeros}; dense and packed in ms, ratio")
    for rows, cols in SHAPES:
        pairs = [make(rows, cols, args.zeros, getattr(torch, args.dtype)) for _ in range(3)]
        for tokens in TOKENS:
            dense, packed, ratio = compare(pairs, tokens, max(3, min(15, 400 // tokens)))
            print(f"{rows} x {cols}, {tokens:>3} tokens: {dense * 1e3:.3f}, {packed * 1e3:.3f}, {ratio:.2f} x")


if __name__ == "__main__":
    main()
