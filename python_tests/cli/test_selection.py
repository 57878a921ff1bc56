"""``--exclude`` and ``--include``, and ``plan --list``."""

import argparse
import json
import re

import pytest
from folders import save_dense
from tiny_models import make_model

from ace_ext import InputError
from ace_ext.cli import main as cli
from ace_ext.cli.args import add_selection, skip_from
from ace_ext.models.blocks import find_blocks
from ace_ext.models.patterns import all_but, glob_pattern, globs_of


def skip_of(*arguments):
    parser = argparse.ArgumentParser()
    add_selection(parser, "")
    return skip_from(parser.parse_args(arguments))


def pruned(skip):
    return {block.full_name(child) for block in find_blocks(make_model("llama"), skip) for child in block.linears}


def test_globs_choose_by_the_whole_name():
    every = pruned(())
    assert pruned(skip_of("--exclude", "*.o_proj", "--exclude", "model.layers.0.*")) == {
        name for name in every if not name.endswith(".o_proj") and ".layers.0." not in name
    }
    assert pruned(skip_of("--include", "*.mlp.*")) == {name for name in every if ".mlp." in name}
    assert pruned(skip_of("--include", "*.mlp.*", "--skip", "up_proj")) == {
        name for name in every if ".mlp." in name and "up_proj" not in name
    }
    assert skip_of() == ()


@pytest.mark.parametrize("globs", [["*.typo"], ["*.mlp.*", "*.typo"], ["*.typo", "*.self_attn.*", "*.mlp.*"]], ids=str)
def test_each_glob_chooses_something(globs):
    with pytest.raises(InputError, match=r"^include '\*\.typo' matches no weight of the blocks; ace-prune plan --list"):
        pruned(skip_of(*(word for glob in globs for word in ("--include", glob))))


def test_globs_of_their_regular_expression():
    globs = ["*.mlp.*", "a|b", "layers.?", "c(d)", "[e]+$"]
    found = globs_of(all_but(globs))
    assert list(found) == globs
    assert all(re.search(found[name], name) for name in ("a|b", "layers.?", "c(d)"))
    assert not re.search(found["a|b"], "a")
    assert globs_of(r"k_proj$|v_proj$") == {}
    own = r"^(?!(.*\.(q|k)_proj)$)"  # a user's --skip of the same form
    assert globs_of(own) == {}
    assert {name.rpartition(".")[2] for name in pruned((own,))} == {"q_proj", "k_proj"}


@pytest.mark.parametrize(
    ("glob", "name", "fits"), [("a?c", "abc", True), ("a?c", "abbc", False), ("a.c", "abc", False)]
)
def test_glob_pattern(glob, name, fits):
    assert bool(re.fullmatch(glob_pattern(glob), name)) == fits


def test_plan_lists_every_weight(tmp_path, capsys):
    dense = save_dense(tmp_path / "dense", "qwen2-moe")
    options = ["plan", "--list", "--model", str(dense), "--exclude", "*.q_proj"]
    assert cli.main(options) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert re.fullmatch(r"48x32\s+pruned", lines["model.layers.0.mlp.experts.3.gate_up_proj"])
    assert re.fullmatch(r"4x32\s+dense: router", lines["model.layers.0.mlp.gate.weight"])
    assert re.fullmatch(r"32x32\s+dense: not selected", lines["model.layers.2.self_attn.q_proj.weight"])
    assert cli.main([*options, "--json"]) == 0
    assert {weight["name"] for weight in json.loads(capsys.readouterr().out)} == lines.keys()
