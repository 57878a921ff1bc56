"""From a checkpoint to a pruned folder: what ``ace-prune run`` does. Bounded in memory, resumable, distributed."""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from .allocation import measure_needs
from .calibration import CalibrationData, load_windows
from .checkpoint import LoadedModel, check_output, load_model, load_tokenizer, local_folder
from .config import PruneConfig
from .driver import Surroundings, check_pattern, prune_model
from .errors import InputError
from .memory import Estimate, available_bytes, estimate
from .model_walk import Block, find_blocks
from .offload import OffloadedBlocks, skeleton
from .progress import Progress
from .ranks import Alone, Peers, Ranks, launched, share_of
from .report import REPORT_NAME, PruneReport, versions
from .shards import Shards, copy_model, flush, has_safetensors
from .stats_file import SavedStatistics, StatisticsWriter, kept_kinds
from .texts import CALIBRATION, SELF, SOURCES, load_text
from .workspace import Workspace, fingerprint_of_files, recover

OFFLOAD = ("auto", "disk", "none")


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much of it."""

    source: str = SELF
    nsamples: int = 128
    seqlen: int = 128
    seed: int = 0
    text_field: str = "text"

    def check(self) -> None:
        """Reads a file of the user's, so that a bad one shows before a model is loaded."""
        if self.source not in (SELF, *SOURCES):
            load_text(self.source, CALIBRATION, self.text_field)

    def load(self, tokenizer, model: nn.Module | None) -> CalibrationData:
        return load_windows(
            self.source, tokenizer, self.nsamples, self.seqlen, self.seed, model=model, text_field=self.text_field
        )


@dataclass(frozen=True)
class RunOptions:
    """How a run goes about it; none of this changes the result but ``save_stats`` and ``stats``."""

    overwrite: bool = False
    resume: bool = False
    """Go on where an earlier run stopped. The group ``model`` cuts once, at its end, and always starts over."""
    offload: str = "auto"
    max_memory: int | None = None
    """Bytes of resident memory that the run may take."""
    save_stats: Path | None = None
    """Keep the statistics, taken from the dense model: each block's inputs then come from dense blocks before it, and
    not from pruned ones as otherwise in order ``block``. So the file serves any sparsity, pattern and metric."""
    stats: Path | None = None
    """Prune from such a file, without a forward pass: the bytes of a run that saves it with the same configuration."""


@dataclass
class Source:
    """A model as it will be walked over: loaded, or laid out with its weights in files."""

    name: str
    model: nn.Module
    tokenizer: object
    folder: Path | None
    """Its folder on this machine, if it has one."""
    shards: Shards | None
    """Its files, where they hold the weights just as they will be written: they can be copied and patched."""
    offloaded: bool

    @property
    def files(self) -> list[Path]:
        """What the weights come from."""
        if self.folder is None:
            return [Path(self.name).expanduser()]
        if self.shards is not None:
            return self.shards.files
        return sorted(f for f in self.folder.iterdir() if f.suffix in (".safetensors", ".bin"))

    @property
    def described(self) -> dict:
        """What the model comes from, for a fingerprint."""
        config = [] if self.folder is None else [self.folder / "config.json"]
        return fingerprint_of_files([*config, *self.files])


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


def check_options(config: PruneConfig, calibration: Calibration, options: RunOptions) -> None:
    """That the options go together.

    Raises:
        InputError: naming those that do not, and what to do.
    """
    if options.offload not in OFFLOAD:
        raise InputError(f"offload must be one of {', '.join(OFFLOAD)} (got {options.offload!r})")
    if options.offload == "disk" and config.group == "model":
        raise InputError(
            "offload disk holds one block at a time, and group model compares all: use group row or matrix"
        )
    if options.offload == "disk" and calibration.source == SELF and options.stats is None:
        raise InputError(
            "calibration self needs the whole model in memory to write text; give another text with offload"
        )
    if config.tune_epochs:
        _check_tuning(options)
    if options.save_stats and options.stats:
        raise InputError("give save-stats or stats, not both")
    for name, given in (("save-stats", options.save_stats), ("stats", options.stats)):
        if given and config.order != "block":
            raise InputError(f"{name} is for statistics of dense blocks: give order block (got {config.order!r})")
    if options.save_stats and (options.save_stats.is_dir() or not options.save_stats.absolute().parent.is_dir()):
        raise InputError(f"save-stats must be a file in a folder that exists (got {str(options.save_stats)!r})")


def _check_tuning(options: RunOptions) -> None:
    reasons = {
        "stats": (options.stats is not None, "a file of statistics holds no inputs to train on"),
        "save-stats": (
            options.save_stats is not None,
            "those kept are of dense blocks, and training changes them",
        ),
        "torchrun": (launched(), "one process trains a block"),
    }
    for name, (given, why) in reasons.items():
        if given:
            raise InputError(f"tune does not go with {name}: {why}; leave out one of them")


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
        resident_hidden = fit(blocks, source, config, calibration, options, device)
        if peers.rank == 0 and not workspace.finished:
            _lay_out_output(source, workspace.model)
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


def open_source(
    model: str, config: PruneConfig, calibration: Calibration, options: RunOptions, device: torch.device, dtype: str
) -> Source:
    """Loads the model, or lays it out where its weights are to stay in their files.

    Raises:
        InputError: it cannot be loaded, or ``offload`` asks for what its files do not allow.
    """
    folder = local_folder(model)
    if folder is not None and has_safetensors(folder):
        shards = Shards(folder)
        laid_out = skeleton(folder, shards)
        stored = stored_as_loaded(laid_out, shards, dtype)
        if stored and wants_offload(laid_out, shards, config, calibration, options, device):
            return Source(model, laid_out, load_tokenizer(folder), folder, shards, True)
        if options.offload == "disk":
            raise InputError(
                f"offload disk reads blocks from safetensors of the model's own names, all of dtype {dtype}, which "
                f"{model!r} does not have; save it with save_pretrained, or pass --offload none"
            )
        loaded = load_model(str(folder), dtype, device)
        return Source(model, loaded.model, loaded.tokenizer, folder, shards if stored else None, False)
    if options.offload == "disk":
        raise InputError(
            f"offload disk needs a folder or hub model of safetensors (got {model!r}); pass --offload none"
        )
    loaded: LoadedModel = load_model(model, dtype, device)
    return Source(model, loaded.model, loaded.tokenizer, folder, None, False)


def stored_as_loaded(laid_out: nn.Module, shards: Shards, dtype: str) -> bool:
    """Whether every parameter lies in the files under its own name, in its shape and in the dtype that is asked for."""
    head = laid_out.get_output_embeddings()
    tied = {f"{n}.weight" for n, m in laid_out.named_modules() if m is head} if _is_tied(laid_out) else set()
    wanted = getattr(laid_out.config, "dtype", None) if dtype == "auto" else getattr(torch, dtype)
    wanted = wanted or next(iter(shards.entries.values())).dtype
    for name, parameter in laid_out.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        entry = shards.entries.get(name)
        if entry is None or entry.shape != tuple(parameter.shape) or entry.dtype != wanted:
            return False
    return getattr(laid_out.config, "quantization_config", None) is None


def _is_tied(model: nn.Module) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", 0)


def wants_offload(
    laid_out: nn.Module,
    shards: Shards,
    config: PruneConfig,
    calibration: Calibration,
    options: RunOptions,
    device: torch.device,
) -> bool:
    """``disk``: yes; ``none``: no; ``auto``: where all in memory would not fit the budget, or the device."""
    if options.offload != "auto":
        return options.offload == "disk"
    if config.group == "model" or (calibration.source == SELF and options.stats is None):
        return False
    blocks = find_blocks(laid_out, config.skip, check=False)
    whole = estimate(laid_out, blocks, shards, config, calibration.nsamples, calibration.seqlen, offload=False)
    return whole.total > _budget(options, device)


def _budget(options: RunOptions, device: torch.device) -> int:
    if options.max_memory is not None:
        return options.max_memory
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def fit(
    blocks: list[Block],
    source: Source,
    config: PruneConfig,
    calibration: Calibration,
    options: RunOptions,
    device: torch.device,
) -> bool:
    """Whether the hidden states may stay in memory beside all else.

    Raises:
        InputError: the budget that was given is too small for the run even without them.
    """
    if options.max_memory is None and not source.offloaded:
        return True

    def needed(resident_hidden: bool) -> Estimate:
        return estimate(
            source.model,
            blocks,
            source.shards,
            config,
            calibration.nsamples,
            calibration.seqlen,
            offload=source.offloaded,
            resident_hidden=resident_hidden,
            whole=calibration.source == SELF and options.stats is None,
            device=device,
        )

    if needed(True).total <= _budget(options, device):
        return True
    least = needed(False)
    if options.max_memory is not None and least.total > options.max_memory:
        instead = "" if source.offloaded else ", or pass --offload disk"
        raise InputError(
            f"max-memory must be at least {math.ceil(least.total / 1e6)}MB here "
            f"(got {options.max_memory / 1e6:.0f}MB): {least.describe()}; lower --batch-tokens{instead}"
        )
    return False


def _lay_out_output(source: Source, target: Path) -> None:
    """The dense model where the pruned one will be: blocks are patched in as they are done."""
    if source.shards is not None:
        copy_model(source.folder, target)
    else:
        source.model.save_pretrained(target, safe_serialization=True)
    source.tokenizer.save_pretrained(target)
    for file in target.iterdir():
        flush(file)


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
