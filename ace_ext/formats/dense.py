"""The dense format: an ordinary transformers folder, in which pruned weights are stored as zeros."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.formats._format import DenseModel, OutputFormat
from ace_ext.models.blocks import Block
from ace_ext.models.checksums import rest_sha256, tensors_sha256
from ace_ext.models.safetensors_files import Shards, copy_model, copy_notices, flush
from ace_ext.records import PruneReport


class DenseWriter:
    """Copies the dense model's files, and patches each pruned block into them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: Shards | None = None

    @property
    def shards(self) -> Shards:
        """The output's files."""
        if self._shards is None:
            self._shards = Shards(self.folder)
        return self._shards

    def lay_out(self, dense: DenseModel) -> None:
        """Writes the whole dense model; pruned blocks overwrite their tensors later."""
        if dense.shards is not None and dense.folder is not None:
            copy_model(dense.folder, self.folder)
        else:
            dense.model.save_pretrained(self.folder, safe_serialization=True)
            copy_notices(dense.folder, self.folder)
        dense.tokenizer.save_pretrained(self.folder)
        for file in self.folder.rglob("*"):
            if file.is_file():
                flush(file)

    def check(self, dense: DenseModel) -> None:
        """Checks that the output's files hold every weight to prune.

        Raises:
            InputError: a weight is missing; the message names the first.
        """
        shards = self.shards.adopt(dense.model)
        for block in dense.blocks:
            for child in block.linears:
                name = f"{block.full_name(child)}.weight"
                if name not in shards:
                    raise InputError(
                        f"{name} is not in the files that save_pretrained writes for this model, nor assembled from "
                        f"their rows; leave it out with --skip, or prune with ace_ext.prune_model"
                    )

    def write(self, block: Block) -> None:
        """Overwrites the block's tensors in the files: pruned weights, and other parameters that training changed."""
        self.shards.write(_tensors(block, self.shards))

    def finish(self, report: PruneReport) -> None:
        """Nothing is left to do."""

    def written(self, block: Block) -> str:
        """A checksum of the block's tensors in the files."""
        return tensors_sha256(self.shards, _names(block, self.shards))

    def rest(self, blocks: Iterable[Block]) -> dict[str, str] | None:
        """By file name, a checksum of the file without the blocks' tensors."""
        return rest_sha256(self.shards, [name for block in blocks for name in _names(block, self.shards)])


def _names(block: Block, shards: Shards) -> list[str]:
    """The block's parameters that the files hold, by their names in the model."""
    named = (f"{block.name}.{name}" for name, _ in block.module.named_parameters())
    return [name for name in named if name in shards]


def _tensors(block: Block, shards: Shards) -> dict[str, Tensor]:
    """A block's parameters by their names and in their dtypes in the files."""
    named = {f"{block.name}.{name}": p.detach() for name, p in block.module.named_parameters()}
    return {name: named[name].to(shards.describe(name)[0]) for name in _names(block, shards)}


FORMAT = OutputFormat(
    name="dense",
    summary="safetensors as save_pretrained writes them, pruned weights stored as zeros",
    open=DenseWriter,
)
