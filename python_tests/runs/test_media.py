"""``ace-prune run`` on a model that reads images, from files."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from folders import call, weights_bytes
from PIL import Image
from transformers import Swinv2Config, Swinv2Model, ViTConfig, ViTModel

from ace_ext import InputError, PruneConfig
from ace_ext.engine.model_shape import ModelShape
from ace_ext.models.blocks import find_blocks
from ace_ext.records import REPORT_NAME, PruneReport
from ace_ext.runs.holdout import measurement_for
from ace_ext.runs.options import InputCalibration, RunOptions, RunRequest

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A small ViT with its processor, and images of noise."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / "images").mkdir()
    for number in range(5):
        noise = torch.randint(256, (9, 12, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(tmp_path / "images" / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RUN = ["run", "--model", "vit", "--output", "new", "--method", "balanced"]


def test_a_folder_of_images_calibrates_a_run(place, capsys):
    assert call(capsys, *RUN, "--calibration", "images", "--nsamples", "4")[0] == 0
    assert call(capsys, "verify", "new")[0] == 0
    report = PruneReport.from_json((place / "new" / REPORT_NAME).read_text())
    assert (report.sparsity, len(report.matrices)) == (0.5, 12)
    status, _, error = call(capsys, *RUN[:4], "fewer", "--calibration", "images")
    assert (status, "calibration 'images' has 5 samples, fewer than nsamples 128" in error) == (0, True)
    fewer = PruneReport.from_json((place / "fewer" / REPORT_NAME).read_text()).extra["calibration"]
    assert fewer["nsamples"] == 5  # all that there are
    calibration = report.extra["calibration"]
    assert (calibration["source"], calibration["nsamples"]) == ("images", 4)
    assert calibration["inputs"] == {"pixel_values": {"shape": [3, 8, 8], "dtype": "float32"}}
    assert (place / "new" / "preprocessor_config.json").read_text() == json.dumps(PROCESSOR)
    command = report.extra["command"].replace("OUTPUT", "again").split()
    assert call(capsys, *command[1:])[0] == 0
    assert weights_bytes(place / "again") == weights_bytes(place / "new")


def test_a_processor_that_does_not_suit_the_model(place, capsys):
    """By a model in memory and by one that is only planned."""
    (place / "vit" / "preprocessor_config.json").write_text(
        json.dumps({**PROCESSOR, "size": {"height": 4, "width": 4}})
    )
    for verb in (RUN, ["plan", "--model", "vit"]):
        status, _, error = call(capsys, *verb, "--calibration", "images", "--nsamples", "2")
        assert (status, error.count("\n")) == (2, 1), error
        assert "calibration inputs do not suit ViTModel (got pixel_values [2, 3, 4, 4]): ValueError" in error
    assert not (place / "new").exists()


def test_a_model_with_other_numbers_of_heads_in_each_stage(place, capsys):
    """The estimate of memory reads them."""
    settings = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    model = Swinv2Model(Swinv2Config(**settings, window_size=2))
    assert ModelShape.of(model, find_blocks(model)).heads == 2
    model.save_pretrained(place / "swin")
    shutil.copy(place / "vit" / "preprocessor_config.json", place / "swin")
    status, _, error = call(capsys, "run", "--model", "swin", *RUN[3:], "--calibration", "images")
    assert status == 0, error


def test_a_model_of_images_is_healed_on_its_calibration(place, capsys):
    assert call(capsys, *RUN, "--calibration", "images", "--nsamples", "4")[0] == 0
    heal = ["heal", "new", "--passes", "3", "--step-tokens", "5", "--learning-rate", "0.01", "--output"]
    status, _, error = call(capsys, *heal, "healed")
    assert status == 0, error
    assert "3 x 4 samples in 9 steps" in error
    report = PruneReport.from_json((place / "healed" / REPORT_NAME).read_text())
    assert report.healing.loss_after <= report.healing.loss_before
    assert report.extra["healing"]["calibration"] == report.extra["calibration"]
    assert call(capsys, "verify", "healed")[0] == 0
    (place / "text.txt").write_text("the quick brown fox " * 100)
    lines = [json.dumps({"image": f"images/{number}.png", "story": "the quick brown fox"}) for number in range(5)]
    (place / "lines.jsonl").write_text("\n".join(lines))
    for options, message in [
        (["--tokens", "100"], "tokens does not go with ViTModel: images has images or sound"),
        (["--seqlen", "8"], "--seqlen is for texts"),
        (["--calibration", "text.txt"], "was calibrated on images or sound"),
        (["--text-field", "story"], "text-field is for .jsonl files"),
        (["--calibration", "lines.jsonl", "--text-field", "story"], "was calibrated on images or sound"),
    ]:
        status, _, error = call(capsys, *heal, "other", *options)
        assert (status, error.count("\n")) == (2, 1), error
        assert message in error
        assert not (place / "other").exists()


def test_agreement_after_healing_is_not_measured_on_what_another_seed_drew(place, capsys):
    for number in range(5, 12):
        shutil.copy(place / "images" / "0.png", place / "images" / f"{number}.png")
    assert call(capsys, *RUN, "--calibration", "images", "--nsamples", "4")[0] == 0
    heal = ["heal", "new", "--step-tokens", "5", "--output"]
    assert call(capsys, *heal, "same")[0] == 0
    assert PruneReport.from_json((place / "same" / REPORT_NAME).read_text()).agreement is not None
    status, _, error = call(capsys, *heal, "other", "--seed", "1")
    assert status == 0
    assert "agreement with the dense model is not measured: another seed" in error
    assert PruneReport.from_json((place / "other" / REPORT_NAME).read_text()).agreement is None


def test_agreement_is_measured_on_files_that_calibration_leaves(place, capsys):
    status, out, error = call(capsys, *RUN, "--calibration", "images", "--nsamples", "4")
    assert status == 0
    assert "images has 5 samples" not in error
    assert "agreement with the dense model is not measured: evaluate: images has fewer than 3 samples" in error
    held = [*RUN, "--calibration", "images", "--nsamples", "2", "--overwrite", "--report", "page.html"]
    status, out, error = call(capsys, *held)
    report = PruneReport.from_json((place / "new" / REPORT_NAME).read_text())
    found = report.agreement
    assert (status, found.samples, found.source) == (0, 3, "images")
    assert 0.5 < found.cosine < 1
    line = f"agreement with the dense model: cosine {found.cosine:.3f}, rank correlation {found.rank_correlation:.3f}"
    assert f"{line} (3 samples of images)" in out
    assert line.replace("agreement", "Agreement", 1) in (place / "page.html").read_text()
    assert f"| {found.cosine:.3f} | {found.rank_correlation:.3f} |" in (place / "new" / "README.md").read_text()
    status, _, _ = call(capsys, *held, "--evaluate", "images")
    assert status == 0
    report = PruneReport.from_json((place / "new" / REPORT_NAME).read_text())
    assert report.agreement.samples == 3  # not those that calibration takes
    assert "--evaluate images" in report.extra["command"]
    status, _, _ = call(capsys, *held, "--evaluate", "never")
    assert "agreement" not in json.loads((place / "new" / REPORT_NAME).read_text())


@pytest.mark.parametrize(
    ("options", "damage", "message"),
    [
        (["--calibration", "images"], lambda place: (place / "images" / "3.png").write_bytes(b"x"), "3.png is not an"),
        (["--calibration", "vit"], None, "vit has no images and no audio files"),
        (["--calibration", "images"], lambda place: (place / "vit/preprocessor_config.json").unlink(), "no processor"),
        (["--calibration", "images", "--seqlen", "8"], None, "--seqlen is for texts, and images has images or sound"),
        (["--calibration", "images", "--evaluate", "bundled"], None, "evaluate must be images or sound"),
        (["--calibration", "bundled"], None, "reads pixel_values .* so text does not calibrate it"),
    ],
    ids=["broken", "none", "no-processor", "seqlen", "evaluate", "text"],
)
def test_what_is_refused(place, capsys, options, damage, message):
    if damage is not None:
        damage(place)
    status, _, error = call(capsys, *RUN, *options)
    assert status == 2
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert not (place / "new").exists()


def test_a_plan_that_would_draw_text_for_a_model_of_images(place, capsys):
    status, _, error = call(capsys, "plan", "--model", "vit", "--method", "wanda", "--calibration", "bundled")
    assert (status, error.count("\n")) == (2, 1)
    assert "so text does not calibrate it" in error  # and not the tokenizer that the model lacks


def test_evaluate_is_refused_where_nothing_reads_it():
    """With a language model that images calibrate."""
    read = InputCalibration("photos", 4, evaluate="other", reader=lambda *_: [])
    request = RunRequest("model", PruneConfig("fast", 0.5), read, RunOptions(), torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"evaluate is for text with this model, and calibration 'photos' is none \(got 'other'\)"
    ):
        measurement_for(request, None, None, None, print)
    request = replace(request, calibration=replace(read, evaluate="auto"))
    assert measurement_for(request, None, None, None, print) is None


def test_a_plan_of_known_size_reads_its_calibration(place, capsys):
    status, _, error = call(capsys, "plan", "--model", "llama-3-8b", "--calibration", "images")
    assert (status, error.count("\n")) == (2, 1)
    assert "needs a model folder with the files of its processor" in error


def test_a_model_in_half_precision(place, capsys):
    """A processor gives float32."""
    ViTModel.from_pretrained("vit", dtype=torch.bfloat16).save_pretrained("vit")
    status, out, error = call(capsys, *RUN, "--calibration", "images", "--nsamples", "2")
    assert status == 0, error
    assert "(3 samples of images)" in out
    assert PruneReport.from_json((place / "new" / REPORT_NAME).read_text()).dtype == "bfloat16"
