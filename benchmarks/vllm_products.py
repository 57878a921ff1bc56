"""Products of packed matrices beside those of vLLM's dense layers: oneDNN with weights that it has laid out for itself.

    python benchmarks/vllm_products.py [--zeros 0.5] [--tokens 1 4 8]

Needs an environment with vLLM for CPUs (docs/serving.md). Shapes of a Llama with a billion weights, q, k and v and gate
and up merged as in vLLM, bfloat16, one thread. Three matrices of each shape take turns, so that they come from memory.
Times are CPU time, so a busy machine changes little: medians over rounds, in which the kinds alternate.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from vllm import _custom_ops as vllm_ops
from vllm_decode import processor

from ace_ext.packed.matrix import PackedMatrix
from ace_ext.serving.product import product_of

SHAPES = {"qkv": (6144, 2048), "o": (2048, 2048), "gate_up": (11264, 2048), "down": (2048, 5632)}


def kinds(weight: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The product with a weight in each form."""
    laid_out = vllm_ops.create_onednn_mm(weight.t(), 32)
    return {
        "packed": product_of(PackedMatrix.of(weight)),
        "vLLM": lambda x: vllm_ops.onednn_mm(laid_out, x, None),
        "torch": lambda x: functional.linear(x, weight),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--zeros", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    print(f"{processor()}, one thread, {args.zeros:.0%} zeros; CPU milliseconds of a product")
    print("| matrix | tokens | packed | vLLM | torch | vLLM / packed | torch / packed |\n|---|---|---|---|---|---|---|")
    for name, (rows, cols) in SHAPES.items():
        matrices = []
        for _ in range(3):
            weight = torch.randn(rows, cols, generator=random)
            zeros = torch.rand(rows, cols, generator=random).argsort(1)[:, : round(cols * args.zeros)]
            matrices.append(kinds(weight.scatter_(1, zeros, 0.0).bfloat16()))
        for tokens in args.tokens:
            x = torch.randn(tokens, cols, generator=random).bfloat16()
            found: dict[str, list[float]] = {kind: [] for kind in matrices[0]}
            for _ in range(args.rounds):
                for kind, times in found.items():
                    start = time.thread_time()
                    for matrix in matrices:
                        matrix[kind](x)
                    times.append((time.thread_time() - start) / len(matrices) * 1000)
            packed, dense, plain = (statistics.median(times) for times in found.values())
            figures = f"{packed:.2f} | {dense:.2f} | {plain:.2f} | **{dense / packed:.2f}** | {plain / packed:.2f}"
            print(f"| {name} {rows} × {cols} | {tokens} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
