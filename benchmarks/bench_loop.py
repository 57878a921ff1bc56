#!/usr/bin/env python3
"""What lockstep and the overlap of disk and compute save, in one process, on one model; the ways take turns.

    python benchmarks/bench_loop.py --model FOLDER [--nsamples 16 --seqlen 128 --batch-tokens 256] [--repeats 3]

FOLDER holds safetensors. First several batches are pruned in memory, in lockstep and in steps: seconds, the ratio, and
the ratio to one plain forward pass of the same batches. Then ``run --offload disk`` with and without reading the next
block and writing the last one meanwhile: seconds, the ratio, and the seconds of reading and writing alone. All outputs
of one kind must have the same bytes.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from ace_ext import PruneConfig, prune_model
from ace_ext.compare.bench import restore
from ace_ext.data.windows import load_windows
from ace_ext.engine.context import RunContext
from ace_ext.engine.devices import pick_device
from ace_ext.models.block_store import OffloadedBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.models.replay import capture_calls, run_block
from ace_ext.models.safetensors_files import Shards, flush
from ace_ext.models.skeleton import skeleton
from ace_ext.runs.model_source import Demand, MemoryChoice
from ace_ext.runs.options import Calibration, RunOptions
from ace_ext.runs.pipeline import prune_folder

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from program import count, existing_folder, one_line_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=existing_folder, required=True)
    parser.add_argument("--calibration", default="wiki-mini")
    parser.add_argument("--nsamples", type=count, default=16)
    parser.add_argument("--seqlen", type=count, default=128)
    parser.add_argument("--batch-tokens", type=count, default=256)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    with one_line_errors(parser):
        device = pick_device(args.device)
        config = PruneConfig(f"collect(batch_tokens={args.batch_tokens}) + wanda")
        print(f"{args.model} on {device}, {torch.get_num_threads()} threads, {args.nsamples} x {args.seqlen} tokens")
        several_batches(args, config, device)
        from_the_disk(args, config, device)


def several_batches(args: argparse.Namespace, config: PruneConfig, device: torch.device) -> None:
    loaded = load_model(args.model, "auto", device)
    tokens = load_windows(args.calibration, loaded.tokenizer, args.nsamples, args.seqlen, 0, bos="never").tokens
    dense = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}

    def prune(keeps_forwards: bool) -> str:
        restore(loaded.model, dense)
        prune_model(loaded.model, tokens, config, context=RunContext(device=device, keeps_forwards=keeps_forwards))
        return hash_of(loaded.model)

    ways = {
        "one plain forward": lambda: forward(loaded.model, tokens, config, device),
        "lockstep": lambda: prune(True),
        "in steps": lambda: prune(False),
    }
    compare(ways, args.repeats)


def from_the_disk(args: argparse.Namespace, config: PruneConfig, device: torch.device) -> None:
    calibration = Calibration(args.calibration, args.nsamples, args.seqlen, bos="never")

    def run(overlap: bool) -> str:
        choice = MemoryChoice(overlap=overlap, forwards=True)
        with tempfile.TemporaryDirectory() as folder, patch.object(Demand, "decide", lambda _: choice):
            options = RunOptions(offload="disk")
            _, output = prune_folder(str(args.model), Path(folder) / "out", config, calibration, options, device)
            digest = hashlib.sha256()
            for file in sorted(output.glob("*.safetensors")):
                digest.update(file.read_bytes())
            return digest.hexdigest()

    ways = {
        "reading and writing the blocks": lambda: read_and_write(args.model, device),
        "overlapped": lambda: run(True),
        "one after the other": lambda: run(False),
    }
    compare(ways, args.repeats)


def compare(ways: dict, repeats: int) -> None:
    """Prints each way's least seconds, and the ratio to the last one's. The ways after the first return a hash, which
    must be the same."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    hashes = set()
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            found = way()
            seconds[name].append(time.perf_counter() - start)
            if name != next(iter(ways)):
                hashes.add(found)
    assert len(hashes) == 1, "the outputs differ"
    least = {name: min(found) for name, found in seconds.items()}
    whole = least[list(ways)[-1]]
    for name, found in least.items():
        print(f"{name:32} {found:8.2f} s   {found / whole:.2f} of {list(ways)[-1]}")


@torch.no_grad()
def forward(model: nn.Module, tokens: torch.Tensor, config: PruneConfig, device: torch.device) -> None:
    """All batches through all blocks."""
    blocks = find_blocks(model)
    batches = torch.split(tokens.to(device), config.batch_samples(tokens.shape[1]))
    calls = list(capture_calls(model, blocks, [{"input_ids": batch} for batch in batches]))  # blocks compute again
    for call in calls:
        hidden = call.hidden
        for index, block in enumerate(blocks):
            hidden = run_block(block, hidden, call.others[index])


def read_and_write(model: Path, device: torch.device) -> None:
    """Reads every block, and writes as many bytes to a file."""
    shards = Shards(model)
    blocks = find_blocks(skeleton(model, shards, "auto"), check=False)
    store = OffloadedBlocks(blocks, shards, device)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(len(blocks)):
            with store.loaded(index) as block:
                path = Path(folder) / f"{index}.bin"
                with path.open("wb") as file:
                    for parameter in block.module.parameters():
                        file.write(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
                flush(path)


def hash_of(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for _, parameter in model.named_parameters():
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


if __name__ == "__main__":
    main()
