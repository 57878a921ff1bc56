"""``ace-prune run``: prunes a checkpoint into a new folder, within a memory budget, with one or several processes. An
interrupted run can be resumed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ace_ext.data.bos import BosChoice
from ace_ext.data.windows import CalibrationData
from ace_ext.engine.api import check_pattern, prune_model, removal_report
from ace_ext.engine.context import RunContext
from ace_ext.engine.distributed import Alone, Ranks, launched, share_of, share_of_batches
from ace_ext.engine.embeddings import check_tables, read_tables_, round_stored_tables
from ace_ext.engine.inputs import Batches, text_inputs
from ace_ext.engine.progress import Progress
from ace_ext.engine.protocols import Peers, StatisticsSource
from ace_ext.errors import InputError
from ace_ext.fingerprint import arithmetic, tokens_sha256
from ace_ext.formats import format_named
from ace_ext.models._transformers import predicts_tokens
from ace_ext.models.block_store import BlockSource, OffloadedBlocks, ResidentBlocks
from ace_ext.models.location import hub_name
from ace_ext.models.versions import versions
from ace_ext.process_memory import return_freed_memory
from ace_ext.pruning.config import PruneConfig
from ace_ext.records import REPORT_NAME, PruneReport, Removed, RoundedTable
from ace_ext.runs.bos_choice import choose_for_run
from ace_ext.runs.command import run_command
from ace_ext.runs.holdout import Measurement, measurement_for
from ace_ext.runs.model_source import Demand, Source, check_serves, is_network, open_source, sized
from ace_ext.runs.options import Calibration, InputCalibration, RunOptions, RunRequest, check_request
from ace_ext.runs.output import (
    already_complete,
    check_apart,
    check_output,
    check_outside,
    disk_errors,
    finished_report,
    output_path,
)
from ace_ext.runs.own_files import is_statistics, read_manifest
from ace_ext.runs.removal import remove_from_, smaller_of
from ace_ext.runs.unfinished import discard, folder_of, recorded_fingerprint, recover
from ace_ext.runs.workspace import Workspace

if TYPE_CHECKING:  # at run time few runs load these
    from ace_ext.runs.network_holdout import NetworkMeasurement
    from ace_ext.runs.statistics_file import StatisticsWriter

TABLES = "embeddings"
"""The note of a run with the records of rounded tables."""

TEXT = "text.bin"
"""The file in the folder of an unfinished run with the text that the model wrote: int64, little-endian."""


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
    if options.stats is not None:
        config = config.from_statistics()
    elif options.save_stats is not None:
        config = config.on_dense_blocks()
    request = RunRequest(model, config, calibration, options, device, dtype)
    check_request(request)
    if options.max_memory is not None and device.type == "cpu":
        return_freed_memory()
    path, progress = output_path(output), progress or Progress()
    with disk_errors(path):
        check_apart(path, model, *calibration.sources, options.stats)
        check_outside(path, "save-stats", options.save_stats)
        if config.method.distill is None:
            return _prune(request, path, progress), path
        from ace_ext.runs.prune_and_heal import prune_and_heal, text_of  # imported here: most runs do not distil

        if is_network(request):
            later = text_of(request, causal=False) if calibration.reads_text else None
            return _prune(replace(request, later=later), path, progress), path
        recover(path)
        check_output(path, options.overwrite, options.resume)
        calibration.check()
        return prune_and_heal(request, path, progress, _prune), path


def _prune(request: RunRequest, path: Path, progress: Progress) -> PruneReport:
    """Prunes into a folder, as one of the processes of the run."""
    options = request.options
    with _joined(request.device) as peers, disk_errors(path):
        first = peers.rank == 0
        if first:
            recover(path)
        peers.wait()
        check_output(path, options.overwrite, options.resume)
        if options.stats is None:
            request.calibration.check()
        progress.step(f"opening {request.model}")
        source = _open(request)
        blocks = _block_source(source, request.device)
        reads_text = options.stats is None and request.calibration.reads_text
        bos = None if not reads_text else choose_for_run(request, source, blocks, path, peers)
        inputs = _Inputs(request, source, bos)
        if reads_text:  # before the text is drawn, which may take long
            measured = _measurement(request, source, blocks, bos, progress.note) if first else None
        fingerprint, done = inputs.take(path, peers, progress)
        if done is not None:
            _check_saved(options.save_stats, path)
            if first:
                discard(path)
                progress.note(already_complete(path))
            return done
        if not reads_text:
            measured = _measurement(request, source, blocks, bos, progress.note) if first else None
        resume = options.resume and not request.config.comparison.over_matrices
        workspace = Workspace(path, fingerprint, resume, writes=first, rank=peers.rank)
        try:
            peers.wait()  # rank 0 has made the folder, and removed old files from it
            choice = Demand(source, inputs.sized()).decide()
            workspace.resident_hidden, workspace.writes_behind = choice.hidden, choice.overlap
            if first:
                check_output(path, options.overwrite, options.resume)  # a run that had the lock may have written it
                inputs.keep(workspace)
            removed: list[Removed] = []
            if request.config.remove is not None:
                if measured is not None:
                    measured.before()
                removed = remove_from_(source, request, inputs.tokens(peers), progress)
                blocks = _block_source(source, request.device)
                if measured is not None:
                    measured.follow(blocks)
            if first:
                _open_writer(workspace, source, request)
            sink = inputs.statistics_writer(workspace, peers)
            context = RunContext(
                device=request.device,
                blocks=blocks,
                observer=progress if first else Progress(),
                journal=workspace,
                tables=partial(_read_tables_, workspace) if first else None,
                peers=peers,
                sink=sink,
                source=inputs.known,
                keeps_forwards=choice.forwards,
            )
            if bos is not None and first:
                progress.note(str(bos))
            if first and inputs.fewer is not None:
                progress.note(inputs.fewer)
            if measured is not None and not removed:
                measured.before()
            if choice.overlap and isinstance(blocks, OffloadedBlocks):
                blocks.read_ahead()  # not earlier: the model's head would be in memory too
            whole = not source.offloaded and not workspace.finished  # then the pruned model is in memory
            if request.config.only_removes:
                report = removal_report(source.model, request.config, removed)
                context.observer.end(report)
            else:
                later = request.config.without_removal() if removed else request.config
                again = None if later.method.distill is None else inputs.to_distill(peers)
                report = prune_model(source.model, inputs.batches(peers), later, distill_text=again, context=context)
                if report.healing is not None:
                    _write_again(workspace, source)
                report.config, report.removed = request.config.to_dict(), removed
            if measured is not None:
                measured.after(report, None if whole else workspace.model)
            report.extra = inputs.described()
            if sink is not None:
                note = sink.finish(request.config.needs.kept)
                if first:
                    progress.note(note)
            if first:
                check_output(path, options.overwrite)  # another program may have written there meanwhile
                workspace.finish(report, REPORT_NAME)
            peers.wait()
            return report
        except Exception:
            workspace.stop_writing()
            if not workspace.finished:  # nothing to resume from
                workspace.remove() if first else workspace.close()
            raise
        finally:
            workspace.close()


def _check_saved(file: Path | None, output: Path) -> None:
    """Checks that the statistics are there that a finished run saved."""
    if file is not None and not is_statistics(file):
        raise InputError(
            f"output folder {str(output)!r} is complete, but save-stats {str(file)!r} is not there; start over with "
            "--overwrite and without --resume"
        )


def _measurement(
    request: RunRequest, source: Source, blocks: BlockSource, bos: BosChoice | None, tell: Callable[[str], None]
) -> "Measurement | NetworkMeasurement | None":
    """What a run measures before and after; errors as the two functions have them."""
    if predicts_tokens(source.model):
        return measurement_for(request, source, blocks, bos, tell)
    from ace_ext.runs.network_holdout import network_measurement_for  # imported here: few runs need it

    return network_measurement_for(request, source, bos, tell)


@contextmanager
def _joined(device: torch.device) -> Iterator[Peers]:
    """The processes of the run; the group of several is left at the end."""
    if not launched():
        yield Alone()
        return
    peers = Ranks(device)
    try:
        yield peers
    finally:
        peers.close()


def _open(request: RunRequest) -> Source:
    """The model, checked as far as it is possible before the text is drawn: the model may write it for a long time."""
    source = open_source(request)
    if request.config.remove is None:
        check_pattern(source.blocks, request.config)
    else:
        smaller_of(source, request.config)
    check_tables(source.model, request.config)
    check_serves(source, request)
    if request.options.max_memory is not None:
        Demand(source, request).hidden_fits()
    return source


class _Inputs:
    """The second input of a run: calibration tokens, or statistics of an earlier run."""

    def __init__(self, request: RunRequest, source: Source, bos: BosChoice | None) -> None:
        self._request, self._source, self._bos = request, source, bos
        self._model = {"files": source.files.described, "dtype": request.dtype}
        self.known: StatisticsSource | None = None
        self._known_sha256: str | None = None
        self._data: CalibrationData | None = None
        self._batches: list[dict[str, Tensor]] | None = None
        self._calibration: dict[str, Any] = {}
        if request.options.stats:
            from ace_ext.runs.statistics_file import SavedStatistics

            saved = SavedStatistics(request.options.stats, self._model, request.config.needs.read)
            self.known, self._known_sha256, self._calibration = saved, saved.sha256, saved.calibration

    def take(self, output: Path, peers: Peers, progress: Progress) -> tuple[dict[str, Any], PruneReport | None]:
        """Draws the calibration tokens, unless the statistics are from a file. Returns the fingerprint of the run, and
        its report if an earlier run had finished it.

        A resumed run on text that the model wrote takes the earlier text, because writing takes long.
        """
        request, options = self._request, self._request.options
        own = request.writes_own_text and options.resume
        known = self._recorded((read_manifest(output) or {}).get("fingerprint", {})) if own else None
        if known is not None:
            self._calibration = known
            done = finished_report(output, self.fingerprint(peers), options.overwrite)
            if done is not None:
                peers.wait()
                return {}, done
        text = request.calibration
        if self.known is None and isinstance(text, InputCalibration):
            self._batches = text.read(self._source.files.folder)
            self._calibration = text.describe_inputs(self._batches)
        elif self.known is None:
            self._data = (self._kept(output) if own else None) or self._draw(progress, tell=peers.rank == 0)
            self._calibration = request.calibration.describe(self._data)
        fingerprint = self.fingerprint(peers)
        done = finished_report(output, fingerprint, options.overwrite) if options.resume else None
        peers.wait()
        return fingerprint, done

    def _draw(self, progress: Progress, tell: bool) -> CalibrationData:
        writer = None if self._source.offloaded else self._source.model
        note = progress.note if tell else None
        return self._request.calibration.load(self._source.tokenizer, writer, self._bos, progress.shown, note)

    def _recorded(self, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
        """The description of the text in an earlier run's fingerprint, if the model wrote it as this run asks.
        Everything else that the text depends on is in the fingerprint too."""
        found, text = fingerprint.get("calibration"), self._request.calibration
        asked = {"source": text.source, "nsamples": text.nsamples, "seqlen": text.seqlen, "seed": text.seed}
        asked["bos"] = None if self._bos is None else self._bos.to_dict()
        return found if isinstance(found, dict) and found == {**asked, "sha256": found.get("sha256")} else None

    def _kept(self, output: Path) -> CalibrationData | None:
        """The text that the model wrote for an unfinished run, if it is complete and was written as this run asks."""
        earlier, text = recorded_fingerprint(output), self._request.calibration
        found, file = self._recorded(earlier), folder_of(output) / TEXT
        if found is None or earlier.get("model") != self._model or not file.is_file() or self._bos is None:
            return None
        ids = np.fromfile(file, "<i8")
        if ids.size != text.nsamples * text.seqlen:
            return None
        tokens = torch.from_numpy(ids).view(text.nsamples, text.seqlen)
        same = tokens_sha256(tokens) == found["sha256"]
        return CalibrationData(tokens, text.source, text.seed, found["sha256"], self._bos) if same else None

    def keep(self, workspace: Workspace) -> None:
        """Writes the text into the folder of the run, if the model wrote it."""
        if self._data is not None and self._request.writes_own_text:
            self._data.tokens.numpy().astype("<i8").tofile(workspace.folder / TEXT)

    def described(self) -> dict[str, Any]:
        """What the report says of the run's inputs."""
        return {
            "model": self._request.model,
            "base_model": hub_name(self._request.model),
            "calibration": self._calibration,
            "statistics": self.statistics,
            "command": run_command(self._request),
        }

    @property
    def statistics(self) -> str:
        """The origin of the statistics, for the report."""
        if self._request.options.stats:
            return "of the dense model, from a file"
        return "of the dense model, kept in a file" if self._request.options.save_stats else "of the run"

    def fingerprint(self, peers: Peers) -> dict[str, Any]:
        """Everything that the output depends on, as plain values."""
        return {
            "versions": versions(),
            "model": self._model,
            "calibration": self._calibration,
            "config": self._request.config.to_dict(),
            "device": self._request.device.type,
            **arithmetic(),
            "format": self._request.options.format,
            "processes": peers.size,
            "statistics": self.statistics,
            "stats": self._known_sha256,
        }

    def tokens(self, peers: Peers) -> Tensor:
        """The calibration samples of this process, ``[nsamples, seqlen]``; empty with statistics from a file."""
        if self._data is None:
            return torch.zeros(0, 0, dtype=torch.long)
        return share_of(self._data.tokens, peers)

    def batches(self, peers: Peers) -> Batches:
        """The calibration of this process: tokens as :meth:`tokens`, or arguments of the model's calls."""
        if self._batches is not None:
            return share_of_batches(self._batches, peers)
        return text_inputs(self._source.model, self.tokens(peers), self._request.config)

    @property
    def fewer(self) -> str | None:
        """What is to be said if the calibration has fewer samples than were asked for."""
        asked, found = self._request.calibration, self._calibration.get("nsamples")
        if self._batches is None or found == asked.nsamples:
            return None
        return f"calibration {asked.source!r} has {found} samples, fewer than nsamples {asked.nsamples}"

    def sized(self) -> RunRequest:
        """The request by which memory is estimated: with the samples that were read, if they are no text, and the
        tokens that the model makes of one."""
        if self._batches is None:
            return self._request
        return sized(self._request, self._source, self._batches)

    def to_distill(self, peers: Peers) -> Batches | None:
        """What a network is distilled on: other windows of the calibration text; None: its calibration."""
        if self._request.later is None:
            return None
        drawn = self._request.later.load(self._source.tokenizer, None, self._bos)
        return text_inputs(self._source.model, drawn.tokens, self._request.config)

    def statistics_writer(self, workspace: Workspace, peers: Peers) -> "StatisticsWriter | None":
        """The writer of the statistics file, if the run saves one."""
        path = self._request.options.save_stats
        if path is None:
            return None
        from ace_ext.runs.statistics_file import StatisticsWriter

        fingerprint = {"model": self._model, "calibration": self._calibration}
        return StatisticsWriter(path, workspace.folder / "stats", fingerprint, writes=peers.rank == 0)


def _block_source(source: Source, device: torch.device) -> BlockSource:
    if not source.offloaded:
        return ResidentBlocks(source.blocks)
    assert source.files.shards is not None  # offloaded blocks are read from there
    return OffloadedBlocks(source.blocks, source.files.shards, device)


def _write_again(workspace: Workspace, source: Source) -> None:
    """Writes all blocks once more: they were trained after each had been written."""
    assert workspace.writer is not None  # set before the walk starts
    for block in source.blocks:
        workspace.writer.write(block)


def _open_writer(workspace: Workspace, source: Source, request: RunRequest) -> None:
    """Opens the writer of the output. Writes what does not depend on pruning, unless an earlier run did. Checks that
    the format can hold every pruned weight."""
    chosen = format_named(request.options.format)
    chosen.check_model(source.model, source.blocks, request.config.method.grid)
    workspace.model.mkdir(parents=True, exist_ok=True)
    workspace.writer = chosen.open(workspace.model)
    if not workspace.finished:
        workspace.writer.lay_out(source.dense)
    workspace.writer.check(source.dense)
    stage = request.config.method.embeddings
    if stage is not None and not workspace.finished:
        tables = round_stored_tables(source.model, workspace.writer.shards, stage)
        workspace.notes[TABLES] = [asdict(table) for table in tables]
    workspace.check_output(source.blocks)


def _read_tables_(workspace: Workspace, model: nn.Module) -> list[RoundedTable]:
    """Gives a model in memory the embeddings that :func:`_open_writer` rounded, in this run or in an earlier one."""
    assert workspace.writer is not None  # set before the walk starts
    records = [RoundedTable(**table) for table in workspace.notes[TABLES]]
    return read_tables_(model, workspace.writer.shards, records)
