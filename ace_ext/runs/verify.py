"""Proof on the written files: sparsity of every matrix, row by row, and that the folder is a model."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

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
    """``problems`` is empty for a sound folder; each entry is one line that names a matrix."""

    folder: str
    matrices: int = 0
    rows: int = 0
    exact_rows: int = 0
    """Rows with exactly k non-zeros (group row): the others kept zeros that the dense weight already held."""
    sparsity: float = 0.0
    loads: bool = False
    problems: list[str] = field(default_factory=list)


def verify(folder: str | Path, load: bool = True) -> VerifyResult:
    """Checks every matrix that the report names against the files: exact counts a row (or group, matrix, model), N:M
    validity, no -0.0, no NaN or infinity; and that transformers loads the folder and computes finite logits.

    Raises:
        InputError: the folder holds no report or no safetensors.
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
        skeleton(folder, shards)  # tells them where experts lie that transformers fuses
    for matrix in report.matrices:
        name = f"{matrix.name}.weight"
        if name not in shards:
            raise InputError(f"{str(folder)!r} has no tensor {name} that its report names")
        yield matrix, shards.read(name)


def _check_matrix(matrix: MatrixReport, weight: Tensor, total: int, config: dict, result: VerifyResult) -> None:
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
    """Matrices may differ in what they keep, but not the model in all."""
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
        model = load_model(folder).model
    except InputError as error:
        result.problems.append(str(error))
        return
    with torch.no_grad():
        logits = model(torch.arange(8)[None] % model.config.vocab_size).logits
    result.loads = bool(torch.isfinite(logits).all())
    if not result.loads:
        result.problems.append("model: logits are not finite")
