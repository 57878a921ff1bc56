"""Carries out a comparison: one run after the other on one loaded model."""

import sys
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ace_ext.compare.bench import Bench, weights_sha256
from ace_ext.compare.grid import Study
from ace_ext.compare.journal import Cell, Journal, Results
from ace_ext.compare.networks import NetworkBench
from ace_ext.data.bos import BosChoice
from ace_ext.data.corpora import CALIBRATION, source_sha256
from ace_ext.data.media_items import is_media
from ace_ext.data.requests import check_positions
from ace_ext.engine.api import check_pattern
from ace_ext.errors import InputError
from ace_ext.models._transformers import predicts_tokens
from ace_ext.models.blocks import find_blocks
from ace_ext.models.loading import load_model
from ace_ext.pruning.method import Method


def run_study(study: Study, device: torch.device, output: Path | None = None, progress: bool = False) -> Results:
    """Carries out the runs of the grid that ``output`` does not record yet, and writes each there once it is done.

    Args:
        device: where the model runs.
        output: a folder; None: the results are only kept in memory.
        progress: show a bar over the runs on stderr.

    Returns:
        All runs of the folder: those of this grid and those recorded before.

    Raises:
        InputError: for bad input, or if another comparison writes to ``output``. As much as possible is checked before
            the model is loaded.
    """
    study.evaluation.tasks.check()
    sources = {source: source_sha256(source, CALIBRATION, study.text_field) for source in study.grid.calibrations}
    journal = Journal(output, study.settings(device))
    try:
        _run_missing(study, device, journal, sources, progress)
    finally:
        journal.close()
    return journal.results


def _run_missing(
    study: Study, device: torch.device, journal: Journal, sources: dict[str, str | None], progress: bool
) -> None:
    for cell, method in study.grid.cells():
        journal.refuse_changed(cell, study.config(method, cell.amount).to_dict(), sources[cell.calibration])
    missing = [(cell, method) for cell, method in study.grid.cells() if journal.results.find(cell) is None]
    if missing or not journal.results.dense:
        bench = _bench(study, device, journal.results.choices)
        _check_cells(study, bench.model, missing)
        weights = weights_sha256(bench.model)
        if not journal.results.dense:
            journal.add_dense(bench.evaluate(), weights, bench.bos, bench.scores())
        elif weights != journal.results.weights_sha256:
            raise InputError(
                f"{study.model} has different weights than the recorded runs in {journal.path}; use another output"
            )
        with tqdm(total=len(missing), desc="comparing", unit="run", disable=not progress, file=sys.stderr) as bar:
            for cell, method in missing:
                bar.set_postfix_str(f"{cell.method} {cell.amount} {cell.length} seed {cell.seed}")
                mode = study.grid.bos_mode(method, cell)
                config = study.config(method, cell.amount)
                journal.add(bench.run(cell, config, mode, sources[cell.calibration]))
                bar.update()


def _check_cells(study: Study, model: nn.Module, cells: list[tuple[Cell, Method]]) -> None:
    """Checks that the model has columns for each pattern and positions for each length, before the first run.

    Raises:
        InputError: it does not.
    """
    blocks = find_blocks(model, study.skip)
    for cell, method in cells:
        check_pattern(blocks, study.config(method, cell.amount))
        if not is_media(cell.calibration):
            check_positions(model, cell.seqlen)


def _bench(study: Study, device: torch.device, recorded: list[BosChoice]) -> Bench:
    """The bench for the kind of model, which is loaded."""
    loaded = load_model(study.model, study.dtype, device, causal=False)
    if predicts_tokens(loaded.model):
        study.check_text()
        return Bench(loaded, study.evaluation, study.text_field, recorded)
    return NetworkBench(loaded, study.evaluation, study.text_field, recorded)
