"""Every causal-LM class that can be pruned and quantized can be packed, and the packed folder loads as the same model.

pytest -s -m nightly python_tests/runtime/test_packed_classes.py
"""

import every_class
import pytest
import torch
from helpers import assert_same_bits
from tiny_models import make_tokens

from ace_ext import InputError, load_packed, prune_model
from ace_ext.packed.packing import pack
from ace_ext.pruning.method import parse

ALWAYS = {"camembert", "gpt-sw3", "gemma3_text", "qwen3_moe"}
"""Classes that must not be refused: a tied LM head that is registered before the embedding, transposed matrices, norms,
experts."""
BY_DEFAULT_LARGE = {"cpmant", "ctrl"}
"""Classes whose small configuration is not small: sizes in names that no other class has."""
ROUNDING = 1e-3
"""Of logits relative to their standard deviation. In bfloat16 a mixture's router may choose other experts."""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ALWAYS else [pytest.mark.nightly])
        for kind in every_class.model_types()
        if kind not in BY_DEFAULT_LARGE
    ],
)
def test_it_is_packed_and_loaded_again_or_refused(kind, tmp_path):
    try:
        model = every_class.build(kind)
    except Exception as error:  # a class may need more than a small configuration
        pytest.skip(f"not built: {error!r}")
    tokens, method = make_tokens(8, 16), parse("wanda + quantize(bits=4)")
    try:
        prune_model(model, tokens, method=method)
        model.save_pretrained(tmp_path / "dense")
        result = pack(tmp_path / "dense", tmp_path / "packed", "bitmap", grid=method.grid)
    except InputError as error:
        print(f"{kind:<28} refused  {error}")
        assert kind not in ALWAYS
        return
    packed = load_packed(tmp_path / "packed")
    print(f"{kind:<28} packed  {result.matrices} matrices, {result.quantized} quantized")
    assert result.matrices  # of transposed ones, as those of GPT-2, values are stored in place of codes
    stored = packed.state_dict()
    for name, value in model.state_dict().items():
        assert_same_bits(stored[name], value)
    with torch.no_grad():
        expected, found = (each(input_ids=tokens, use_cache=False).logits for each in (model, packed))
    assert float((found - expected).abs().max() / expected.std()) < ROUNDING
