"""Structures of every causal-LM class are removed, and plain transformers loads the result; or it is refused in words.

pytest -s -m nightly python_tests/structures/test_every_class.py
"""

import every_class
import pytest
import torch
from class_checks import built
from tiny_models import make_tokens

from ace_ext import InputError, prune_model

REMOVED = {
    "neurons=0.25": {
        *("gemma3_text", "gpt-sw3", "opt", "phi3", "qwen2", "gpt_neo", "gpt_neox", "big_bird", "exaone"),
        *("deepseek_v3", "gpt_oss", "jamba", "llama4", "qwen3_moe"),
    },
    "heads=0.5": {"gemma4", "gpt_oss", "qwen3", "mixtral"},
    "experts=0.5": {"deepseek_v3", "gpt_oss", "qwen3_moe", "jamba"},
}
"""Classes that must not be refused: gated and plain, fused and transposed matrices, with and without biases; attention
with norms and sinks; routers of several kinds."""
SLOW = [pytest.mark.nightly]


def test_the_names_are_those_of_classes():
    assert {*every_class.model_types()} >= set().union(*REMOVED.values())


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param(part, kind, marks=[] if kind in REMOVED[part] else SLOW)
        for part in REMOVED
        for kind in every_class.model_types()
    ],
)
def test_it_is_removed_and_loaded_again_or_refused(part, kind, tmp_path):
    model = built(lambda: every_class.build(kind), kind in REMOVED[part])
    tokens = make_tokens(8, 16)
    try:
        report = prune_model(model, tokens, remove=part)
    except InputError as error:
        print(f"{part} {kind:<28} refused  {error}")
        assert kind not in REMOVED[part]
        return
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (each(input_ids=tokens, use_cache=False).logits for each in (model, again))
    print(f"{part} {kind:<28} removed  {report.removed[0].summary()}")
    stored = again.state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, expected)  # kernels may round differently at other addresses
