"""The grid of a quantized folder, by the method in its report."""

from pathlib import Path

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.pruning.method import parse
from ace_ext.pruning.stages import Quantize
from ace_ext.records import REPORT_NAME, PruneReport


def grid_of(report: PruneReport, folder: str | Path) -> Grid | None:
    """The grid of the stage ``quantize`` of a run; None if its method does not have this stage.

    Only the text of this stage is read: another one may have scores that are a function.

    Raises:
        InputError: the stage has no such text; the message names ``folder``.
    """
    for text in str(report.config.get("method", "")).split(" + "):
        if text.partition("(")[0].strip() != Quantize.name:
            continue
        try:
            stage = parse(text).quantize
        except InputError as error:
            raise InputError(f"{Path(folder) / REPORT_NAME} is not a report of ace-prune: {error}") from error
        return None if stage is None else stage.grid
    return None
