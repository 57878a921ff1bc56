"""One entry adds a metric, a stage, a comparison group or an output format; everything else reads it."""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from folders import command, save_dense
from tiny_models import make_model, make_tokens

from ace_ext import InputError, PruneConfig, ops, prune_model
from ace_ext.cli.main import build_parser, main
from ace_ext.formats import FORMATS, OutputFormat, register
from ace_ext.models.blocks import find_blocks
from ace_ext.ops import ScoredWeight
from ace_ext.pruning import method, stages
from ace_ext.pruning.groups import GROUPS, RowGroup
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.metrics import METRICS, Metric
from ace_ext.pruning.settings import Limits, option
from ace_ext.pruning.stages import Problem, Solve, Solved
from ace_ext.runs.memory_model import estimate


def help_all_of(verb: str) -> str:
    verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices[verb].format_help_all()


# A metric


@pytest.fixture
def cubed(monkeypatch):
    metric = Metric("|W_ij| ‖X_j‖³", "scaled", frozenset({INPUT}), lambda s, _: s.norm**3)
    monkeypatch.setitem(METRICS, "cubed", metric)


def test_a_metric_is_one_entry(cubed):
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig("cubed"))
    assert report.config["method"] == "cubed"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert "‖X_j‖³" in help_all_of("run")
    assert PruneConfig("cubed").needs.prune == {INPUT}


# A stage: this class and ``STAGE = Shrink`` are what a file of ``pruning/stages`` holds.


@dataclass(frozen=True)
class Shrink(Solve):
    name = "shrink"
    summary = "makes remaining weights smaller"
    groups = ("row",)

    factor: float = option(0.5, "what remaining weights are multiplied with", Limits(above=0, words="more than 0"))

    def solve(self, problem: Problem) -> Solved:
        mask = problem.mask
        if mask is None:
            mask = problem.group.mask(ScoredWeight(problem.dense, "magnitude"), problem.keep)
        return Solved(problem.dense.masked_fill(~mask, 0.0) * self.factor)

    def working_bytes(self, rows: int, cols: int) -> int:
        return 1000 * rows * cols


@pytest.fixture
def shrinking(monkeypatch):
    monkeypatch.setattr(stages.STAGES, "_loaders", dict(stages.STAGES._loaders))
    stages.register(Shrink)


def test_a_stage_is_one_file(shrinking):
    model = make_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune_model(model, make_tokens(), method="shrink(factor=0.25)")
    name = "model.layers.0.mlp.down_proj.weight"
    pruned = dict(model.named_parameters())[name]
    assert torch.equal(pruned[pruned != 0], dense[name][pruned != 0] * 0.25)
    assert report.config["method"] == "shrink(factor=0.25)"
    assert report.matrices[0].solution.solver == "shrink"
    assert method.method_of(Shrink(0.25)) == method.parse("shrink(factor=0.25)")


def test_help_parsers_and_limits_know_a_new_stage(shrinking):
    text = " ".join(help_all_of("run").split())
    assert "shrink makes remaining weights smaller" in text
    assert "factor: what remaining weights are multiplied with (default: 0.5)" in text
    first, second = method.parse_list("shrink(factor=0.125); wanda + swaps + shrink")
    assert (first.stages, second.stages[2:]) == ((Shrink(0.125),), (Shrink(),))
    with pytest.raises(InputError, match=r"wanda has no option factor: factor is an option of shrink, as in shrink\("):
        PruneConfig("wanda(factor=1)")
    with pytest.raises(InputError, match=r"factor must be more than 0 \(got -1.0\)"):
        PruneConfig("shrink(factor=-1)")
    with pytest.raises(InputError, match=r"shrink compares within a row \(got group 'matrix'\); use group row"):
        PruneConfig("shrink", group="matrix")


def test_the_memory_estimate_asks_a_new_stage(shrinking):
    model = make_model("llama")
    blocks = find_blocks(model)
    arguments = {"nsamples": 8, "seqlen": 16, "offload": False, "process": 0}
    found = estimate(model, blocks, None, PruneConfig("shrink"), **arguments)
    assert found.solver >= 1000 * 48 * 32


def test_names_are_taken_once(shrinking):
    with pytest.raises(ValueError, match="stage 'shrink' is registered already; choose another name"):
        stages.register(Shrink)


def test_every_stage_is_a_file_of_its_own():
    files = [path for path in Path(stages.__file__).parent.glob("*.py") if not path.name.startswith("_")]
    assert sorted(name.replace("-", "_") for name in stages.STAGES) == sorted(path.stem for path in files)
    for stage in stages.STAGES.values():
        assert stage.__module__ == f"ace_ext.pruning.stages.{stage.name.replace('-', '_')}"


def test_a_run_imports_only_its_stages_and_its_format(tmp_path):
    dense = save_dense(tmp_path / "dense")
    program = f"""
import sys
from ace_ext.cli.main import main
assert main({[*command(dense, tmp_path / "out")[3:], "--quiet"]!r}) == 0
print("imported", *sorted(name for name in sys.modules if name.startswith("ace_ext.")))
"""
    child = [sys.executable, "-c", program]
    lines = subprocess.run(child, cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    imported = lines[-1].split()[1:]
    for package, used in (("pruning.stages", {"collect", "score"}), ("engine.strategies", {"one_forward"})):
        prefix = f"ace_ext.{package}."
        found = {name.removeprefix(prefix) for name in imported if name.startswith(prefix)}
        assert {name for name in found if not name.startswith("_")} == used
    assert not [name for name in imported if name.startswith(("ace_ext.packed", "ace_ext.healing"))]


# A comparison group


def test_a_group_is_one_class(monkeypatch):
    class PairOfRows(RowGroup):
        name, summary, plural = "row-pair", "two rows at a time", "pairs of rows"

        def size(self, rows: int, cols: int) -> int:
            return 2 * cols

        def budget(self, rows, cols, sparsity, keep_row=None):
            return rows // 2 * self.keep(rows, cols, sparsity, keep_row)

        def prune_(self, scored, keep):
            mask = ops.topk_mask(scored.weight.view(-1, 2 * scored.weight.shape[1]), "magnitude", keep)
            scored.weight.mul_(mask.view_as(scored.weight))

        def counts(self, weight):
            return weight.view(-1, 2 * weight.shape[1]).count_nonzero(dim=1)

    monkeypatch.setitem(GROUPS, "row-pair", PairOfRows())
    model = make_model("llama")
    prune_model(model, make_tokens(), PruneConfig("magnitude", group="row-pair", sparsity=0.25))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert set(GROUPS["row-pair"].counts(weight).tolist()) == {48}
    assert "row-pair" in help_all_of("run")


# An output format


class ListOfBlocks:
    """Writes only the names of the blocks."""

    def __init__(self, folder):
        self.file = folder / "blocks.json"

    def lay_out(self, dense):
        dense.model.config.save_pretrained(self.file.parent)
        self.file.write_text("[]")

    def check(self, dense):
        pass

    def write(self, block):
        self.file.write_text(json.dumps([*json.loads(self.file.read_text()), block.name]))

    def finish(self, report):
        self.file.write_text(json.dumps({"sparsity": report.sparsity, "blocks": json.loads(self.file.read_text())}))

    def written(self, block):
        return str(block.name in json.loads(self.file.read_text()))

    def rest(self, blocks):
        return {"config.json": (self.file.parent / "config.json").read_text()}


def test_a_format_is_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(FORMATS, "_loaders", dict(FORMATS._loaders))
    register(OutputFormat("list", "the names of the blocks", ListOfBlocks))
    dense = save_dense(tmp_path / "dense")
    assert main([*command(dense, tmp_path / "out")[3:], "--format", "list"]) == 0
    assert "the names of the blocks" in help_all_of("run")
    written = json.loads((tmp_path / "out" / "blocks.json").read_text())
    assert written == {"sparsity": 0.5, "blocks": [f"model.layers.{i}" for i in range(3)]}
    assert (tmp_path / "out" / "ace_report.json").is_file()


def test_an_unknown_format_is_refused_before_work(tmp_path):
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(SystemExit) as end:
        main([*command(dense, tmp_path / "out")[3:], "--format", "nothing"])
    assert end.value.code == 2
