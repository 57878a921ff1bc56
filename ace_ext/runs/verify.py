"""Verification of a written folder: the sparsity of every row of every matrix, and that transformers can load it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ace_ext.cards import CARD, card_says
from ace_ext.data.requests import vocabulary_of
from ace_ext.dense_weights import NOT_CALLED
from ace_ext.errors import InputError, existing_folder, one_line
from ace_ext.formats import grid_of, table_grids_of, written_shards
from ace_ext.models._transformers import decoder_of, is_left_out, predicts_tokens
from ace_ext.models.blocks import find_blocks
from ace_ext.models.location import ModelLocation
from ace_ext.models.safetensors_files import Shards, all_names, has_safetensors
from ace_ext.models.skeleton import skeleton
from ace_ext.packed.files import PackedShards, is_packed
from ace_ext.packed.packing import check_hashes
from ace_ext.pruning.config import PruneConfig
from ace_ext.pruning.groups import ComparisonGroup, keep_count
from ace_ext.pruning.stages import Allocate
from ace_ext.records import REPORT_NAME, MatrixReport, PruneReport
from ace_ext.runs.output import read_report
from ace_ext.runs.own_files import read_manifest
from ace_ext.runtime import open_model


@dataclass
class VerifyResult:
    """The result of :func:`verify`."""

    folder: str
    matrices: int = 0
    rows: int = 0
    """Groups that were checked: rows, or the groups of a pattern."""
    exact_rows: int = 0
    """Groups with exactly k non-zeros. Others have fewer: the dense weight already had zeros there, or a stage rounded
    kept weights to zero."""
    sparsity: float = 0.0
    loads: bool = False
    """Whether transformers loaded the folder and computed a finite output."""
    removed: list[str] = field(default_factory=list)
    """For each kind of structure that was removed, how many are left by ``config.json``."""
    grid: str = ""
    """The grid of the weights of a method with ``quantize``: bits and columns that share a scale."""
    problems: list[str] = field(default_factory=list)
    """One line each, with the name of the matrix; empty if the folder is valid."""


def verify(folder: str | Path, load: bool = True) -> VerifyResult:
    """Checks a pruned folder: its weights as :func:`verify_weights`, and that its card has their figures. With ``load``
    it also checks that transformers loads the folder and computes a finite output.

    Raises:
        InputError: as :func:`verify_weights`.
    """
    folder = existing_folder(folder)
    result = verify_weights(folder)
    _check_card(Path(folder), result)
    if load:
        _check_loads(str(folder), result, read_report(folder))
    return result


def verify_weights(folder: str | Path) -> VerifyResult:
    """Checks the weights of a pruned folder, one tensor at a time, against its configuration and the settings of its
    run.

    The configuration and the run's ``skip`` give the parameters, their shapes, and the matrices that were pruned. The
    files must hold these parameters and nothing else, all finite. Every matrix must have the zeros that the settings
    ask for per row (or N:M group, matrix, model) or more, none of them -0.0, and as many as the report says. Weights of
    a method with ``quantize`` must be on its grid, also after a distillation, and rounded embeddings on theirs. If
    structures were removed, the configuration must have as many as the report says.

    Raises:
        InputError: the folder has no report that can be read, or no safetensors, or does not give back what was
            packed.
    """
    folder = existing_folder(folder)
    report = read_report(folder)
    config, grid = _settings_of(report, folder), grid_of(report)
    if not is_packed(folder) and not has_safetensors(folder):
        raise InputError(f"{str(folder)!r} has no safetensors; give a folder that ace-prune run wrote")
    shards = written_shards(folder, mapped=False)
    if isinstance(shards, PackedShards):
        check_hashes(shards)
    result = VerifyResult(str(folder), grid=str(grid or ""))
    expected, transposed = _expected(Path(folder), shards, config, report, result)
    reported = {matrix.name: matrix for matrix in report.matrices}
    _check_removed(Path(folder), report, result)
    if report.only_removed:
        return result
    if expected is None:  # the configuration cannot be read; the matrices of the report are checked
        expected = {name: matrix.shape for name, matrix in reported.items()}
    _check_named(expected, reported, result)
    nonzero = size = 0
    for name, shape in expected.items():
        if f"{name}.weight" not in shards:
            continue  # said already
        weight = shards.read(f"{name}.weight")
        if name in transposed:
            weight = weight.T.contiguous()
        if tuple(weight.shape) != tuple(shape) or weight.dim() != 2 or not weight.is_floating_point():
            result.problems.append(f"{name}: {weight.dtype} {list(weight.shape)}, but it should be {list(shape)}")
            continue
        total = int(weight.count_nonzero())
        _check_matrix(name, reported.get(name), weight, total, config, result)
        if grid is not None and grid.recover(weight) is None:
            result.problems.append(f"{name}: not on the grid of {grid}")
        nonzero += total
        size += weight.numel()
    _check_tables(shards, report, result)
    result.sparsity = 1 - nonzero / size if size else 0.0
    if not result.matrices:
        result.problems.append("model: no pruned matrix was found")
    if config.method.allocate is not None:
        _check_allocation(expected, reported, config, result)
    if config.comparison.over_matrices:
        _check_budget(nonzero, keep_count(size, config.sparsity), result)
    return result


def check_unchanged(folder: str | Path) -> None:
    """Checks that the weights of a pruned folder match its report, which what is made of the folder repeats.

    Raises:
        InputError: they do not, or as :func:`verify_weights`.
    """
    problems = verify_weights(folder).problems
    if problems:
        more = f" (and {len(problems) - 1} more, see ace-prune verify)" if len(problems) > 1 else ""
        raise InputError(
            f"folder {str(folder)!r} has changed since ace-prune wrote it: {problems[0]}{more}; prune the dense model "
            "again"
        )


def _settings_of(report: PruneReport, folder: str | Path) -> PruneConfig:
    """The target of a run, and whether blocks differ: everything that the number of zeros depends on. The method is not
    read back, because its scores may be a function."""
    try:
        found = {name: report.config[name] for name in ("pattern", "group", "skip")}
        found["towers"] = report.config.get("towers", ())
        amount = {} if found["pattern"] else {"sparsity": report.config["sparsity"]}
        divided = any(stage.startswith(Allocate.name) for stage in report.config["method"].split(" + "))
        return PruneConfig(f"{Allocate.name} + wanda" if divided else "wanda", **found, **amount)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{Path(folder) / REPORT_NAME} is not a report of ace-prune: {error!r}") from error


def _expected(
    folder: Path, shards: Shards, config: PruneConfig, report: PruneReport, result: VerifyResult
) -> tuple[dict[str, tuple[int, int]] | None, set[str]]:
    """Name and shape of every matrix that the run pruned, by the folder's configuration, or None if that cannot be
    read; and the names of those that are stored as ``[d_in, d_out]``. Checks that the files hold the parameters of the
    configuration, and that these are finite."""
    try:
        model = skeleton(folder, shards, causal=False)
        blocks = find_blocks(model, config.skip, check=False, towers=config.towers)
    except InputError as error:
        result.problems.append(str(error))
        return None, set()
    for own in all_names(model).values():
        stored = shards.stored_name(own)
        if stored is None:
            result.problems.append(f"{own[0]}: missing")
        else:
            _check_parameter(stored, tuple(model.get_parameter(stored).shape), shards, result)
    for name in shards.unread(model):
        if not is_left_out(model, name):
            result.problems.append(f"{name}: not in the model that config.json describes")
    unused = {weight.name for weight in report.dense if weight.reason == NOT_CALLED}  # only a run finds this out
    expected, transposed = {}, set()
    for block in blocks:
        for child, linear in block.linears.items():
            name = block.full_name(child)
            if f"{name}.weight" not in unused:
                expected[name] = (linear.out_features, linear.in_features)
            if block.is_transposed(child):
                transposed.add(name)
    return expected, transposed


def _check_removed(folder: Path, report: PruneReport, result: VerifyResult) -> None:
    """Checks the numbers of structures in the configuration."""
    if not report.removed:
        return
    try:
        settings = ModelLocation(str(folder)).config().get_text_config().to_dict()
    except Exception:  # a damaged configuration can raise anything; it is a problem already
        return
    for record in report.removed:
        value = settings.get(record.setting)
        numbers = set(value) if isinstance(value, list) else {value}
        if isinstance(value, list) and record.kind == "blocks":  # it has an entry for each
            numbers = {len(value)}
        if numbers != {record.after}:
            result.problems.append(f"config.json: {record.setting} is {value}, but the report says {record.after}")
        if not 0 < record.after < record.before:
            result.problems.append(f"the report says that {record.after} of {record.before} {record.kind} are left")
        result.removed.append(f"{record.after} of {record.before} {record.kind}")


def _check_tables(shards: Shards, report: PruneReport, result: VerifyResult) -> None:
    """Checks that the token embedding and the LM head are on their grids, if the run rounded them."""
    grids = table_grids_of(report)
    for table in report.embeddings:
        stored = shards.stored_name(table.names)
        if stored is None:
            result.problems.append(f"{table.names[0]}: missing")
        elif grids[stored].recover(shards.read(stored)) is None:
            result.problems.append(f"{stored}: not on the grid of {grids[stored]}")


def _check_parameter(name: str, shape: tuple[int, ...], shards: Shards, result: VerifyResult) -> None:
    value = shards.read(name)
    if tuple(value.shape) != shape:
        result.problems.append(f"{name}: shape {list(value.shape)}, but config.json says {list(shape)}")
    elif not bool(torch.isfinite(value).all()):
        result.problems.append(f"{name}: holds NaN or infinity")


def _check_named(
    expected: Mapping[str, tuple[int, int]], reported: Mapping[str, MatrixReport], result: VerifyResult
) -> None:
    """Checks that the report has an entry for each pruned matrix, and for no other."""
    for name in sorted(expected.keys() - reported.keys()):
        result.problems.append(f"{name}: not in the report")
    for name in sorted(reported.keys() - expected.keys()):
        result.problems.append(f"{name}: in the report, but not a matrix that the run pruned")
    for name in sorted(expected.keys() & reported.keys()):
        if tuple(expected[name]) != tuple(reported[name].shape):
            result.problems.append(f"{name}: {list(expected[name])}, but the report says {list(reported[name].shape)}")


def _check_matrix(
    name: str,
    reported: MatrixReport | None,
    weight: Tensor,
    total: int,
    config: PruneConfig,
    result: VerifyResult,
) -> None:
    result.matrices += 1
    if bool(((weight == 0) & torch.signbit(weight)).any()):
        result.problems.append(f"{name}: holds -0.0")
    if reported is not None and total != reported.nonzero:
        result.problems.append(f"{name}: {total} non-zeros, but the report says {reported.nonzero}")
    group = config.comparison
    if group.over_matrices:
        return
    rows, cols = weight.shape
    if config.pattern is not None and cols % config.pattern.group_m:
        result.problems.append(f"{name}: its {cols} columns are not in whole groups of {config.pattern.group_m}")
        return
    allocated = None
    if config.method.allocate is not None:
        if reported is None:
            return  # only the report says how many it should keep
        allocated = reported.keep // max(1, rows)
    _check_groups(name, group, group.counts(weight), group.keep(rows, cols, config.sparsity, allocated), result)


def _check_groups(name: str, group: ComparisonGroup, nonzero: Tensor, keep: int, result: VerifyResult) -> None:
    over = int((nonzero > keep).sum())
    if not group.plural:
        if over:
            result.problems.append(f"{name}: {int(nonzero)} non-zeros, more than the {keep} to keep")
        return
    result.rows += len(nonzero)
    result.exact_rows += int((nonzero == keep).sum())
    if over:
        result.problems.append(f"{name}: {over} of {len(nonzero)} {group.plural} keep more than {keep}")


def _check_allocation(
    expected: Mapping[str, tuple[int, int]],
    reported: Mapping[str, MatrixReport],
    config: PruneConfig,
    result: VerifyResult,
) -> None:
    """Checks that the matrices together keep what the sparsity asks for; each matrix may keep more or less."""
    budget = sum(rows * keep_count(cols, config.sparsity) for rows, cols in expected.values())
    kept = sum(matrix.keep for matrix in reported.values())
    if kept != budget:
        result.problems.append(f"model: keeps {kept} weights by its report, and the sparsity asks for {budget}")


def _check_card(folder: Path, result: VerifyResult) -> None:
    """Checks that the model card is there, if the run wrote one, and has the figures of the weights."""
    manifest = read_manifest(folder)
    said = card_says(folder)
    if said is None:
        if manifest is not None and CARD in manifest["files"] and not (folder / CARD).is_file():
            result.problems.append(f"{CARD}: missing")
    elif said != (result.matrices, round(result.sparsity, 6)):
        result.problems.append(
            f"{CARD}: says {said[0]} matrices, {said[1]:.6f} zeros; there are {result.matrices}, {result.sparsity:.6f}"
        )


def _check_budget(nonzero: int, keep: int, result: VerifyResult) -> None:
    if nonzero > keep:
        result.problems.append(f"model: {nonzero} non-zeros, more than the {keep} to keep")


def _check_loads(folder: str, result: VerifyResult, report: PruneReport) -> None:
    try:
        model: Any = open_model(folder, causal=False).model
    except InputError as error:
        result.problems.append(str(error))
        return
    try:
        with torch.no_grad():
            # logits, or the hidden states of a model without a head
            output = next(x for x in model(**_some_inputs(model, report)).to_tuple() if isinstance(x, Tensor))
    except Exception as error:  # whatever the model's code raises, the folder does not work
        result.problems.append(f"model: a forward pass ends in {type(error).__name__}: {one_line(error)}")
        return
    result.loads = bool(torch.isfinite(output).all())
    if not result.loads:
        result.problems.append("model: its output is not finite")


def _some_inputs(model: nn.Module, report: PruneReport) -> dict[str, Tensor]:
    """One sample of what a model reads: a few tokens, or in the shapes that calibration had. A language model that sees
    or hears reads tokens alone too, and a processor says which of them stand for an image."""
    known = vocabulary_of(model) or 8
    calibration = {} if predicts_tokens(model) else report.extra.get("calibration") or {}
    described = calibration.get("inputs") or {}
    inputs: dict[str, Tensor] = {}
    for name, each in described.items():
        dtype: torch.dtype = getattr(torch, each["dtype"])
        values = torch.ones(1, *each["shape"], dtype=dtype)
        ids = name.endswith("input_ids") and values.dim() == 2
        inputs[name] = torch.arange(values.shape[1])[None] % min(known, 8) if ids else values
        if dtype.is_floating_point:
            inputs[name] = values.to(next(model.parameters()).dtype)
    tokens = torch.arange(8)[None] % known
    decoded = {} if decoder_of(model) is None else {"decoder_input_ids": tokens}
    return inputs or {"input_ids": tokens, **decoded}
