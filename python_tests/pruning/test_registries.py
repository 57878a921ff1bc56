"""A metric, a solver, a comparison group or an output format is added by one entry, which everything else reads."""

import argparse
import json
from dataclasses import dataclass

import pytest
import torch
from folders import command, save_dense
from tiny_models import make_model, make_tokens

from ace_ext import InputError, PruneConfig, SolverConfig, ops, prune_model
from ace_ext.cli.main import build_parser, main
from ace_ext.compare.method_spec import parse_methods
from ace_ext.formats import FORMATS, OutputFormat, register
from ace_ext.models.blocks import find_blocks
from ace_ext.ops import ScoredWeight
from ace_ext.pruning import solvers
from ace_ext.pruning.criteria import METRICS, Metric
from ace_ext.pruning.groups import GROUPS, RowGroup
from ace_ext.pruning.kinds import INPUT
from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.solvers import Problem, Solved, WeightSolver
from ace_ext.runs.memory_model import estimate


def help_of(verb: str) -> str:
    verbs = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return verbs.choices[verb].format_help()


# A metric


@pytest.fixture
def cubed(monkeypatch):
    metric = Metric("|W_ij| ‖X_j‖³", "scaled", frozenset({INPUT}), lambda s, _: s.norm**3)
    monkeypatch.setitem(METRICS, "cubed", metric)


def test_a_metric_is_one_entry(cubed):
    model = make_model("llama")
    report = prune_model(model, make_tokens(), PruneConfig("cubed"))
    assert report.config["metric"] == "cubed"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert "‖X_j‖³" in help_of("run")
    assert PruneConfig("cubed").needs.prune == {INPUT}


# A solver: this class, this function and this entry are what a file of ``pruning/solvers`` holds.


@dataclass(frozen=True)
class ShrinkOptions(Options):
    shrink: float = option(0.5, "what remaining weights are multiplied with", Limits(above=0, words="more than 0"))


def shrink(problem: Problem, options: ShrinkOptions) -> Solved:
    mask = problem.mask
    if mask is None:
        mask = problem.group.mask(ScoredWeight(problem.dense, "magnitude"), problem.keep)
    return Solved(problem.dense.masked_fill(~mask, 0.0) * options.shrink)


@pytest.fixture
def shrinking(monkeypatch):
    monkeypatch.setitem(solvers.SOLVERS, "update", dict(solvers.SOLVERS["update"]))
    solvers.register(
        WeightSolver(
            name="shrink",
            summary="makes remaining weights smaller",
            options=ShrinkOptions,
            groups=("row",),
            solve=shrink,
            working_bytes=lambda rows, cols: 1000 * rows * cols,
        )
    )


def test_a_solver_is_one_file(shrinking):
    model = make_model("llama")
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = prune_model(model, make_tokens(), PruneConfig(update="shrink", shrink=0.25))
    name = "model.layers.0.mlp.down_proj.weight"
    pruned = dict(model.named_parameters())[name]
    assert torch.equal(pruned[pruned != 0], dense[name][pruned != 0] * 0.25)
    assert report.config["shrink"] == 0.25
    assert report.matrices[0].solution.solver == "shrink"
    assert (
        PruneConfig(solver=SolverConfig(update="shrink", options={"shrink": 0.25})).solver.to_dict()["shrink"] == 0.25
    )


def test_help_parsers_and_limits_know_a_new_solver(shrinking):
    text = " ".join(help_of("run").split())
    assert "--shrink SHRINK shrink: what remaining weights are multiplied with (default: 0.5)" in text
    assert "makes remaining weights smaller" in text
    (method,) = parse_methods("shrink:shrink=0.125")
    assert method.config().solver.to_dict()["shrink"] == 0.125
    with pytest.raises(InputError, match=r"shrink must be more than 0 \(got -1.0\)"):
        PruneConfig(update="shrink", shrink=-1.0)
    with pytest.raises(InputError, match="shrink compares within rows"):
        PruneConfig(update="shrink", group="matrix")


def test_the_memory_estimate_asks_a_new_solver(shrinking):
    model = make_model("llama")
    blocks = find_blocks(model)
    arguments = {"nsamples": 8, "seqlen": 16, "offload": False, "process": 0}
    found = estimate(model, blocks, None, PruneConfig(update="shrink"), **arguments)
    assert found.solver >= 1000 * 48 * 32


def test_a_solver_without_memory_is_no_solver():
    with pytest.raises(TypeError, match="working_bytes"):
        WeightSolver(name="lost", summary="", options=ShrinkOptions, groups=("row",), solve=shrink)


def test_names_are_taken_once(shrinking):
    with pytest.raises(ValueError, match="solver 'shrink' is registered already"):
        solvers.register(solvers.SOLVERS["update"]["shrink"])


def test_every_solver_is_a_file_of_its_own():
    files = {module.__name__.rpartition(".")[2] for module in vars(solvers).values() if hasattr(module, "SOLVER")}
    assert {"swaps", "sparsegpt", "admm", "tune"} <= files


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
    assert "row-pair" in help_of("run")


# An output format


class ListOfBlocks:
    """Writes the names of the blocks, and nothing else."""

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
    before = dict(FORMATS)
    register(OutputFormat("list", "the names of the blocks", ListOfBlocks))
    try:
        dense = save_dense(tmp_path / "dense")
        assert main([*command(dense, tmp_path / "out")[3:], "--format", "list"]) == 0
        assert "the names of the blocks" in help_of("run")
    finally:
        FORMATS.clear()
        FORMATS.update(before)
    written = json.loads((tmp_path / "out" / "blocks.json").read_text())
    assert written == {"sparsity": 0.5, "blocks": [f"model.layers.{i}" for i in range(3)]}
    assert (tmp_path / "out" / "ace_report.json").is_file()


def test_an_unknown_format_is_refused_before_work(tmp_path):
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(SystemExit) as end:
        main([*command(dense, tmp_path / "out")[3:], "--format", "nothing"])
    assert end.value.code == 2
