"""Decoding of a dense folder and a smaller one, pair by pair, in torch, llama.cpp (Q8_0) and vLLM.

    python benchmarks/engine_pairs.py DENSE SMALLER --engines torch llama.cpp vllm --realtime

``ace-prune bench SMALLER --dense DENSE --against llama.cpp:q8_0,vllm`` measures the same in one run. On a machine that
other programs use too its figures differ much. Here one engine is loaded at a time, and with ``--realtime`` its
processes have real-time priority while they are measured, for :data:`LONGEST` seconds at most. That needs root.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from ace_ext.bench.candidates import LLAMA, VLLM, Candidate
from ace_ext.bench.gguf_writer import write_gguf
from ace_ext.bench.worker import Worker

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, existing_folder, one_line_errors

ENGINES = ("torch", LLAMA, VLLM)
LONGEST = 52
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


def schedule(workers: list[Worker], policy: int, priority: int) -> None:
    """Gives every thread of the workers a scheduling policy."""
    for worker in workers:
        for process in worker.processes():
            for thread in Path(f"/proc/{process}/task").iterdir():
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))


def decoding(workers: list[Worker], batch: int, tokens: int, rounds: int, end: float) -> list[tuple[float, float]]:
    """Seconds of both in each round, alternating. Rounds that would start after ``end`` are left out."""
    found = []
    for number in range(rounds):
        if time.monotonic() > end:
            break
        seconds = {}
        for at in (0, 1) if number % 2 else (1, 0):
            seconds[at] = workers[at].decode([PROMPT] * batch, [[9] * tokens] * batch)
        found.append((seconds[0], seconds[1]))
    return found


def measure(engine: str, paths: list[Path], args: argparse.Namespace) -> None:
    """Prints a row for each batch size."""
    workers = [Worker(Candidate(path.name, path, engine), args.threads) for path in paths]
    try:
        for worker in workers:
            worker.load(len(PROMPT) + args.tokens + 1)
            for batch in args.batches:
                worker.decode([PROMPT] * batch, [[9] * 2] * batch)  # not counted
        end = time.monotonic() + LONGEST if args.realtime else float("inf")
        if args.realtime:
            schedule(workers, os.SCHED_RR, 1)
        for batch in args.batches:
            rounds = decoding(workers, batch, args.tokens, args.rounds, end)
            if not rounds:
                break
            dense, smaller = (batch * args.tokens / statistics.median(times) for times in zip(*rounds, strict=True))
            ratios = sorted(first / second for first, second in rounds)
            middle = f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(f"| {workers[0].engine} | {batch} | {dense:.2f} | {smaller:.2f} | {middle} |", flush=True)
    finally:
        for worker in workers:
            worker.close()


def main(argv: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs=2, type=existing_folder, metavar="folder", help="the dense and a smaller one")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--batches", type=count, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=count, default=6)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--threads", type=count, default=os.cpu_count())
    parser.add_argument("--realtime", action="store_true")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        print_table(args)


def print_table(args: argparse.Namespace) -> None:
    """Measures the engines one after the other."""
    print("| engine | batch | dense, tokens/s | smaller | ratio (all rounds) |\n|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as place:
        for engine in args.engines:
            paths = [path.resolve() for path in args.folders]
            if engine == LLAMA:
                paths = [Path(place) / f"{number}.gguf" for number in range(2)]
                for folder, file in zip(args.folders, paths, strict=True):
                    write_gguf(folder, file, "q8_0")
            measure(engine, paths, args)


if __name__ == "__main__":
    main()
