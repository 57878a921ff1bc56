"""Decoding in vLLM: a packed folder beside the dense one, in one run, alternately.

    python tools/make_synthetic_llama.py S --layers 20 --hidden 2048 --intermediate 5632
    ace-prune run --model S --output DENSE --method magnitude --calibration S/text.txt --nsamples 2 --seqlen 32
    ace-prune pack DENSE --output PACKED
    python benchmarks/vllm_decode.py DENSE PACKED

Needs an environment with vLLM (docs/serving.md). Each model has an engine of its own with its default settings.
`--cpus auto` binds threads as `vllm serve` does: one core is left to the scheduler. Each round generates with both
models, first a single token and then many; the difference is the time of decoding. Ratios are medians over rounds: on a
busy machine both models of a round are slowed down alike. CPU time is that of the worker process, which multiplies.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAUSE = 1.5
"""Seconds after which an idle engine does not poll any more."""
PROMPT = 16


@dataclass
class Engine:
    """A model in vLLM."""

    llm: Any
    worker: Any
    """Its worker process."""

    def generate(self, batch: int, tokens: int) -> tuple[float, float]:
        """Seconds, and CPU seconds of the worker, of a batch of sequences."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [(7 * at + place) % 50 + 5 for place in range(PROMPT)]} for at in range(batch)]
        settings = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        before, start = self._cpu(), time.perf_counter()
        found = self.llm.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert all(len(one.outputs[0].token_ids) == tokens for one in found)
        return seconds, self._cpu() - before

    def _cpu(self) -> float:
        times = self.worker.cpu_times()
        return times.user + times.system

    def decode(self, batch: int, tokens: int) -> tuple[float, float]:
        """Tokens a second and CPU milliseconds a step, without the prompt and the first token."""
        time.sleep(PAUSE)
        first, many = self.generate(batch, 1), self.generate(batch, tokens + 1)
        return batch * tokens / (many[0] - first[0]), 1000 * (many[1] - first[1]) / tokens


def start(folder: str, args: argparse.Namespace) -> Engine:
    """Loads a model in an engine."""
    import psutil
    from vllm import LLM

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    llm = LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=2 * PROMPT + args.tokens,
        max_num_seqs=max(args.batches),
        enforce_eager=args.eager,
        enable_prefix_caching=False,
    )
    new = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    return Engine(llm, next(child for child in new if "Worker" in " ".join(child.cmdline())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense")
    parser.add_argument("packed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpus", default="auto", help="VLLM_CPU_OMP_THREADS_BIND: auto, or processors as in 0-1")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    args = parser.parse_args()
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = args.cpus
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    engines = [start(folder, args) for folder in (args.dense, args.packed)]
    print(f"{processor()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, bound to {args.cpus}")
    print(f"{args.tokens} tokens, medians of {args.rounds} rounds; ratios: how much better packed is (middle half)")
    print("| batch | dense tokens/s | packed | ratio | dense CPU ms a step | packed | ratio |")
    print("|---|---|---|---|---|---|---|")
    for batch in args.batches:
        for engine in engines:
            engine.decode(batch, args.tokens)  # not counted
        rounds = []
        for number in range(args.rounds):
            order = (0, 1) if number % 2 else (1, 0)
            found = {at: engines[at].decode(batch, args.tokens) for at in order}
            rounds.append((found[0], found[1]))
        dense, packed = ([statistics.median(one[at][kind] for one in rounds) for kind in (0, 1)] for at in (0, 1))
        speed = sorted(packed[0] / dense[0] for dense, packed in rounds)
        cpu = statistics.median(dense[1] / packed[1] for dense, packed in rounds)
        low, high = speed[len(speed) // 4], speed[-1 - len(speed) // 4]
        ratio = f"**{statistics.median(speed):.2f}** ({low:.2f} to {high:.2f})"
        print(
            f"| {batch} | {dense[0]:.2f} | {packed[0]:.2f} | {ratio} | {dense[1]:.1f} | {packed[1]:.1f} | {cpu:.2f} |",
            flush=True,
        )
    dense, packed = (engine.worker.memory_info().rss / 1e9 for engine in engines)
    print(f"resident memory of the workers, with their caches: dense {dense:.2f} GB, packed {packed:.2f} GB")


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
