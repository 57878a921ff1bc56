"""Every class that can be pruned and quantized can be packed, and the packed folder loads as the same model, by
``load_packed`` and by transformers.

pytest -s -m nightly python_tests/runtime/test_packed_classes.py
"""

import every_class
import other_classes
import pytest
import torch
from class_checks import built
from helpers import assert_same_bits
from tiny_models import make_tokens

from ace_ext import InputError, load_packed, prune_model, register
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import check_all_read, skeleton
from ace_ext.packed.packing import pack
from ace_ext.pruning.method import parse

ALWAYS = {"camembert", "gpt-sw3", "gemma3_text", "qwen3_moe"}
"""Causal-LM classes that must not be refused: a tied LM head that is registered before the embedding, transposed
matrices, norms, experts."""
ALWAYS_OTHERS = {"marian", "granite_speech", "mbart", "vit"}
"""The same of other classes: a parameter that is computed and not saved, a number that is stored under another name, a
buffer of the outermost module, images."""
NOT_SMALL = {"vibevoice_asr", *every_class.NOT_SMALL, *other_classes.CANNOT}
"""Classes whose small configuration is not small."""
NOT_LOADED = {"ultrabert"}
"""Classes whose packed folder is refused in words: two of their conversions rename the same prefix."""
ROUNDING = 1e-3
"""Of outputs relative to their standard deviation. In bfloat16 a mixture's router may choose other experts."""
METHOD = parse("wanda + quantize(bits=4)")


def kinds(all_of_them, always):
    """Test parameters: those that are not always tested are nightly."""
    small = (kind for kind in all_of_them if kind not in NOT_SMALL)
    return [pytest.param(kind, marks=[] if kind in always else [pytest.mark.nightly]) for kind in small]


def check(kind, model, calibration, inputs, must, folder):
    """Prunes, packs, loads and compares weights and outputs."""
    try:
        prune_model(model, calibration, method=METHOD, max_dense=1.0)
        model.save_pretrained(folder / "dense")
        result = pack(folder / "dense", folder / "packed", "bitmap", grid=METHOD.grid)
    except InputError as error:
        print(f"{kind:<28} refused  {error}")
        assert not must
        return
    if kind in NOT_LOADED:
        with pytest.raises(InputError, match="has no tensor"):
            load_packed(folder / "packed")
        return
    print(f"{kind:<28} packed  {result.matrices} matrices, {result.quantized} quantized")
    assert result.matrices  # of transposed ones, as those of GPT-2, values are stored in place of codes
    outputs = other_classes.outputs_of(model, inputs)
    register()
    for packed in (load_packed(folder / "packed"), type(model).from_pretrained(folder / "packed")):
        stored = packed.state_dict()
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                assert_same_bits(stored[name], value)
            else:
                assert torch.equal(stored[name], value)
        for expected, found in zip(outputs, other_classes.outputs_of(packed, inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING * float(expected.std()), equal_nan=True)


def test_a_computed_parameter_is_not_missing_in_a_dense_folder(tmp_path):
    other_classes.build("marian").save_pretrained(tmp_path)
    shards = Shards(tmp_path)
    check_all_read(skeleton(tmp_path, shards, causal=False), shards, str(tmp_path), strict=True)


@pytest.mark.parametrize("kind", kinds(every_class.model_types(), ALWAYS))
def test_a_causal_class_is_packed_and_loaded_again_or_refused(kind, tmp_path):
    tokens = make_tokens(8, 16)
    inputs = {"input_ids": tokens, "use_cache": False}
    must = kind in ALWAYS
    check(kind, built(lambda: every_class.build(kind), must), tokens, inputs, must, tmp_path)


@pytest.mark.parametrize("kind", kinds(other_classes.classes(), ALWAYS_OTHERS))
def test_another_class_is_packed_and_loaded_again_or_refused(kind, tmp_path):
    must = kind in ALWAYS_OTHERS
    model = built(lambda: other_classes.build(kind), must)
    inputs = built(lambda: other_classes.inputs_of(model), must)
    built(lambda: other_classes.outputs_of(model, inputs), must)
    check(kind, model, [inputs], inputs, must, tmp_path)
