"""The oldest releases are the same wherever they are named, and an older transformers is refused with words."""

import re
from pathlib import Path

import pytest
from folders import bad_input, save_dense
from packaging.utils import canonicalize_name
from project.test_supply import list_of, requirements
from tiny_models import make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models import _transformers
from ace_ext.models._transformers import OLDEST, check_version

ROOT = Path(__file__).parents[2]


def test_the_oldest_transformers_is_that_of_pyproject():
    assert f'"transformers>={OLDEST}"' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_of_each_dependency_is_tried():
    """What pyproject.toml allows and what ``make test-oldest`` installs begin with the same numbers."""
    allowed = {canonicalize_name(r.name): r.specifier for r in requirements(list_of("dependencies"))}
    tried = {canonicalize_name(r.name): r.specifier for r in requirements((ROOT / ".ci/oldest.txt").read_text())}
    least = {name: next(iter(specifier)) for name, specifier in allowed.items() if specifier}
    assert {bound.operator for bound in least.values()} == {">="}
    pins = {name: next(iter(specifier)).version.removesuffix(".*").split(".") for name, specifier in tried.items()}
    assert {name: pin[: least[name].version.count(".") + 1] for name, pin in pins.items()} == {
        name: bound.version.split(".") for name, bound in least.items()
    }


def test_torch_is_the_same_for_the_build():
    (build,) = (r for r in requirements(list_of("requires")) if r.name == "torch")
    (run,) = (r for r in requirements(list_of("dependencies")) if r.name == "torch")
    assert str(build) == str(run)
    assert f"'{run}'" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("version", ["5.16.0", "5.16.1.dev0", "5.17.0rc1", "5.100.0", "6.0.0"])
def test_new_enough(version, monkeypatch):
    monkeypatch.setattr(_transformers, "version", lambda _: version)
    check_version()


@pytest.mark.parametrize("version", ["4.56.2", "5.2.0", "5.15.3"])
def test_too_old(version, monkeypatch, tmp_path, capsys):
    dense, model = save_dense(tmp_path / "dense"), make_model("llama")
    monkeypatch.setattr(_transformers, "version", lambda _: version)
    expected = f"transformers {version} is too old: ace_ext needs {OLDEST}; pip install -U transformers"
    with pytest.raises(InputError, match=re.escape(expected)):
        prune_model(model, make_tokens())
    for verb in ("run", "plan", "eval"):
        assert expected in bad_input(capsys, verb, dense)
