"""Verification of a written folder: the sparsity of every row of every matrix, and that transformers can load it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.models.loading import load_model
from ace_ext.models.safetensors_files import Shards, has_safetensors
from ace_ext.models.skeleton import skeleton
from ace_ext.pruning.groups import ComparisonGroup, group_of
from ace_ext.pruning.pattern import SparsityPattern, keep_count
from ace_ext.records import MatrixReport, PruneReport
from ace_ext.runs.output import read_report


@dataclass
class VerifyResult:
    """The result of :func:`verify`."""

    folder: str
    matrices: int = 0
    rows: int = 0
    """Groups that were checked: rows, or the groups of a pattern."""
    exact_rows: int = 0
    """Groups with exactly k non-zeros. Others have fewer, because the dense weight already had zeros there."""
    sparsity: float = 0.0
    loads: bool = False
    """Whether transformers loaded the folder and computed finite logits."""
    problems: list[str] = field(default_factory=list)
    """One line each, with the name of the matrix; empty if the folder is valid."""


def verify(folder: str | Path, load: bool = True) -> VerifyResult:
    """Checks the files of a pruned folder against its report.

    For every matrix of the report: the number of non-zeros per row (or N:M group, matrix, model), no -0.0, no NaN or
    infinity. With ``load`` also that transformers loads the folder and computes finite logits.

    Raises:
        InputError: the folder has no report, no safetensors, or lacks a tensor of the report.
    """
    report = read_report(folder)
    result = VerifyResult(str(folder))
    nonzero = size = 0
    for matrix, weight in _weights(Path(folder), report):
        total = int(weight.count_nonzero())
        _check_matrix(matrix, weight, total, report.config, result)
        nonzero += total
        size += weight.numel()
    result.sparsity = 1 - nonzero / size if size else 0.0
    if report.config.get("allocation", "uniform") != "uniform":
        _check_allocation(report, result)
    if group_of(report.config["group"], None).over_matrices:
        _check_budget(nonzero, keep_count(size, report.config["sparsity"]), result)
    if load:
        _check_loads(str(folder), result)
    return result


def _weights(folder: Path, report: PruneReport) -> Iterator[tuple[MatrixReport, Tensor]]:
    if not has_safetensors(folder):
        raise InputError(f"{str(folder)!r} holds no safetensors; give a folder that ace-prune run wrote")
    shards = Shards(folder)
    if any(f"{matrix.name}.weight" not in shards for matrix in report.matrices):
        skeleton(folder, shards)  # maps the experts that transformers fuses to their tensors in the files
    for matrix in report.matrices:
        name = f"{matrix.name}.weight"
        if name not in shards:
            raise InputError(f"{str(folder)!r} has no tensor {name} that its report names")
        yield matrix, shards.read(name)


def _check_matrix(
    matrix: MatrixReport, weight: Tensor, total: int, config: dict[str, Any], result: VerifyResult
) -> None:
    result.matrices += 1
    if tuple(weight.shape) != matrix.shape:
        result.problems.append(f"{matrix.name}: shape {tuple(weight.shape)}, but the report says {matrix.shape}")
        return
    if not bool(torch.isfinite(weight).all()):
        result.problems.append(f"{matrix.name}: holds NaN or infinity")
    if bool(((weight == 0) & torch.signbit(weight)).any()):
        result.problems.append(f"{matrix.name}: holds -0.0")
    if total != matrix.nonzero:
        result.problems.append(f"{matrix.name}: {total} non-zeros, but the report says {matrix.nonzero}")
    pattern = SparsityPattern.parse(config["pattern"]) if config["pattern"] else None
    group = group_of(config["group"], pattern)
    if not group.over_matrices:
        rows, cols = weight.shape
        allocated = config.get("allocation", "uniform") != "uniform"
        keep = group.keep(rows, cols, config["sparsity"], matrix.keep // max(1, rows) if allocated else None)
        _check_groups(matrix, group, group.counts(weight), keep, result)


def _check_groups(
    matrix: MatrixReport, group: ComparisonGroup, nonzero: Tensor, keep: int, result: VerifyResult
) -> None:
    over = int((nonzero > keep).sum())
    if not group.plural:
        if over:
            result.problems.append(f"{matrix.name}: {int(nonzero)} non-zeros, more than the {keep} to keep")
        return
    result.rows += len(nonzero)
    result.exact_rows += int((nonzero == keep).sum())
    if over:
        result.problems.append(f"{matrix.name}: {over} of {len(nonzero)} {group.plural} keep more than {keep}")


def _check_allocation(report: PruneReport, result: VerifyResult) -> None:
    """Checks that the matrices keep together what the sparsity asks for; each matrix may keep more or less."""
    budget = sum(
        rows * keep_count(cols, report.config["sparsity"]) for rows, cols in (m.shape for m in report.matrices)
    )
    kept = sum(matrix.keep for matrix in report.matrices)
    if kept != budget:
        result.problems.append(f"model: keeps {kept} weights by its report, and the sparsity asks for {budget}")


def _check_budget(nonzero: int, keep: int, result: VerifyResult) -> None:
    if nonzero > keep:
        result.problems.append(f"model: {nonzero} non-zeros, more than the {keep} to keep")


def _check_loads(folder: str, result: VerifyResult) -> None:
    try:
        model: Any = load_model(folder).model
    except InputError as error:
        result.problems.append(str(error))
        return
    with torch.no_grad():
        logits = model(torch.arange(8)[None] % model.config.vocab_size).logits
    result.loads = bool(torch.isfinite(logits).all())
    if not result.loads:
        result.problems.append("model: logits are not finite")
