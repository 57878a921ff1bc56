"""Times half-precision products by torch and by way of float32 (ace_ext.models.products), by turns in one process.

    python benchmarks/float32_products.py [--threads 1]

CPU time of the process, which a busy machine changes least. Prints whether this CPU is taken for a slow one at each
dtype, then shapes, medians in milliseconds and the median of the ratios of pairs: more than 1: float32 is faster.
"""

import argparse
import statistics
import time

import torch
from torch.nn.functional import linear

from ace_ext.models.products import MIN_TOKENS, _Linear, slow_dtypes

SHAPES = ((1536, 576), (5632, 2048))
TOKENS = (MIN_TOKENS, 32, 128, 1024)
ROUNDS = 7


def seconds(product, *arguments) -> float:
    start = time.process_time()
    product(*arguments)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    torch.manual_seed(0)
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads; torch, float32 in ms, ratio")
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        print(f"{name}: {'slow' if dtype in slow_dtypes() else 'fast'} on this CPU")
        for rows, cols in SHAPES:
            weight = torch.randn(rows, cols).to(dtype)
            for tokens in TOKENS:
                x = torch.randn(tokens, cols).to(dtype)
                pairs = [
                    (seconds(linear, x, weight), seconds(_Linear.apply, x, weight, None)) for _ in range(ROUNDS + 1)
                ][1:]
                own, wide = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
                ratio = statistics.median(one / other for one, other in pairs)
                print(f"  {rows} x {cols}, {tokens:>4} tokens: {own:.2f}, {wide:.2f}, {ratio:.2f} x", flush=True)


if __name__ == "__main__":
    main()
