"""How large the weights of a run's output will be, in each format."""

import math
from dataclasses import dataclass, replace

from ace_ext.engine.embeddings import tables_of
from ace_ext.formats import format_named
from ace_ext.packed import Kept
from ace_ext.pruning.config import PruneConfig
from ace_ext.runs.model_source import Source


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix to prune: ``keep`` of the ``group_size`` weights of each comparison group are kept."""

    name: str
    shape: tuple[int, int]
    group: str  # row, matrix, model, or N:M
    group_size: int
    keep: int


def bytes_of_all(source: Source) -> int:
    """Bytes of all weights and stored buffers of a model, dense; tied ones once."""
    stored = source.model.state_dict(keep_vars=True).values()
    return sum({id(tensor): tensor.nbytes for tensor in stored}.values())


def is_estimate(format_name: str, config: PruneConfig) -> bool:
    """Whether :func:`output_bytes` depends on the weights, which shapes do not tell: they are compressed, or
    quantization rounds more of them to zero."""
    chosen = format_named(format_name)
    compresses = chosen.codec is not None and chosen.codec.compresses
    return chosen.size is not None and (compresses or config.method.grid is not None)


def output_bytes(source: Source, matrices: list[PlannedMatrix], format_name: str, config: PruneConfig) -> int:
    """Bytes of the weights in the output, from shapes alone; see :func:`is_estimate`."""
    chosen = format_named(format_name)
    if chosen.size is None:
        return bytes_of_all(source)
    dtype = next(source.model.parameters()).dtype
    pattern = None if config.pattern is None else (config.pattern.keep_n, config.pattern.group_m)
    grid = config.method.grid
    others, found = bytes_of_all(source), 0
    rounding = config.method.embeddings
    if rounding is not None and chosen.codec is not None and not chosen.codec.needs_pattern:
        for name in tables_of(source.model):
            rows, cols = source.model.get_parameter(name).shape
            others -= rows * cols * dtype.itemsize
            found += chosen.size(Kept(rows, cols, rows * cols, dtype, None, rounding.grid))
    transposed = {b.full_name(child) for b in source.blocks for child in b.linears if b.is_stored_transposed(child)}
    for matrix in matrices:
        (rows, cols), dense = matrix.shape, math.prod(matrix.shape) * dtype.itemsize
        kept = Kept(rows, cols, round(matrix.keep / matrix.group_size * rows * cols), dtype, pattern, grid)
        others -= dense
        if matrix.name in transposed:  # the rows of its tensor have neither the pattern nor the grid
            if chosen.codec is None or chosen.codec.needs_pattern:
                found += dense
                continue
            kept = replace(kept, rows=cols, cols=rows, pattern=None, grid=None)
        found += min(chosen.size(kept), dense)
    if chosen.codec is not None and chosen.codec.compresses:
        count = others // dtype.itemsize
        others = chosen.codec.size(Kept(1, count, count, dtype, pattern))
    return found + others
