"""The model of a run: loaded whole, or laid out with its weights left in their files; and what of it fits in memory."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ace_ext.data.corpora import SELF
from ace_ext.errors import InputError
from ace_ext.fingerprint import fingerprint_of_files
from ace_ext.models.blocks import Block, find_blocks
from ace_ext.models.loading import LoadedModel, load_model, load_tokenizer, local_folder
from ace_ext.models.safetensors_files import Shards, has_safetensors
from ace_ext.models.skeleton import dtype_of, skeleton
from ace_ext.process_memory import available_bytes
from ace_ext.pruning.config import PruneConfig
from ace_ext.runs.memory_model import Estimate, estimate
from ace_ext.runs.options import Calibration, RunOptions


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
        laid_out = skeleton(folder, shards, dtype)
        stored = stored_as_loaded(laid_out, shards, dtype)
        if stored and wants_offload(laid_out, shards, config, calibration, options, device):
            return Source(model, laid_out, load_tokenizer(folder), folder, shards, True)
        if options.offload == "disk":
            raise files_do_not_serve(model, dtype)
        loaded = load_model(str(folder), dtype, device)
        return Source(model, loaded.model, loaded.tokenizer, folder, shards if stored else None, False)
    if options.offload == "disk":
        raise no_safetensors(model)
    loaded: LoadedModel = load_model(model, dtype, device)
    return Source(model, loaded.model, loaded.tokenizer, folder, None, False)


def no_safetensors(model: str) -> InputError:
    """What to raise where ``offload`` is ``disk`` and the model is no folder of safetensors."""
    return InputError(f"offload disk needs a folder or hub model of safetensors (got {model!r}); pass --offload none")


def files_do_not_serve(model: str, dtype: str) -> InputError:
    """What to raise where ``offload`` is ``disk`` and :func:`stored_as_loaded` says no."""
    return InputError(
        f"offload disk reads blocks from safetensors that hold every parameter as it is, all of dtype {dtype}, "
        f"which {model!r} does not have; save it with save_pretrained, or pass --offload none"
    )


def stored_as_loaded(laid_out: nn.Module, shards: Shards, dtype: str) -> bool:
    """Whether the files hold every parameter row by row, in its shape and in the dtype that is asked for."""
    head = laid_out.get_output_embeddings()
    tied = {f"{n}.weight" for n, m in laid_out.named_modules() if m is head} if _is_tied(laid_out) else set()
    wanted = dtype_of(laid_out.config, shards, dtype)
    for name, parameter in laid_out.named_parameters(remove_duplicate=False):
        if name in tied:
            continue
        if name not in shards:
            return False
        found, shape = shards.describe(name)
        if found not in (parameter.dtype, wanted) or shape != tuple(parameter.shape):  # some are float32 once loaded
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


@dataclass(frozen=True)
class Demand:
    """What a run asks of memory."""

    blocks: list[Block]
    source: Source
    config: PruneConfig
    calibration: Calibration
    options: RunOptions
    device: torch.device

    def peak(self, resident_hidden: bool, process: int | None = None) -> Estimate:
        """:func:`ace_ext.runs.memory_model.estimate` of the run; ``process`` as there."""
        return estimate(
            self.source.model,
            self.blocks,
            self.source.shards,
            self.config,
            self.calibration.nsamples,
            self.calibration.seqlen,
            offload=self.source.offloaded,
            resident_hidden=resident_hidden,
            whole=self.calibration.source == SELF and self.options.stats is None,
            process=process,
            device=self.device,
        )

    def hidden_fits(self) -> bool:
        """Whether the hidden states may stay in memory beside all else.

        Raises:
            InputError: the budget that was given is too small for the run even without them.
        """
        budget = self.options.max_memory
        if budget is None and not self.source.offloaded:
            return True
        if self.peak(resident_hidden=True).total <= _budget(self.options, self.device):
            return True
        least = self.peak(resident_hidden=False)
        if budget is not None and least.total > budget:
            instead = "" if self.source.offloaded else ", or pass --offload disk"
            raise InputError(
                f"max-memory must be at least {math.ceil(least.total / 1e6)}MB here "
                f"(got {budget / 1e6:.0f}MB): {least.describe()}; lower --batch-tokens{instead}"
            )
        return False
