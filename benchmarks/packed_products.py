"""Times products with packed matrices, with survivors of 8 and 4 bits too, against torch's dense ones, alternating in
one process.

    python benchmarks/packed_products.py [--zeros 0.5 | --zeros 2:4] [--threads 1] [--dtype bfloat16]
        [--only packed int8 int4] [--tokens 1 4 16]

Shapes of a Llama with a billion weights; three matrices of each shape take turns, so that they come from
memory. CPU time of the process, divided by the threads, which a busy machine changes least. Prints processor, shapes,
medians in milliseconds, and the medians of the ratios of products made one after the other: how many times faster than
dense the packed product is, than packed the one with 8 bits, and than that the one with 4. Scales are shared by 128
columns.
"""

import argparse
import re
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from ace_ext import ops
from ace_ext.packed.matrix import PackedMatrix

SHAPES = ((2048, 2048), (5632, 2048), (2048, 5632))
TOKENS = (1, 2, 4, 8, 16, 64, 128, 256)
KINDS = ("dense", "packed", "int8", "int4")
GROUP = 128
Products = dict[str, Callable[[Tensor], Tensor]]


def make(rows: int, cols: int, zeros: str, dtype: torch.dtype) -> Products:
    """Products with a random matrix with this share of zeros in every row, or with an N:M pattern."""
    weight = torch.randn(rows, cols).to(dtype)
    keep_n, _, group_m = zeros.partition(":")
    groups = weight.view(rows, -1, int(group_m) if group_m else cols)
    kept = int(keep_n) if group_m else round(cols * (1 - float(zeros)))
    groups.scatter_(2, torch.rand(groups.shape).argsort(dim=2)[:, :, kept:], 0.0)
    matrix = PackedMatrix.of(weight)
    codes = torch.randint(256, (rows, matrix.values.numel() // rows), dtype=torch.uint8)
    half = codes[:, ::2].contiguous()
    scales = torch.rand(rows, -(-cols // GROUP)).to(dtype)
    return {
        "dense": lambda x: linear(x, weight),
        "packed": lambda x: ops.packed_linear(x, matrix.bitmap, matrix.values, matrix.row_start),
        "int8": lambda x: ops.quantized_linear(x, matrix.bitmap, codes, scales, 8, GROUP),
        "int4": lambda x: ops.quantized_linear(x, matrix.bitmap, half, scales, 4, GROUP),
    }


def seconds(x: Tensor, product: Callable[[Tensor], Tensor]) -> float:
    """CPU time of one product."""
    start = time.process_time()
    product(x)
    return (time.process_time() - start) / torch.get_num_threads()


def compare(matrices: list[Products], x: Tensor, kinds: list[str], rounds: int) -> dict[str, list[float]]:
    """Times of each kind; those at one place of the lists were measured together."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(rounds + 1):
        for products in matrices:
            for kind in kinds if number % 2 else reversed(kinds):
                spent = seconds(x, products[kind])
                if number:  # the first round is not counted
                    times[kind].append(spent)
    return times


def zeros_of(text: str) -> str:
    """``--zeros`` as it was given, if :func:`make` can make them."""
    pattern = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
    if pattern is not None:
        keep_n, group_m = int(pattern[1]), int(pattern[2])
        if keep_n <= group_m and all(cols % group_m == 0 for _, cols in SHAPES):
            return text
    elif re.fullmatch(r"0?\.\d+|0", text):
        return text
    raise argparse.ArgumentTypeError(f"must be a share of at least 0 and less than 1, or N:M (got {text!r})")


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="times products with packed matrices against torch's dense ones")
    parser.add_argument("--zeros", type=zeros_of, default="0.5", help="share of zeros, or N:M (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS), help="what to time (default: all)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    args = parser.parse_args(argv)
    if min(args.threads, *args.tokens) < 1:
        parser.error("--threads and --tokens must be at least 1")
    kinds = [kind for kind in KINDS if kind in args.only]
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    processor = torch.backends.cpu.get_cpu_capability()
    print(f"{processor}, {args.threads} threads, {args.dtype}, zeros {args.zeros}; ms, and times faster than before it")
    for rows, cols in SHAPES:
        matrices = [make(rows, cols, args.zeros, getattr(torch, args.dtype)) for _ in range(3)]
        for tokens in args.tokens:
            x = torch.randn(tokens, cols).to(getattr(torch, args.dtype))
            times = compare(matrices, x, kinds, max(3, min(15, 400 // tokens)))
            shown = []
            for before, kind in zip([None, *kinds], kinds, strict=False):
                ratio = before and statistics.median(b / k for b, k in zip(times[before], times[kind], strict=True))
                shown.append(
                    f"{kind} {statistics.median(times[kind]) * 1e3:.3f}" + (f" ({ratio:.2f} x)" if ratio else "")
                )
            print(f"{rows} x {cols}, {tokens:>3} tokens: " + ", ".join(shown))


if __name__ == "__main__":
    main()
