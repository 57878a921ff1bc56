"""Neurons of every causal-LM class are removed, and plain transformers loads the result; or they are refused in words.

pytest -s -m nightly python_tests/structures/test_every_class.py
"""

import every_class
import pytest
import torch
from tiny_models import make_tokens

from ace_ext import InputError, prune_model

REMOVED = {"gemma3_text", "gpt-sw3", "opt", "phi3", "qwen2", "gpt_neox", "big_bird", "exaone"}
"""Classes that must not be refused: gated and plain, fused and transposed matrices, with and without biases."""
SLOW = [pytest.mark.nightly]


def test_the_names_are_those_of_classes():
    assert {*every_class.model_types()} >= REMOVED


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in REMOVED else SLOW) for kind in every_class.model_types()],
)
def test_it_is_removed_and_loaded_again_or_refused(kind, tmp_path):
    try:
        model = every_class.build(kind)
    except Exception as error:  # a class may need more than a small configuration
        pytest.skip(f"not built: {error!r}")
    tokens = make_tokens(8, 16)
    try:
        report = prune_model(model, tokens, remove="neurons=0.25")
    except InputError as error:
        print(f"{kind:<28} refused  {error}")
        assert kind not in REMOVED
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (each(input_ids=tokens, use_cache=False).logits for each in (model, again))
    print(f"{kind:<28} removed  {report.removed[0].summary()}")
    assert torch.equal(found, expected)
