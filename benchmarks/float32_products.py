"""Times half-precision products by torch and by way of float32 (ace_ext.models.products), by turns in one process, and
the same of attention's backward pass (ace_ext.models.attention).

    python benchmarks/float32_products.py [--threads 1]

CPU time of the process, which a busy machine changes least. Prints whether this CPU is taken for a slow one at each
dtype, then shapes, medians in milliseconds and the median of the ratios of pairs: more than 1: float32 is faster.
"""

import argparse
import statistics
import time

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from ace_ext.models.attention import attention
from ace_ext.models.products import MIN_TOKENS, _Linear, slow_dtypes

SHAPES = ((1536, 576), (5632, 2048))
TOKENS = (MIN_TOKENS, 32, 128, 1024)
HEADS = ((8, 9, 128, 64), (8, 4, 128, 256))
"""Windows, heads, tokens and width of a head: a step of distillation of SmolLM2-135M and of gemma-3-270m."""
ROUNDS = 7


def seconds(product, *arguments) -> float:
    start = time.process_time()
    product(*arguments)
    return time.process_time() - start


def pair_line(name: str, pairs: list[tuple[float, float]]) -> str:
    """Medians of torch's time and of float32's in milliseconds, and of their ratios, without the first pair."""
    own, wide = (1e3 * statistics.median(times) for times in zip(*pairs[1:], strict=True))
    ratio = statistics.median(one / other for one, other in pairs[1:])
    return f"  {name}: {own:.2f}, {wide:.2f}, {ratio:.2f} x"


def backward_seconds(attend, shape: tuple[int, ...], dtype: torch.dtype) -> float:
    given = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(3)]
    output = attend(dict(zip(("query", "key", "value"), given, strict=True)) | {"is_causal": True})
    return seconds(torch.autograd.grad, output, given, torch.randn(shape).to(dtype))


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
                ]
                print(pair_line(f"{rows} x {cols}, {tokens:>4} tokens", pairs), flush=True)
        for shape in HEADS:
            pairs = [
                (
                    backward_seconds(lambda given: scaled_dot_product_attention(**given), shape, dtype),
                    backward_seconds(attention, shape, dtype),
                )
                for _ in range(ROUNDS + 1)
            ]
            print(pair_line(f"attention's backward pass, {' x '.join(map(str, shape))}", pairs), flush=True)


if __name__ == "__main__":
    main()
