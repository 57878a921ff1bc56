"""From a checkpoint to a pruned folder: what ``ace-prune run`` does. Bounded in memory, resumable, distributed."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from ace_ext.data.windows import CalibrationData
from ace_ext.engine.api import Surroundings, check_pattern, prune_model
from ace_ext.engine.distributed import Alone, Peers, Ranks, launched, share_of
from ace_ext.engine.progress import Progress
from ace_ext.errors import InputError
from ace_ext.models.block_store import OffloadedBlocks
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.safetensors_files import Shards, copy_model, flush
from ace_ext.models.versions import versions
from ace_ext.process_memory import return_freed_memory
from ace_ext.pruning.allocation import measure_needs
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.model_source import Demand, Source, open_source
from ace_ext.runs.options import Calibration, RunOptions, check_options
from ace_ext.runs.output import check_output
from ace_ext.runs.statistics_file import SavedStatistics, StatisticsWriter, kept_kinds
from ace_ext.runs.workspace import Workspace, recover


def prune_folder(
    model: str,
    output: str | Path,
    config: PruneConfig,
    calibration: Calibration,
    options: RunOptions,
    device: torch.device,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> tuple[PruneReport, Path]:
    """Prunes the model of a folder, ``.gguf`` file or hub name into a new folder.

    After each block its pruned tensors and the state of the walk are on the disk beside the output; with
    ``options.resume`` a run that was cut off goes on there and ends in the same bytes.

    Returns:
        The report, and the folder that was written (by the first process, where there are several).

    Raises:
        InputError: for anything wrong with the arguments, the model, the text, or the disk.
    """
    check_options(config, calibration, options)
    if options.max_memory is not None and device.type == "cpu":
        return_freed_memory()
    path = Path(output).expanduser()
    peers: Peers = Ranks(device) if launched() else Alone()
    try:
        with _disk_errors(path):
            if peers.rank == 0:
                recover(path)
            peers.wait()
            check_output(output, options.overwrite)
            if options.stats is None:
                calibration.check()
            return _prune(model, path, config, calibration, options, device, dtype, progress, peers)
    finally:
        if isinstance(peers, Ranks):
            peers.close()


def _prune(
    model: str,
    path: Path,
    config: PruneConfig,
    calibration: Calibration,
    options: RunOptions,
    device: torch.device,
    dtype: str,
    progress: Progress | None,
    peers: Peers,
) -> tuple[PruneReport, Path]:
    source = open_source(model, config, calibration, options, device, dtype)
    blocks = find_blocks(source.model, config.skip, check=not source.offloaded)
    check_pattern(blocks, config)
    names = {"files": source.described, "dtype": dtype}
    known = SavedStatistics(options.stats, names, _needs(config)) if options.stats else None
    data = None if known else calibration.load(source.tokenizer, None if source.offloaded else source.model)
    described = known.calibration if known else describe(data, calibration)
    fingerprint = {
        "versions": versions(),
        "model": names,
        "calibration": described,
        "config": config.to_dict(),
        "device": device.type,
        "processes": peers.size,
        "statistics": statistics_of(options),
    }
    resume = options.resume and config.group != "model"
    peers.wait()
    workspace = Workspace(path, fingerprint, resume, writes=peers.rank == 0, rank=peers.rank)
    try:
        peers.wait()  # the folder is there, and whatever was left over is not
        resident_hidden = Demand(blocks, source, config, calibration, options, device).hidden_fits()
        if peers.rank == 0:
            if not workspace.finished:
                _lay_out_output(source, workspace.model)
            _check_places(blocks, workspace.shards.adopt(source.model))
        keeper = None
        if options.save_stats:
            keeper = StatisticsWriter(
                options.save_stats,
                workspace.folder / "stats",
                {"model": names, "calibration": described},
                writes=peers.rank == 0,
            )
        around = Surroundings(
            device=device,
            offloaded=OffloadedBlocks(blocks, source.shards, device) if source.offloaded else None,
            resident_hidden=resident_hidden,
            progress=progress if peers.rank == 0 else None,
            journal=workspace,
            peers=peers,
            keeper=keeper,
            known=known,
        )
        tokens = torch.zeros(0, 0, dtype=torch.long) if known else share_of(data.tokens, peers)
        report = prune_model(source.model, tokens, config, surroundings=around)
        report.extra = {"model": model, "calibration": described, "statistics": statistics_of(options)}
        if keeper is not None:
            keeper.finish(kept_kinds(config))
        if peers.rank == 0:
            check_output(path, options.overwrite)  # another one may have written there meanwhile
            workspace.finish(report, REPORT_NAME)
        peers.wait()
        return report, path
    except (InputError, OSError, SafetensorError):
        if not workspace.finished:  # nothing to go on with
            workspace.remove() if peers.rank == 0 else workspace.close()
        raise
    finally:
        workspace.close()


def _needs(config: PruneConfig) -> frozenset[str]:
    """The kinds of statistics that a run reads."""
    return config.needs if config.allocation == "uniform" else config.needs | measure_needs(config)


def statistics_of(options: RunOptions) -> str:
    """Whose inputs the statistics come from, in words."""
    if options.stats:
        return "of the dense model, from a file"
    return "of the dense model, kept in a file" if options.save_stats else "of the run"


def describe(data: CalibrationData, calibration: Calibration) -> dict:
    """What a report and a fingerprint say of the calibration tokens."""
    return {
        "source": data.source,
        "nsamples": calibration.nsamples,
        "seqlen": calibration.seqlen,
        "seed": data.seed,
        "sha256": data.sha256,
    }


def _lay_out_output(source: Source, target: Path) -> None:
    """The dense model where the pruned one will be: blocks are patched in as they are done."""
    if source.shards is not None:
        copy_model(source.folder, target)
    else:
        source.model.save_pretrained(target, safe_serialization=True)
    source.tokenizer.save_pretrained(target)
    for file in target.iterdir():
        flush(file)


def _check_places(blocks: list[Block], shards: Shards) -> None:
    """That every weight to prune has a place in the output's files.

    Raises:
        InputError: naming the first that has none.
    """
    for block in blocks:
        for child in block.linears:
            name = f"{block.full_name(child)}.weight"
            if name not in shards:
                raise InputError(
                    f"{name} is not in the files that save_pretrained writes of this model, nor is it put together "
                    f"from their rows; leave it out with --skip, or prune with ace_ext.prune_model"
                )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Errors of the disk in words. What is done stays there for ``--resume``."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(_disk_message(path, error.errno, error.filename)) from error
    except SafetensorError as error:  # the writer hands the system's error on as text only
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise InputError(_disk_message(path, int(number[1]), None)) from error


def _disk_message(path: Path, number: int, name: str | bytes | None) -> str:
    mend = "make room there" if number in (errno.ENOSPC, errno.EDQUOT) else "mend that"
    at = "" if name is None or str(name) == str(path) else f" at {os.fsdecode(name)!r}"
    return f"output {str(path)!r} cannot be written: {os.strerror(number)}{at}; {mend} and go on with --resume"
