"""The text in this package: its parts, its notice, and how it was made."""

import subprocess
import sys
from importlib import resources

import pytest
from helpers import ROOT, script

from ace_ext.data.bundled import KINDS, bundled_text
from ace_ext.data.corpora import SMALL_SOURCES, load_text
from ace_ext.runs.options import Calibration

TOOL = ROOT / "tools" / "make_bundled.py"


@pytest.fixture(scope="module")
def tool():
    return script("tools/make_bundled.py")


def lines_of(documents: list[str]) -> set[str]:
    """Lines that are long enough to tell documents apart."""
    return {line for document in documents for line in document.splitlines() if len(line) > 80}


def test_it_is_the_default_text():
    assert Calibration().source == "bundled"


def test_each_kind_has_text_in_both_parts(tool):
    for kind in KINDS:
        for split, size in zip(tool.SPLITS, tool.SIZES[kind], strict=True):
            assert size <= sum(map(len, bundled_text(split, kind))) < size + 12_000, (kind, split)
    assert bundled_text("calibration") == [text for kind in KINDS for text in bundled_text("calibration", kind)]
    assert load_text("bundled", "held-out") == bundled_text("held-out")


def test_nothing_is_in_both_parts():
    calibration, held_out = bundled_text("calibration"), bundled_text("held-out")
    assert len({*calibration, *held_out}) == len(calibration) + len(held_out)
    assert len(lines_of(calibration) & lines_of(held_out)) < 5  # a licence or a heading


@pytest.mark.network
@pytest.mark.parametrize("source", [name for name in SMALL_SOURCES if name != "bundled"])
def test_it_shares_nothing_with_the_texts_for_evaluation(source):
    others = lines_of(load_text(source, "calibration")) | lines_of(load_text(source, "held-out"))
    assert not lines_of(bundled_text("calibration") + bundled_text("held-out")) & others


def test_the_notice_names_each_source(tool):
    folder = resources.files("ace_ext.data").joinpath("texts")
    assert tool.rows() in folder.joinpath("NOTICE.md").read_text()
    licences = folder.joinpath("LICENSE").read_text()
    for package in tool.PACKAGES.values():
        name = package.requirement.replace("==", " ")
        assert (f"{name}: LICENSE" in licences) == package.licence.startswith("BSD")


@pytest.mark.network
@pytest.mark.nightly
def test_it_can_be_made_again(tmp_path):
    subprocess.run([sys.executable, TOOL, tmp_path, "--check"], check=True, timeout=600)
