"""Structures of every causal-LM class are removed, and plain transformers loads the result; or it is refused in words.

pytest -s -m nightly python_tests/structures/test_every_class.py
"""

from contextlib import ExitStack

import every_class
import pytest
import torch
from class_checks import built
from tiny_models import make_tokens

from ace_ext import InputError, prune_model
from ace_ext.models._transformers import plain_call
from ace_ext.models.blocks import find_blocks
from ace_ext.structures import units

REMOVED = {
    "neurons=0.25": {
        *("gemma3_text", "gpt-sw3", "opt", "phi3", "qwen2", "gpt_neo", "gpt_neox", "big_bird", "exaone"),
        *("deepseek_v3", "gpt_oss", "jamba", "llama4", "qwen3_moe"),
        *("got_ocr2", "rwkv"),
    },
    "heads=0.5": {"gemma4", "gpt_oss", "qwen3", "mixtral"},
    "experts=0.5": {"deepseek_v3", "gpt_oss", "qwen3_moe", "jamba"},
}
"""Classes that must not be refused: gated and plain, fused and transposed matrices, with and without biases; attention
with norms and sinks; routers of several kinds; a language part whose attention has other code than the vision part."""
NEWER = {"exaone"}
"""Classes that the oldest transformers of pyproject.toml does not have."""
SLOW = [pytest.mark.nightly]


def test_the_names_are_those_of_classes():
    assert {*every_class.model_types()} >= set().union(*REMOVED.values()) - NEWER


def states_of_walk(monkeypatch):
    """The hidden states ``[batch, seqlen, d_model]`` after each block in a walk that removes units: a list that the
    walk fills."""
    passed, advance = [], units._Walk.advance

    def noted(walk, index):
        advance(walk, index)
        passed.append(torch.cat(walk._states))

    monkeypatch.setattr(units._Walk, "advance", noted)
    return passed


def outputs_of_blocks(model, tokens):
    """The same of a forward of the model."""
    found = []

    def note(module, _, output):
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks, torch.no_grad():
        for block in find_blocks(model, max_dense=1.0):
            hooks.callback(block.module.register_forward_hook(note).remove)
        model(input_ids=tokens, **plain_call(model))
    return found


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param(part, kind, marks=[] if kind in REMOVED[part] else SLOW)
        for part in REMOVED
        for kind in every_class.model_types()
    ],
)
def test_it_is_removed_and_loaded_again_or_refused(part, kind, tmp_path, monkeypatch):
    model = built(lambda: every_class.build(kind), kind in REMOVED[part])
    tokens = make_tokens(8, 16)
    passed = states_of_walk(monkeypatch)
    try:
        report = prune_model(model, tokens, remove=part)
    except InputError as error:
        print(f"{part} {kind:<28} refused  {error}")
        assert kind not in REMOVED[part]
        return
    for found, expected in zip(passed, outputs_of_blocks(model, tokens) if passed else [], strict=True):
        torch.testing.assert_close(found, expected.view_as(found))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (each(input_ids=tokens, use_cache=False).logits for each in (model, again))
    print(f"{part} {kind:<28} removed  {report.removed[0].summary()}")
    assert "attention" not in report.removed[0].setting or part.startswith("heads")
    stored = again.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, expected)  # kernels may round differently at other addresses
