"""Compares ``ace-prune plan`` with ``ace-prune run``: peak memory and seconds, predicted and measured.

    python benchmarks/plan_accuracy.py --model MODEL [--calibration TEXT] [--nsamples 32] [--seqlen 128]

Each plan and each run is a separate process, because peak memory is that of a process. The pruned models are removed.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--nsamples", default="32")
    parser.add_argument("--seqlen", default="128")
    parser.add_argument("--methods", default="wanda,fast,balanced,best", help="presets or metrics, at sparsity 0.5")
    parser.add_argument("--batch-tokens", default="16384,1024")
    parser.add_argument("--offload", default="none,disk", help="disk is run with --max-memory 2GB")
    args = parser.parse_args()
    common = ["--model", args.model, "--calibration", args.calibration]
    common += ["--nsamples", args.nsamples, "--seqlen", args.seqlen, "--device", "cpu", "--json"]
    print("| method | batch tokens | offload | plan GB | run GB | plan / run | plan s | run s |\n|" + "---|" * 8)
    for method, batch, offload in itertools.product(
        args.methods.split(","), args.batch_tokens.split(","), args.offload.split(",")
    ):
        options = [*common, "--method", f"collect(batch_tokens={batch}) + {method}", "--offload", offload]
        options += ["--max-memory", "2GB"] if offload == "disk" else []
        plan = _ace_prune("plan", *options)[0]
        with tempfile.TemporaryDirectory() as folder:
            run, seconds = _ace_prune("run", *options, "--output", str(Path(folder) / "out"))
        planned, measured = plan["peak_memory_bytes"], run["peak_memory_bytes"]
        took = f"{plan['seconds']['total']:.0f} | {seconds:.0f}"
        memory = f"{planned / 1e9:.3f} | {measured / 1e9:.3f} | {planned / measured:.3f}"
        print(
            f"| {method} | {batch} | {offload} | {memory} | {took} |",
            flush=True,
        )


def _ace_prune(*arguments: str) -> tuple[dict, float]:
    """The command's JSON, and the seconds that it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "ace_ext", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout), time.perf_counter() - start


if __name__ == "__main__":
    main()
