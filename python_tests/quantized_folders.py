"""Weights on a grid, and pruned folders whose matrices are on one, as the stage ``quantize`` leaves them."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from ace_ext.cards import write_card
from ace_ext.grids import Grid
from ace_ext.models.safetensors_files import Shards
from ace_ext.records import REPORT_NAME
from ace_ext.runs.output import read_report


def on_grid(weight: Tensor, grid: Grid) -> Tensor:
    """A matrix ``[rows, cols]`` rounded to the grid whose scales fit the largest magnitude of each group."""
    rows, cols = weight.shape
    groups = grid.groups(cols)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * grid.group - cols)).view(rows, groups, grid.group)
    scales = (padded.abs().amax(dim=2) / grid.highest).to(weight.dtype)
    steps = padded / scales.float()[:, :, None].clamp_min(torch.finfo(torch.float32).tiny)
    codes = steps.round().clamp(grid.lowest, grid.highest).to(torch.int8).view(rows, -1)[:, :cols]
    return grid.dequantize(codes, scales)


def quantize_folder(pruned: Path, output: Path, grid: Grid) -> Path:
    """A copy of a pruned folder with all matrices of its blocks on a grid. Report and card say so."""
    shutil.copytree(pruned, output)
    report, shards = read_report(output), Shards(output)
    for name in [name for name, entry in shards.entries.items() if ".layers." in name and len(entry.shape) > 1]:
        weight = shards.read(name)
        shards.write({name: on_grid(weight.view(-1, weight.shape[-1]), grid).view(weight.shape)})
    for matrix in report.matrices:
        if f"{matrix.name}.weight" in shards:  # fused experts are not
            matrix.nonzero = int(shards.read(f"{matrix.name}.weight").count_nonzero())
    report.config["method"] += f" + quantize(bits={grid.bits}, group={grid.group})"
    (output / REPORT_NAME).write_text(report.to_json())
    write_card(output, report)
    return output
