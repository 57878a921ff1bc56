"""``ace-prune plan`` says what the run does, and changes nothing."""

import json
import shutil

import every_class
import pytest
import torch
from folders import Tokens, prune, save_dense
from tiny_models import make_model, make_tokenizer

from ace_ext import InputError, PruneConfig
from ace_ext.cli.main import main
from ace_ext.models.blocks import find_blocks
from ace_ext.runs.dry_run import RandomWeights
from ace_ext.runs.options import Calibration, RunOptions, RunRequest
from ace_ext.runs.plan import CARD, make_plan, planned_matrices
from ace_ext.runs.shapes_only import KNOWN_SIZES, open_for_plan


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_dense(tmp_path_factory.mktemp("plan") / "dense")


def plan_of(dense, options=None, source=None, dtype="auto", **config):
    calibration = Calibration(source or str(dense.parent / "text.txt"), nsamples=8, seqlen=16)
    run = RunOptions(**(options or {}))
    return make_plan(
        str(dense), PruneConfig(**{"method": "wanda", **config}), calibration, run, torch.device("cpu"), dtype
    )


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "kind", ["gemma3n_text", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("reformer", "xlm"))]
)
def test_a_model_that_is_not_walked_block_by_block(tmp_path, kind):
    """Its blocks cannot be tried one by one. The time is then not known, and all else is."""
    every_class.build(kind, torch.bfloat16).save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    given, config = Tokens(source="tokens", nsamples=8, seqlen=16), PruneConfig("wanda")
    plan = make_plan(str(tmp_path / "dense"), config, given, RunOptions(), torch.device("cpu"))
    report, _ = prune(tmp_path / "dense", tmp_path / "out", {}, {"source": "tokens"})
    assert plan.untried == f"for a model that cannot be walked block by block: {report.whole_forwards}"
    assert {matrix.name for matrix in plan.matrices} == {matrix.name for matrix in report.matrices}
    with pytest.raises(InputError, match=r"cannot be walked block by block: .*; leave out --offload disk$"):
        make_plan(str(tmp_path / "dense"), config, given, RunOptions(offload="disk"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"method": "collect(batch_tokens=32) + wanda"}, {}),
        ({"pattern": "2:4"}, {}),
        ({"method": "cosp", "group": "model"}, {}),
        ({}, {"offload": "disk"}),
        ({"method": "collect(batch_tokens=32) + wanda"}, {"offload": "disk"}),
    ],
)
def test_says_what_the_run_keeps_and_changes_nothing(dense, tmp_path, config, options):
    before = snapshot(dense.parent)
    plan = plan_of(dense, options, **config)
    assert snapshot(dense.parent) == before
    report, _ = prune(dense, tmp_path / "out", options, **config)
    assert [m.name for m in plan.matrices] == [m.name for m in report.matrices]
    assert [m.shape for m in plan.matrices] == [m.shape for m in report.matrices]
    if config.get("group") == "model":
        assert {m.keep for m in plan.matrices} == {sum(m.nonzero for m in report.matrices)}
    else:
        kept = [m.keep * m.shape[0] * m.shape[1] // m.group_size for m in plan.matrices]
        assert kept == [m.keep for m in report.matrices]
    assert plan.offload == bool(options)
    assert plan.peak.total == max(phase.total for phase in plan.phases)
    assert all(seconds >= 0 for seconds in plan.seconds.values())


@pytest.mark.parametrize(
    ("config", "group", "size", "keep"),
    [
        ({"sparsity": 0.25}, "row", 32, 24),
        ({"pattern": "1:4"}, "1:4", 4, 1),
        ({"group": "matrix"}, "matrix", 1024, 512),
        ({"group": "model"}, "model", 3 * (2 * 1024 + 2 * 512 + 3 * 1536), 11520),
    ],
)
def test_groups(config, group, size, keep):
    first = planned_matrices(find_blocks(make_model("llama")), PruneConfig(**{"method": "wanda", **config}))[0]
    assert (first.group, first.group_size, first.keep) == (group, size, keep)


def test_bytes_are_those_of_the_files(dense):
    """Untied bfloat16: read twice (copied, then used), written once whole and once by blocks, and hidden states."""
    plan = plan_of(dense)
    model = make_model("llama", torch.bfloat16)
    whole = sum(p.nbytes for p in model.parameters())
    inside = sum(p.nbytes for p in model.model.layers.parameters())
    (file,) = dense.glob("*.safetensors")
    assert plan.read_bytes == file.stat().st_size + whole
    assert plan.write_bytes == whole + inside + 4 * (8 * 16 * 32 * 2)


@pytest.mark.parametrize(("batch_tokens", "passes"), [(128, 1), (64, 6)])
def test_hidden_states_on_the_disk_are_read_once_a_pass(dense, monkeypatch, batch_tokens, passes):
    """Sequential order by stages: one look at the order, 4 stages (q k v, o, gate up, down), and one to go on."""
    resident = plan_of(dense, method=f"collect(batch_tokens={batch_tokens}) + wanda")
    monkeypatch.setattr("ace_ext.runs.model_source.Demand.hidden_fits", lambda _: False)
    plan = plan_of(dense, method=f"collect(batch_tokens={batch_tokens}) + wanda")
    assert plan.read_bytes - resident.read_bytes == 3 * passes * 8 * 16 * 32 * 2


def test_auto_offloads_where_all_does_not_fit(dense, monkeypatch):
    monkeypatch.setattr("ace_ext.runs.model_source.available_bytes", lambda _: 1)
    assert plan_of(dense).offload
    assert not plan_of(dense, {"offload": "none"}).offload


def test_a_changed_dtype_is_loaded_not_mapped(dense):
    plan = plan_of(dense, dtype="float32")
    assert plan.dtype == "float32"
    assert "load" in {phase.phase for phase in plan.phases}
    assert "load" not in {phase.phase for phase in plan_of(dense).phases}


def test_tied_weights_stay_tied(tmp_path):
    plan = plan_of(save_dense(tmp_path / "tied", "llama-tied"), dtype="float32")
    model = make_model("llama-tied")
    assert plan.peak.model == sum(p.nbytes for p in model.parameters())


def test_text_of_the_models_own_is_planned_not_written(dense):
    plan = plan_of(dense, source="self")
    assert plan.seconds["text"] > 0
    assert "text" in {phase.phase for phase in plan.phases}


@pytest.mark.parametrize(("nsamples", "seqlen"), [(1, 2), (1, 16), (2, 3)])
def test_the_smallest_calibration(dense, nsamples, seqlen):
    calibration = Calibration(str(dense.parent / "text.txt"), nsamples=nsamples, seqlen=seqlen)
    for batch_tokens in (1, 100):
        config = PruneConfig(f"collect(batch_tokens={batch_tokens}) + wanda")
        plan = make_plan(str(dense), config, calibration, RunOptions(), torch.device("cpu"))
        assert plan.seconds["blocks"] > 0


def test_offload_needs_files_that_can_be_used_as_they_are(dense):
    with pytest.raises(InputError, match=r"offload disk needs safetensors .* in dtype float32"):
        plan_of(dense, {"offload": "disk"}, dtype="float32")


def test_too_little_memory_is_refused_as_by_the_run(dense):
    with pytest.raises(InputError, match="max-memory must be at least"):
        plan_of(dense, {"max_memory": 1000, "offload": "disk"})


def test_random_weights_have_the_models_shapes():
    model = make_model("llama-tied", torch.bfloat16)
    weights = RandomWeights(model)
    assert "lm_head.weight" in weights
    assert "model.rotary_emb.inv_freq" not in weights
    found = weights.read("model.layers.0.mlp.down_proj.weight")
    assert (found.shape, found.dtype) == ((32, 48), torch.bfloat16)
    assert found.float().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(found, weights.read("model.layers.0.mlp.down_proj.weight"))
    assert weights.stored_name(["unknown", "lm_head.weight"]) == "lm_head.weight"
    assert weights.stored_name(["unknown"]) is None


@pytest.mark.parametrize("large", [True, False])
def test_a_long_trial_is_said(large, dense, monkeypatch, capsys):
    monkeypatch.setattr("ace_ext.runs.plan.LARGE_BLOCK", 1 if large else 2**24)
    arguments = ["plan", "--model", str(dense), "--calibration", str(dense.parent / "text.txt"), "--seqlen", "16"]
    assert main([*arguments, "--nsamples", "4"]) == 0
    assert ("ace-prune: pruning one block of " in capsys.readouterr().err) == large
    assert main([*arguments, "--nsamples", "4", "--quiet"]) == 0
    assert not capsys.readouterr().err


def test_command(dense, capsys):
    arguments = ["plan", "--model", str(dense), "--calibration", str(dense.parent / "text.txt")]
    arguments += ["--nsamples", "4", "--seqlen", "16"]
    assert main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["peak_memory_bytes"] == plan["phases"][plan["peak_phase"]]["total"]
    assert len(plan["matrices"]) == 21
    assert plan["matrices"][0]["keep"] == 16
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "model.layers.*.mlp.down_proj" in printed
    assert "24 of 48" in printed
    assert "3 blocks, 21 matrices; weights all in memory, hidden states in memory" in printed


# --- models without files ---------------------------------------------------------------------------------------------


def request_for(model):
    return RunRequest(str(model), PruneConfig(), Calibration(), RunOptions(), torch.device("cpu"))


PUBLISHED_COUNTS = {
    "smollm2-135m": 134_515_008,
    "llama-3.2-1b": 1_235_814_400,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "gemma-3-4b": 3_880_263_168,
}
"""Parameters of each model, as its page on the hub counts them (Gemma: of the text part)."""


@pytest.mark.parametrize("name", [*KNOWN_SIZES])
def test_known_sizes_have_the_published_number_of_parameters(name):
    model = open_for_plan(request_for(name)).model
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_COUNTS[name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_folder_with_a_configuration_alone(dense, tmp_path):
    """The plan has the shapes, bytes and zeros of the plan with files; memory is estimated, and time extrapolated."""
    shutil.copy(dense / "config.json", tmp_path)
    for options, config in (({}, {"sparsity": 0.25}), ({"offload": "disk"}, {"pattern": "2:4"})):
        known, bare = (
            plan_of(dense, options, **config),
            plan_of(tmp_path, options, str(dense.parent / "text.txt"), **config),
        )
        assert bare.matrices == known.matrices
        assert (bare.blocks, bare.output_bytes, bare.offload) == (known.blocks, known.output_bytes, known.offload)
        assert bare.write_bytes == known.write_bytes
        measuring = bare.output_bytes if options else 0  # one pass to choose the BOS token, which is undecided
        assert bare.read_bytes == pytest.approx(known.read_bytes + measuring, rel=0.1)  # the files have headers
        assert bare.output_bytes < bare.need["offload"] < bare.need["whole"] < CARD
        assert set(bare.seconds) == {"load", "text", "blocks"}
        assert "one block with random weights" in bare.table()
        assert "fits 24 GB" in bare.table()
        assert not known.need
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_distillation_is_planned_from_a_configuration_alone(dense, tmp_path):
    """Its time has the parts of the plan with files, except for reading them."""
    shutil.copy(dense / "config.json", tmp_path)
    method, text = "better(tokens=64)", str(dense.parent / "text.txt")
    bare, known = plan_of(tmp_path, source=text, method=method), plan_of(dense, method=method)
    assert bare.seconds.keys() == known.seconds.keys() - {"files"} == {"load", "text", "blocks", "distill"}
    assert bare.seconds["distill"] > 0


def test_time_is_not_known_where_no_block_fits(tmp_path, dense, monkeypatch):
    shutil.copy(dense / "config.json", tmp_path)
    monkeypatch.setattr("ace_ext.runs.plan.available_bytes", lambda: 1000)
    plan = plan_of(tmp_path, source="self")
    assert "time: not known without the model's files" in plan.table()
    assert json.loads(plan.to_json())["seconds"] == {"total": None}


def test_the_plan_of_a_large_model(monkeypatch, capsys):
    """Its weights alone take more than the card has; one block at a time takes less."""
    monkeypatch.setattr("ace_ext.runs.plan.available_bytes", lambda: 10**9)
    assert main(["plan", "--model", "Llama-3-70B", "--json", "--offload", "none"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["need"]["whole"] > 141e9
    assert plan["need"]["offload"] < CARD
    assert plan["output_bytes"] == 2 * PUBLISHED_COUNTS["llama-3-70b"]
    assert len(plan["matrices"]) == 7 * 80


def test_weights_of_a_known_size_are_listed(capsys):
    assert main(["plan", "--model", "smollm2-135m", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "model.layers.29.mlp.down_proj" in printed
    assert "lm_head" not in printed


def test_a_name_that_is_no_size(capsys):
    assert main(["plan", "--model", "llama-3-9b"]) == 2
    error = capsys.readouterr().err
    assert "plan also takes the name of a size: smollm2-135m" in error
    assert error.count("\n") == 1


def test_a_text_that_the_distillation_would_refuse(dense, tmp_path):
    """Its windows are drawn as a run draws them: of this text all are like those that are held out."""
    text = tmp_path / "text.txt"
    text.write_text("fox " * 400)
    method = "wanda + distill(tokens=64)"
    words = r"^tokens: each of the \d+ windows shares text with .* that are held out"
    with pytest.raises(InputError, match=words):
        prune(dense, tmp_path / "out", {}, {"source": str(text)}, method=method)
    with pytest.raises(InputError, match=words):
        plan_of(dense, source=str(text), method=method)


def test_experts_that_few_tokens_do_not_reach(tmp_path):
    """A run compares matrices and reads all tokens; the trial's few are no reason to refuse it."""
    dense = save_dense(tmp_path / "dense", "olmoe")
    settings, amount = {"method": "allocate + wanda", "sparsity": 0.3}, {"nsamples": 64, "seqlen": 8}
    assert prune(dense, tmp_path / "out", {}, amount, **settings)[0].blocks
    text = Calibration(str(tmp_path / "text.txt"), **amount)
    plan = make_plan(str(dense), PruneConfig(**settings), text, RunOptions(), torch.device("cpu"))
    assert not plan.seconds
    assert "time: not known for a mixture whose matrices are compared with each other" in plan.table()


def test_skipped_matrices_of_neurons_that_are_removed(dense):
    plan = plan_of(dense, remove="neurons=0.34(multiple=8)", sparsity=0.5, skip=(r"down_proj$",))
    assert plan.removed[0].kind == "neurons"
    assert not any(matrix.name.endswith("down_proj") for matrix in plan.matrices)
