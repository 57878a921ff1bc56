"""The grid of a quantized folder, by the method in its report."""

from ace_ext.grids import Grid
from ace_ext.pruning.method import parse
from ace_ext.pruning.stages import Quantize
from ace_ext.records import PruneReport


def grid_of(report: PruneReport) -> Grid | None:
    """The grid of the stage ``quantize`` of a run; None if its method does not have this stage.

    Only the text of this stage is read: another one may have scores that are a function.

    Raises:
        InputError: an option of the stage is not valid.
    """
    for text in str(report.config.get("method", "")).split(" + "):
        if text.partition("(")[0].strip() == Quantize.name:
            stage = parse(text).quantize
            assert stage is not None  # the text is that of such a stage
            return stage.grid
    return None
