"""Runs on the files of networks that are no causal language models."""

from pathlib import Path

import pytest
import torch
from folders import call, weights_bytes
from safetensors.torch import load_file, save_file
from tiny_models import make_tokenizer
from tiny_networks import NETWORKS, make_inputs, make_network
from transformers import CLIPVisionModel

from ace_ext import InputError, PruneConfig, prune_model, register
from ace_ext.cli.heal import request_from
from ace_ext.cli.main import build_parser
from ace_ext.engine.progress import Progress
from ace_ext.grids import Grid
from ace_ext.packed.compressed_tensors import compress
from ace_ext.packed.packing import pack, unpack
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs import network_holdout
from ace_ext.runs.heal import heal_folder
from ace_ext.runs.heal_journal import HealJournal
from ace_ext.runs.options import Calibration, InputCalibration, RunOptions
from ace_ext.runs.pipeline import prune_folder
from ace_ext.runs.plan import make_plan
from ace_ext.runs.verify import verify
from ace_ext.runtime import PackedLinear

PARTS = {"t5": 4, "whisper": 4, "clip": 4, "swin": 3}
"""The blocks of networks with several parts."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """``folder_of(name)``: a saved network, with a tokenizer if it reads text."""
    place = tmp_path_factory.mktemp("networks")

    def folder_of(name):
        folder = place / name
        if not folder.exists():
            make_network(name).save_pretrained(folder)
            if name in ("bert", "t5", "clip"):
                make_tokenizer().save_pretrained(folder)
        return folder

    return folder_of


def prune(folder, output, config=None, progress=None, **options):
    name = folder.name
    read = InputCalibration(f"inputs of {name}", 6, 16, reader=lambda place, text: make_inputs(name))
    config = config or PruneConfig("fast", 0.5)
    return prune_folder(
        str(folder), output, config, read, RunOptions(**options), torch.device("cpu"), progress=progress
    )


class Stops(Progress):
    """Interrupts a run once so many blocks are done."""

    def __init__(self, blocks):
        super().__init__()
        self._left = blocks

    def block(self, block, report):
        super().block(block, report)
        self._left -= 1
        if not self._left:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "offload"), [(name, "none") for name in NETWORKS] + [(name, "disk") for name in PARTS]
)
def test_a_folder_gets_the_weights_of_a_model_in_memory(name, offload, folders, tmp_path):
    report, output = prune(folders(name), tmp_path / "out", offload=offload)
    model = make_network(name)
    prune_model(model, make_inputs(name), PruneConfig("fast", 0.5))
    loaded = type(model).from_pretrained(output).state_dict()
    for own, weight in model.state_dict().items():
        assert torch.equal(loaded[own], weight), own
    found = verify(output)
    assert (found.problems, found.loads, found.matrices) == ([], True, len(report.matrices))
    inputs = report.extra["calibration"]["inputs"]
    assert inputs == {
        key: {"shape": list(x.shape[1:]), "dtype": str(x.dtype).removeprefix("torch.")}
        for key, x in make_inputs(name)[0].items()
    }


@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_tower_whose_files_have_the_prefix_of_its_model(offload, tmp_path):
    """transformers takes the prefix off when it loads such files, and writes it again."""
    tower = make_network("clip").vision_model.config
    with torch.random.fork_rng():
        model = CLIPVisionModel(tower)
    model.save_pretrained(tmp_path / "tower")
    file = tmp_path / "tower" / "model.safetensors"
    stored = {f"vision_model.{name}": weight for name, weight in load_file(file).items()}
    save_file(stored, file, {"format": "pt"})
    inputs = [{"pixel_values": batch["pixel_values"]} for batch in make_inputs("clip")]
    read = InputCalibration("inputs", 6, 16, reader=lambda place, text: inputs)
    options, device = RunOptions(offload=offload), torch.device("cpu")
    _, output = prune_folder(str(tmp_path / "tower"), tmp_path / "out", PruneConfig("fast", 0.5), read, options, device)
    assert load_file(output / "model.safetensors").keys() == stored.keys()
    found = verify(output)
    assert (found.problems, found.loads, found.matrices) == ([], True, 12)
    prune_model(model, inputs, PruneConfig("fast", 0.5))
    loaded = CLIPVisionModel.from_pretrained(output).state_dict()
    assert all(torch.equal(loaded[own], weight) for own, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "method", "offload"),
    [
        ("t5", "fast", "none"),
        ("swin", "fast", "disk"),
        ("clip", "balanced", "none"),
        ("t5", "allocate + wanda + train(epochs=1)", "disk"),
    ],
)
def test_an_interrupted_run_goes_on_in_each_part(name, method, offload, folders, tmp_path):
    config = PruneConfig(method, 0.5)
    _, whole = prune(folders(name), tmp_path / "whole", config, offload=offload)
    output = tmp_path / "out"
    for _ in range(PARTS[name]):
        with pytest.raises(KeyboardInterrupt):
            prune(folders(name), output, config, Stops(1), offload=offload, resume=True)
        assert not output.exists()
    prune(folders(name), output, config, offload=offload, resume=True)
    assert weights_bytes(output) == weights_bytes(whole)


@pytest.mark.parametrize("name", ["t5", "swin", "clip"])
def test_saved_statistics_are_those_of_the_dense_model(name, folders, tmp_path):
    """They serve another sparsity, and give the bytes of the run that saved them."""
    config, file = PruneConfig("wanda", 0.5), tmp_path / "stats"
    _, saved = prune(folders(name), tmp_path / "saved", config, save_stats=file)
    _, again = prune(folders(name), tmp_path / "again", config, stats=file)
    assert weights_bytes(saved) == weights_bytes(again)
    other = PruneConfig("wanda", 0.7)
    _, saved = prune(folders(name), tmp_path / "other", other, save_stats=tmp_path / "other stats")
    _, again = prune(folders(name), tmp_path / "other again", other, stats=file)
    assert weights_bytes(saved) == weights_bytes(again)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_text_calibrates_models_of_text(name, folders, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    text = Calibration(str(tmp_path / "text.txt"), 4, 16)
    config, device = PruneConfig("wanda", 0.5), torch.device("cpu")
    report, output = prune_folder(str(folders(name)), tmp_path / "out", config, text, RunOptions(), device)
    assert verify(output).problems == []
    assert {matrix.tokens for matrix in report.matrices} == {4 * (16 if name == "bert" else 8)}


@pytest.mark.parametrize("name", ["bert", "clip"])
def test_a_distilled_folder_has_the_weights_that_were_trained(name, folders, tmp_path):
    config = PruneConfig("wanda + distill(tokens=500, learning_rate=0.02)", 0.5)
    if name == "bert":  # on other windows of its text
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
        text, device = Calibration(str(tmp_path / "text.txt"), 8, 16), torch.device("cpu")
        report, output = prune_folder(str(folders(name)), tmp_path / "out", config, text, RunOptions(), device)
    else:
        report, output = prune(folders(name), tmp_path / "out", config)
        with pytest.raises(KeyboardInterrupt):
            prune(folders(name), tmp_path / "again", config, Stops(3), resume=True)
        _, again = prune(folders(name), tmp_path / "again", config, resume=True)
        assert weights_bytes(again) == weights_bytes(output)
        model = make_network(name)
        prune_model(model, make_inputs(name), config)
        loaded = type(model).from_pretrained(output).state_dict()
        assert all(torch.equal(loaded[own], weight) for own, weight in model.state_dict().items())
    assert report.healing.loss_after < report.healing.loss_before
    assert verify(output).problems == []


def test_agreement_is_not_measured_on_text_that_the_run_distils_on(folders, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    drawn, load, asked, measured_text = [], Calibration.load, [], network_holdout.measured_text

    def loaded(text, *args, **options):
        drawn.append((text.nsamples, text.seed))
        return load(text, *args, **options)

    monkeypatch.setattr(Calibration, "load", loaded)
    monkeypatch.setattr(
        network_holdout, "measured_text", lambda request, *more: asked.append(request) or measured_text(request, *more)
    )
    text = Calibration(str(tmp_path / "text.txt"), 4, 16, evaluate="auto")
    config = PruneConfig("wanda + distill(tokens=100, learning_rate=0.02)", 0.5)
    report, _ = prune_folder(str(folders("bert")), tmp_path / "out", config, text, RunOptions(), torch.device("cpu"))
    assert report.agreement.source.endswith("between the samples")
    (request,) = asked
    assert drawn == [(4, text.seed), (request.later.nsamples, request.later.seed)]
    assert len(set(drawn)) == 2


REFUSED = {
    "text for images": ("vit", {}, Calibration(), "reads pixel_values .*so text does not calibrate it"),
    "own text": ("t5", {}, Calibration("self", 4, 16), "is an encoder or has one, so it does not predict the next"),
    "text for half of a model": ("clip", {}, Calibration("bundled", 4, 12), "calibration inputs do not suit CLIPModel"),
    "remove": ("t5", {"remove": "neurons=0.2"}, None, "remove takes models of text with one list of blocks"),
    "distill after remove": (
        "bert",
        {"remove": "neurons=0.25", "method": "distill"},
        Calibration("bundled", 4, 16),
        "distill after remove takes models that predict the next token .got BertForSequenceClassification",
    ),
    "zeros and distill after remove": (
        "bert",
        {"remove": "blocks=1", "method": "wanda + distill", "sparsity": 0.5},
        Calibration("bundled", 4, 16),
        "distill after remove takes models that predict the next token",
    ),
    "distill": ("t5", {"method": "best", "sparsity": 0.5}, None, "needs it in memory: leave out --offload disk"),
    "nothing": ("vit", {"sparsity": 0.5}, InputCalibration("x", reader=lambda *_: []), "calibration 'x' holds nothing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_serve_is_refused_before_anything_is_written(case, folders, tmp_path):
    name, config, text, message = REFUSED[case]
    text = text or InputCalibration("x", 6, 16, reader=lambda *_: make_inputs(name))
    options = RunOptions(offload="disk" if case == "distill" else "none")
    with pytest.raises(InputError, match=message):
        prune_folder(str(folders(name)), tmp_path / "out", PruneConfig(**config), text, options, torch.device("cpu"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["bert", "t5", "whisper"])
def test_the_form_of_compressed_tensors_is_refused_before_anything_is_pruned(name, folders, tmp_path):
    """transformers loads it for some classes that are no causal language models, and not for others, such as T5."""
    config, message = PruneConfig("quantize(bits=4)"), "format compressed-tensors is for causal language models"
    with pytest.raises(InputError, match=message):
        prune(folders(name), tmp_path / "out", config, format="compressed-tensors")
    assert not any(tmp_path.iterdir())
    read = InputCalibration("x", 6, 16, reader=lambda *_: make_inputs(name))
    with pytest.raises(InputError, match=message):
        make_plan(str(folders(name)), config, read, RunOptions(format="compressed-tensors"), torch.device("cpu"))
    _, quantized = prune(folders(name), tmp_path / "quantized", config)
    with pytest.raises(InputError, match=message):
        compress(quantized, tmp_path / "packed", Grid(4, 128), [])
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_lists_what_the_run_prunes(name, folders, tmp_path):
    folder, device, config = folders(name), torch.device("cpu"), PruneConfig("fast", 0.5)
    if name in ("bert", "t5"):
        (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
        calibration, tokens = Calibration(str(tmp_path / "text.txt"), 4, 16), 4 * 16
    else:
        calibration = InputCalibration("x", 6, 16, reader=lambda *_: make_inputs(name))
        tokens = {"vit": 17, "dinov2": 17, "swin": 64, "wav2vec2": 19, "clip": 17, "whisper": 10}[name] * 6
    before = weights_bytes(folder)
    plan = make_plan(str(folder), config, calibration, RunOptions(), device)
    report, _ = prune_folder(str(folder), tmp_path / "out", config, calibration, RunOptions(), device)
    assert weights_bytes(folder) == before
    assert sorted((m.name, m.shape, m.keep * m.shape[0]) for m in plan.matrices) == sorted(
        (m.name, m.shape, m.keep) for m in report.matrices
    )
    assert plan.output_bytes == pytest.approx(sum(p.nbytes for p in make_network(name).parameters()), rel=0.01)
    hidden = max(phase.hidden for phase in plan.phases)
    assert hidden % tokens == 0
    assert hidden > 0
    assert ("several lists" in plan.table()) == (name != "bert")
    assert bool(plan.trial) == (name == "bert")
    if name == "bert":
        assert not make_plan(str(folder), PruneConfig("best", 0.5), calibration, RunOptions(), device).trial
    assert (plan.bos is None) == (name not in ("bert", "t5"))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_packed_folder_answers_like_the_dense_one(name, folders, tmp_path):
    _, output = prune(folders(name), tmp_path / "out")
    pack(output, tmp_path / "packed", "bitmap")
    register()
    dense = type(make_network(name)).from_pretrained(output).eval()
    packed = type(dense).from_pretrained(tmp_path / "packed").eval()
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    for batch in make_inputs(name):
        with torch.no_grad():
            wanted, found = dense(**batch), packed(**batch)
        assert wanted.keys() == found.keys()
        for key, value in wanted.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    unpack(tmp_path / "packed", tmp_path / "again")
    assert weights_bytes(tmp_path / "again") == weights_bytes(output)


@pytest.fixture
def pruned(folders, tmp_path, monkeypatch):
    """``prune(name)``: a folder that was pruned by Wanda on a text, in a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 600)

    def make(name):
        text, device = Calibration("bundled", 4, 16), torch.device("cpu")
        prune_folder(str(folders(name)), "out", PruneConfig("wanda", 0.5), text, RunOptions(), device)

    return make


HEAL = ["heal", "out", "--tokens", "400", "--step-tokens", "32", "--learning-rate", "0.02", "--output"]


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_pruned_network_of_text_is_healed(name, pruned, capsys):
    pruned(name)
    before = weights_bytes(Path("out"))
    status, out, _ = call(capsys, *HEAL, "healed", "--report", "page.html")
    assert status == 0
    loss = {"bert": "difference of hidden states", "t5": "KL"}[name]
    assert f"{loss}, held out" in Path("page.html").read_text()
    report = PruneReport.from_json(Path("healed", REPORT_NAME).read_text())
    assert report.healing.loss_after < report.healing.loss_before
    assert report.healing.loss_of == loss
    assert report.agreement.cosine > 0
    assert report.healing.summary() in out
    found = verify("healed")
    assert (found.problems, found.loads) == ([], True)
    dense, old, new = (
        type(make_network(name)).from_pretrained(place).state_dict()
        for place in (report.extra["healing"]["dense"], "out", "healed")
    )
    trained = {f"{matrix.name}.weight" for matrix in report.matrices}
    for weight, value in new.items():
        if weight in trained:
            assert torch.equal(value == 0, old[weight] == 0), weight
            assert not torch.equal(value, old[weight]), weight
        else:
            assert torch.equal(value, dense[weight]), weight
    assert weights_bytes(Path("out")) == before
    command = report.extra["healing"]["command"].replace("OUTPUT", "again").replace("PRUNED", "out").split()
    assert call(capsys, *command[1:])[0] == 0
    assert weights_bytes(Path("again")) == weights_bytes(Path("healed"))


@pytest.mark.parametrize("after", [1, 5, 13])
def test_an_interrupted_healing_of_a_network_goes_on(after, pruned, capsys, monkeypatch):
    """Its state is saved after each step; the run is interrupted in the middle or once all steps are done."""
    pruned("bert")
    assert call(capsys, *HEAL, "whole")[0] == 0
    assert PruneReport.from_json(Path("whole", REPORT_NAME).read_text()).healing.steps == 13
    monkeypatch.setattr(HealJournal, "due", lambda journal: True)
    save, saves = HealJournal.save, []

    def interrupted(journal, tensors=()):
        save(journal, tensors)
        saves.append(journal.notes.get("step"))
        if saves[-1] == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(HealJournal, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heal_folder(request_from(build_parser().parse_args([*HEAL, "healed"])))
    monkeypatch.setattr(HealJournal, "save", save)
    assert call(capsys, *HEAL, "healed", "--resume")[0] == 0
    assert weights_bytes(Path("healed")) == weights_bytes(Path("whole"))
    report, whole = (PruneReport.from_json(Path(place, REPORT_NAME).read_text()) for place in ("healed", "whole"))
    assert (report.healing.checks, report.healing.losses) == (whole.healing.checks, whole.healing.losses)
    assert report.healing.held_out == whole.healing.held_out


def test_an_encoder_without_structures_is_not_healed(folders, tmp_path, capsys):
    config, text, device = PruneConfig(remove="neurons=0.25"), Calibration("bundled", 4, 16), torch.device("cpu")
    prune_folder(str(folders("bert")), tmp_path / "out", config, text, RunOptions(), device)
    assert verify(tmp_path / "out").problems == []
    status, _, error = call(capsys, "heal", tmp_path / "out", "--output", tmp_path / "healed")
    assert (status, error.count("\n")) == (2, 1)
    assert "structures were removed from BertForSequenceClassification; after a removal only models that" in error
    assert not (tmp_path / "healed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--minutes", "1"], "minutes does not go with BertForSequenceClassification"),
        (["--max-memory", "8GB"], "max-memory does not go with BertForSequenceClassification"),
        (["--calibration", "self"], "calibration self does not go with BertForSequenceClassification"),
        (["--dense", "other"], "dense must be the model that was pruned"),
    ],
)
def test_what_does_not_heal_a_network_is_refused(options, message, pruned, capsys):
    pruned("bert")
    if "other" in options:
        torch.manual_seed(1)
        model = make_network("bert")
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight[0] += 1
        model.save_pretrained("other")
        make_tokenizer().save_pretrained("other")
    status, _, error = call(capsys, "heal", "out", "--output", "healed", *options)
    assert (status, error.count("\n")) == (2, 1)
    assert message in error
    assert not Path("healed").exists()
