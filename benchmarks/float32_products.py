"""Times half-precision products by torch and by way of float32 (ace_ext.models.products), alternating in one process,
and the same of the projection of a weight for statistics and of attention's backward pass (ace_ext.models.attention).

    python benchmarks/float32_products.py [--threads 1]

CPU time of the process, which a busy machine changes least. Prints whether this CPU is taken for a slow one at each
dtype, then shapes, medians in milliseconds and the median of the ratios of pairs: more than 1: float32 is faster.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ace_ext.models.attention import attention
from ace_ext.models.products import MIN_TOKENS, _Linear, float32_matmul, slow_dtypes
from ace_ext.pruning.statistics import SKETCH_ROWS

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count

SHAPES = ((1536, 576), (5632, 2048))
TOKENS = (MIN_TOKENS, 32, 128, 1024)
HEADS = ((8, 9, 128, 64), (8, 4, 128, 256))
"""Windows, heads, tokens and width of a head: a step of distillation of SmolLM2-135M and of gemma-3-270m."""
ROUNDS = 7


def seconds(product, *arguments) -> float:
    start = time.process_time()
    product(*arguments)
    return time.process_time() - start


def print_pairs(name: str, own: Callable[[], float], wide: Callable[[], float]) -> None:
    """Medians of torch's time and of float32's in milliseconds, and of their ratios, without the first pair."""
    pairs = [(own(), wide()) for _ in range(ROUNDS + 1)][1:]
    medians = [1e3 * statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = statistics.median(one / other for one, other in pairs)
    print(f"  {name}: {medians[0]:.2f}, {medians[1]:.2f}, {ratio:.2f} x", flush=True)


def backward_seconds(attend, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    given = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    output = attend(dict(zip(("query", "key", "value"), given, strict=True)) | {"is_causal": True})
    return seconds(torch.autograd.grad, output, given, torch.randn(shape).to(dtype))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=count, default=1)
    torch.set_num_threads(parser.parse_args(argv).threads)
    torch.manual_seed(0)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; torch, float32 in ms, ratio")
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: {'slow' if dtype in slow_dtypes() else 'fast'} on this CPU")
        for rows, cols in SHAPES:
            weight = torch.randn(rows, cols).to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, cols).to(dtype)
                print_pairs(
                    f"{rows} x {cols}, {tokens:>4} tokens",
                    partial(seconds, linear, x, weight),
                    partial(seconds, _Linear.apply, x, weight, None),
                )
            signs = torch.randn(SKETCH_ROWS, rows).sign().to(dtype)
            print_pairs(
                f"{rows} x {cols}, projection",
                partial(seconds, torch.matmul, signs, weight),
                partial(seconds, float32_matmul, signs, weight),
            )
        for shape in HEADS:
            print_pairs(
                f"attention's backward pass, {' x '.join(map(str, shape))}",
                partial(backward_seconds, lambda given: scaled_dot_product_attention(**given), shape, dtype),
                partial(backward_seconds, attention, shape, dtype),
            )


if __name__ == "__main__":
    main()
