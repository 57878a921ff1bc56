"""Plots of one run as PNG bytes: the error of each matrix, the seconds of each block, the remaining weights."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ace_ext.dense_weights import kind_of
from ace_ext.models.safetensors_files import Shards, has_safetensors
from ace_ext.records import BlockReport
from ace_ext.reporting.plots import FONT, at_whole_numbers, figure_with, png_of

_SAMPLED = 2**16  # upper bound for the weights of each matrix in the histogram
_REACH = 4.0  # range of the histogram, in root mean squares


def errors_by_kind(blocks: Sequence[BlockReport]) -> dict[str, list[float]]:
    """The relative error of each kind of matrix in each block, averaged over experts. NaN: the block has no matrix of
    this kind, or no token reached it. Names are shortened unless two would be equal."""
    found: dict[str, list[list[float]]] = {}
    for index, block in enumerate(blocks):
        for matrix in block.matrices:
            kind = kind_of(matrix.name.removeprefix(block.name + "."))
            columns = found.setdefault(kind, [[] for _ in blocks])
            if matrix.tokens:
                columns[index].append(matrix.relative_error)
    last = [kind.rpartition(".")[2] for kind in found]
    return {
        name if last.count(name) == 1 else kind: [sum(cell) / len(cell) if cell else math.nan for cell in columns]
        for name, (kind, columns) in zip(last, found.items(), strict=True)
    }


def errors_plot(blocks: Sequence[BlockReport]) -> bytes:
    """The PNG of a heat map: a row for each kind of matrix, a column for each block, coloured by relative error."""
    from matplotlib.colors import Normalize

    errors = errors_by_kind(blocks)
    figure, (axes,) = figure_with(1)
    figure.set_figheight(1.2 + 0.26 * len(errors))
    axes.grid(visible=False)
    axes.set_facecolor("#dddddd")  # cells without a figure
    known = [error for row in errors.values() for error in row if not math.isnan(error)]
    scale = Normalize(0, max(known, default=1.0) or 1.0)
    picture = axes.imshow(list(errors.values()), aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_yticks(range(len(errors)), list(errors), fontsize=FONT)
    axes.set_xlabel("block", fontsize=FONT)
    at_whole_numbers(axes)
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label("relative error", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    return png_of(figure, {})


def seconds_plot(blocks: Sequence[BlockReport]) -> bytes:
    """The PNG of a plot of the seconds that each block took."""
    figure, (axes,) = figure_with(1)
    axes.bar(range(len(blocks)), [block.seconds for block in blocks], color="#0072b2", width=0.8)
    axes.set_xlabel("block", fontsize=FONT)
    at_whole_numbers(axes)
    axes.set_ylabel("seconds", fontsize=FONT)
    return png_of(figure, {})


def kept_weights(folder: str | Path, blocks: Sequence[BlockReport]) -> Tensor:
    """The nonzero weights in a sample of each pruned matrix of a folder, divided by their root mean square: ``[n]``
    float32. Empty if the files hold the matrices under other names."""
    if not has_safetensors(Path(folder)):
        return torch.zeros(0)
    shards, found = Shards(folder), [torch.zeros(0)]
    for block in blocks:
        for matrix in block.matrices:
            if f"{matrix.name}.weight" in shards:
                weight = shards.read(f"{matrix.name}.weight").flatten()
                sample = weight[:: max(1, len(weight) // _SAMPLED)].float()
                kept = sample[sample != 0]
                found.append(kept / kept.square().mean().sqrt())
    return torch.cat(found)


def weights_plot(kept: Tensor) -> bytes:
    """The PNG of a histogram of :func:`kept_weights`."""
    figure, (axes,) = figure_with(1)
    counts = torch.histc(kept, bins=81, min=-_REACH, max=_REACH)
    edges = torch.linspace(-_REACH, _REACH, 82)
    axes.stairs((counts / max(1, len(kept))).tolist(), edges.tolist(), fill=True, color="#009e73")
    axes.set_xlabel("weight / root mean square of its matrix", fontsize=FONT)
    axes.set_ylabel("share of kept weights", fontsize=FONT)
    return png_of(figure, {})
