"""``ace-prune run``: prunes a checkpoint into a new folder, within a memory budget, with one or several processes. An
interrupted run can be resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_ext.data.bos import BosChoice
from ace_ext.data.generate import writing_note
from ace_ext.data.windows import CalibrationData
from ace_ext.engine.api import check_pattern, prune_model
from ace_ext.engine.context import RunContext
from ace_ext.engine.distributed import Alone, Ranks, launched, share_of
from ace_ext.engine.progress import Progress
from ace_ext.engine.protocols import Peers
from ace_ext.formats import format_named
from ace_ext.models.block_store import BlockSource, OffloadedBlocks, ResidentBlocks
from ace_ext.models.location import hub_name
from ace_ext.models.versions import versions
from ace_ext.process_memory import return_freed_memory
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.bos_choice import choose_for_run
from ace_ext.runs.command import run_command
from ace_ext.runs.holdout import measurement_for
from ace_ext.runs.model_source import Demand, Source, check_serves, open_source
from ace_ext.runs.options import Calibration, RunOptions, RunRequest, check_request
from ace_ext.runs.output import (
    already_complete,
    check_apart,
    check_output,
    check_outside,
    disk_errors,
    finished_report,
    output_path,
)
from ace_ext.runs.own_files import read_manifest
from ace_ext.runs.statistics_file import SavedStatistics, StatisticsWriter, reusable
from ace_ext.runs.unfinished import discard, recover
from ace_ext.runs.workspace import Workspace


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

    After each block its pruned tensors and the state of the run are on the disk. With ``options.resume`` an interrupted
    run continues from there. Its output has the same bytes as that of an uninterrupted run.

    Args:
        model: a folder, a ``.gguf`` file or a hub name.
        output: the folder to write.
        config: what to prune and how. With saved statistics its method gets ``order=block``.
        calibration: the calibration text.
        options: options of the run.
        device: where blocks run.
        dtype: dtype of the weights; ``"auto"``: that of the model's configuration.
        progress: shows the progress; default: nothing.

    Returns:
        The report, and the output folder (rank 0 writes it if there are several processes).

    Raises:
        InputError: for an error in the arguments, the model, the text, or the disk.
    """
    if options.save_stats is not None or options.stats is not None:
        config = config.on_dense_blocks()
    request = RunRequest(model, config, calibration, options, device, dtype)
    check_request(request)
    if options.max_memory is not None and device.type == "cpu":
        return_freed_memory()
    path, progress = output_path(output), progress or Progress()
    with disk_errors(path):
        check_apart(path, model, calibration.source, options.stats)
        check_outside(path, "save-stats", options.save_stats)
        if config.method.distill is None:
            return _prune_on_ranks(request, path, progress), path
        from ace_ext.runs.prune_and_heal import prune_and_heal  # imported here: most runs do not distil

        recover(path)
        check_output(path, options.overwrite, options.resume)
        calibration.check()
        return prune_and_heal(request, path, progress, _prune_on_ranks), path


def _prune_on_ranks(request: RunRequest, path: Path, progress: Progress) -> PruneReport:
    """Prunes into a folder, as one of the processes of the run."""
    options = request.options
    peers: Peers = Ranks(request.device) if launched() else Alone()
    try:
        with disk_errors(path):
            if peers.rank == 0:
                recover(path)
            peers.wait()
            check_output(path, options.overwrite, options.resume)
            if options.stats is None:
                request.calibration.check()
            return _prune(request, path, progress, peers)
    finally:
        if isinstance(peers, Ranks):
            peers.close()


def _prune(request: RunRequest, path: Path, progress: Progress, peers: Peers) -> PruneReport:
    progress.step(f"opening {request.model}")
    source = open_source(request)
    check_pattern(source.blocks, request.config)
    check_serves(source, request)
    if request.options.max_memory is not None:
        Demand(
            source, request
        ).hidden_fits()  # refuses what cannot fit before the model writes text: that may take long
    blocks = _block_source(source, request.device)
    bos = None if request.options.stats else choose_for_run(request, source, blocks, path, peers)
    measured = measurement_for(request, source, blocks, bos, progress.note) if peers.rank == 0 else None
    inputs = _Inputs(request, source, bos)
    resume = request.options.resume and not request.config.comparison.over_matrices
    recorded, done = inputs.recorded_text(path), None
    if recorded is not None:
        done = finished_report(path, inputs.fingerprint(peers, recorded), request.options.overwrite)
    if done is None:
        inputs.draw(progress.shown, progress.note if peers.rank == 0 else None)
        fingerprint = inputs.fingerprint(peers)
        done = finished_report(path, fingerprint, request.options.overwrite) if request.options.resume else None
    peers.wait()
    if done is not None:
        if peers.rank == 0:
            discard(path)
            progress.note(already_complete(path))
        return done
    workspace = Workspace(path, fingerprint, resume, writes=peers.rank == 0, rank=peers.rank)
    try:
        peers.wait()  # rank 0 has made the folder, and removed old files from it
        choice = Demand(source, request).decide()
        workspace.resident_hidden, workspace.writes_behind = choice.hidden, choice.overlap
        if peers.rank == 0:
            check_output(
                path, request.options.overwrite, request.options.resume
            )  # a run that had the lock before may have written it
            _open_writer(workspace, source, request)
        sink = inputs.statistics_writer(workspace, peers)
        context = RunContext(
            device=request.device,
            blocks=blocks,
            observer=progress if peers.rank == 0 else Progress(),
            journal=workspace,
            peers=peers,
            sink=sink,
            source=inputs.known,
            keeps_forwards=choice.forwards,
        )
        if bos is not None and peers.rank == 0:
            progress.note(str(bos))
        if measured is not None:
            measured.before()
        if choice.overlap and isinstance(blocks, OffloadedBlocks):
            blocks.read_ahead()  # not earlier: the model's head would be in memory too
        whole = not source.offloaded and not workspace.finished  # then the pruned model is in memory
        report = prune_model(source.model, inputs.tokens(peers), request.config, context=context)
        if measured is not None:
            report.perplexity = measured.after(None if whole else workspace.model)
        report.extra = {
            "model": request.model,
            "base_model": hub_name(request.model),
            "calibration": inputs.calibration,
            "statistics": inputs.statistics,
            "command": run_command(request),
        }
        if sink is not None:
            sink.finish(request.config.needs.kept)
            if peers.rank == 0:
                progress.note(f"statistics written to {sink.path}: {reusable(request.config.needs.kept)}")
        if peers.rank == 0:
            check_output(path, request.options.overwrite)  # another program may have written there meanwhile
            workspace.finish(report, REPORT_NAME)
        peers.wait()
        return report
    except Exception:
        workspace.stop_writing()
        if not workspace.finished:  # nothing to resume from
            workspace.remove() if peers.rank == 0 else workspace.close()
        raise
    finally:
        workspace.close()


class _Inputs:
    """The second input of a run: calibration tokens, or statistics of an earlier run."""

    def __init__(self, request: RunRequest, source: Source, bos: BosChoice | None) -> None:
        self._request, self._source, self._bos = request, source, bos
        self._model = {"files": source.files.described, "dtype": request.dtype}
        self.known: SavedStatistics | None = None
        self._data: CalibrationData | None = None
        self.calibration: dict[str, Any] = {}
        if request.options.stats:
            self.known = SavedStatistics(request.options.stats, self._model, request.config.needs.read)
            self.calibration = self.known.calibration

    def draw(self, shown: bool, note: Callable[[str], None] | None) -> None:
        """Draws the calibration tokens, unless the statistics are from a file. If the model writes them, ``note`` is
        called with a line about it first, and ``shown`` shows a bar."""
        if self.known is None:
            writer = None if self._source.offloaded else self._source.model
            if self._request.writes_own_text and note is not None and writer is not None:
                note(writing_note(writer, self._request.calibration.nsamples, self._request.calibration.seqlen))
            self._data = self._request.calibration.load(self._source.tokenizer, writer, self._bos, shown)
            self.calibration = self._request.calibration.describe(self._data)

    def recorded_text(self, output: Path) -> dict[str, Any] | None:
        """The description of the text of a resumed run that had finished, if the model wrote it as this run asks. To
        write the same text again would take long. Everything that it depends on is in the fingerprint."""
        if not self._request.options.resume or not self._request.writes_own_text or self._bos is None:
            return None
        found = (read_manifest(output) or {"fingerprint": {}})["fingerprint"].get("calibration")
        text = self._request.calibration
        asked = {"source": text.source, "nsamples": text.nsamples, "seqlen": text.seqlen, "seed": text.seed}
        asked["bos"] = self._bos.to_dict()
        same = isinstance(found, dict) and found == {**asked, "sha256": found.get("sha256")}
        return found if same else None

    @property
    def statistics(self) -> str:
        """The origin of the statistics, for the report."""
        if self._request.options.stats:
            return "of the dense model, from a file"
        return "of the dense model, kept in a file" if self._request.options.save_stats else "of the run"

    def fingerprint(self, peers: Peers, calibration: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything that the output depends on, as plain values. ``calibration``: the text's description, if it was
        not drawn."""
        return {
            "versions": versions(),
            "model": self._model,
            "calibration": calibration or self.calibration,
            "config": self._request.config.to_dict(),
            "device": self._request.device.type,
            "threads": torch.get_num_threads(),  # sums in float32 depend on it
            "format": self._request.options.format,
            "processes": peers.size,
            "statistics": self.statistics,
        }

    def tokens(self, peers: Peers) -> Tensor:
        """The calibration samples of this process, ``[nsamples, seqlen]``; empty with statistics from a file."""
        if self._data is None:
            return torch.zeros(0, 0, dtype=torch.long)
        return share_of(self._data.tokens, peers)

    def statistics_writer(self, workspace: Workspace, peers: Peers) -> StatisticsWriter | None:
        """The writer of the statistics file, if the run saves one."""
        path = self._request.options.save_stats
        if path is None:
            return None
        fingerprint = {"model": self._model, "calibration": self.calibration}
        return StatisticsWriter(path, workspace.folder / "stats", fingerprint, writes=peers.rank == 0)


def _block_source(source: Source, device: torch.device) -> BlockSource:
    if not source.offloaded:
        return ResidentBlocks(source.blocks)
    assert source.files.shards is not None  # offloaded blocks are read from there
    return OffloadedBlocks(source.blocks, source.files.shards, device)


def _open_writer(workspace: Workspace, source: Source, request: RunRequest) -> None:
    """Opens the writer of the output. Writes what does not depend on pruning, unless an earlier run did. Checks that
    the format can hold every pruned weight."""
    workspace.model.mkdir(parents=True, exist_ok=True)
    workspace.writer = format_named(request.options.format).open(workspace.model)
    if not workspace.finished:
        workspace.writer.lay_out(source.dense)
    workspace.writer.check(source.dense)
    workspace.check_output(source.blocks)
