"""The choice whether the windows of a run begin with the BOS token. A run makes and records it; a resumed run and the
evaluation of the pruned model read the record."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ace_ext.data.bos import AUTO, BosChoice
from ace_ext.data.corpora import SELF
from ace_ext.engine.protocols import Peers
from ace_ext.errors import InputError
from ace_ext.models.block_store import BlockSource
from ace_ext.models.whole_forward import whole_logits
from ace_ext.records import REPORT_NAME
from ace_ext.runs.model_source import Source
from ace_ext.runs.options import RunRequest
from ace_ext.runs.output import read_report
from ace_ext.runs.unfinished import recorded_fingerprint


def choose_for_run(request: RunRequest, source: Source, blocks: BlockSource, output: Path, peers: Peers) -> BosChoice:
    """The choice for the calibration samples of a run. It is the same on all ranks, and does not depend on whether the
    whole model is in memory. A resumed run takes the recorded choice and measures nothing.

    Raises:
        InputError: as :func:`ace_ext.data.bos.choose_bos`.
    """

    def logits(tokens: Tensor) -> Tensor:
        return whole_logits(source.model, blocks, tokens, request.device)

    choice: BosChoice | None = None
    if peers.rank == 0:
        calibration = request.calibration
        recorded = recorded_fingerprint(output).get("calibration") if request.options.resume else None
        choice = from_record(recorded, calibration.bos)
        choice = choice or calibration.choose_bos(source.tokenizer, source.model, logits)
    agreed: BosChoice = peers.gather(choice)[0]
    return agreed


def recorded_in_report(folder: str, mode: str) -> BosChoice | None:
    """For ``mode`` ``auto``, the choice of the run that wrote a pruned folder, when the model was dense. None if there
    is no report, or that run did not choose: another mode was set, or the model wrote its own text."""
    if mode != AUTO or not Path(folder, REPORT_NAME).is_file():
        return None
    try:
        calibration = read_report(folder).extra.get("calibration") or {}
    except InputError:
        return None  # the model can be evaluated without its report
    return None if calibration.get("source") == SELF else from_record(calibration, mode)


def from_record(calibration: Mapping[str, Any] | None, mode: str) -> BosChoice | None:
    """The choice in a record of calibration samples, if it was made for the same mode."""
    found = (calibration or {}).get("bos")
    choice = BosChoice(**found) if isinstance(found, dict) else None
    return choice if choice is not None and choice.mode == mode else None
