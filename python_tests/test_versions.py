"""The oldest transformers is the same wherever it is named, and an older one is refused with words."""

import re
from pathlib import Path

import pytest
from folders import bad_input, save_dense
from tiny_models import make_model, make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models import _transformers
from ace_ext.models._transformers import OLDEST, check_version

ROOT = Path(__file__).parents[1]


def test_the_oldest_is_named_once():
    assert f'"transformers>={OLDEST}"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^transformers=={re.escape(OLDEST)}\.\*$", (ROOT / ".ci/oldest.txt").read_text(), re.M)


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
