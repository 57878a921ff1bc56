"""The form of the library compressed-tensors, for quantized models: transformers and vLLM load it without this program.

``ace_ext/packed/compressed_tensors.py`` writes it.
"""

from pathlib import Path

from torch import nn

from ace_ext.errors import InputError
from ace_ext.formats._converting import ConvertingWriter
from ace_ext.formats._format import DenseModel, OutputFormat, grid_of
from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.packed.compressed_tensors import (
    NAME,
    SUMMARY,
    CompressedShards,
    check_linears,
    common_group,
    compress_into,
    is_compressed,
    size,
)
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import PruneReport


class CompressedWriter(ConvertingWriter):
    """Writes dense blocks and stores their matrices as codes at the end."""

    @property
    def converted(self) -> bool:
        """Whether the folder has this form."""
        return is_compressed(self.folder)

    def check(self, dense: DenseModel) -> None:
        """As for the dense format; also that each matrix to prune is a Linear.

        Raises:
            InputError: one is not, or a weight is missing.
        """
        super().check(dense)
        if not self.converted:
            check_linears(dense.model, _names(dense.blocks), self.shards)

    def check_converted(self) -> None:
        """Checks that each matrix can be read."""
        stored = CompressedShards(self.folder)
        for name in stored.coded:
            stored.read(name)

    def convert(self, target: Path, report: PruneReport) -> None:
        """Writes the codes, and checks that they give the same weights."""
        grid = grid_of(report)
        assert grid is not None  # checked before the run
        compress_into(self.folder, target, grid, [matrix.name for matrix in report.matrices])


def _check(config: PruneConfig) -> None:
    if config.method.quantize is None:
        raise InputError(f"format {NAME} is for quantized models; add the stage quantize, or choose another format")


def _check_model(model: nn.Module, blocks: list[Block], grid: Grid | None) -> None:
    check_linears(model, _names(blocks))
    assert grid is not None  # checked with the settings
    common_group(grid, (linear.weight.shape[1] for block in blocks for linear in block.linears.values()))


def _names(blocks: list[Block]) -> list[str]:
    return [block.full_name(child) for block in blocks for child in block.linears]


FORMAT = OutputFormat(NAME, SUMMARY, CompressedWriter, _check, _check_model, size=size)
