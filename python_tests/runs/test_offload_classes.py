"""Every causal-LM class: a run from the disk writes the same bytes as one in memory, or is refused in words.

pytest -s -m nightly python_tests/runs/test_offload_classes.py
"""

import every_class
import pytest
import torch
from class_checks import built
from folders import prune, weights_bytes

from ace_ext import InputError
from ace_ext.models.safetensors_files import Shards
from ace_ext.models.skeleton import skeleton

ALWAYS = {"big_bird", "codegen", "gptj", "mistral", "gemma3_text", "gemma4_text"}
"""Classes that must not be refused. The constructors of GPT-J and CodeGen compute sinusoids in the weights' dtype,
the head of BigBird has a tied bias, and blocks of Gemma 4 share keys and values."""
NOT_TRIED = {"xlstm", *every_class.NOT_SMALL}
"""xLSTM's small model does not run in bfloat16."""
KINDS = [
    pytest.param(kind, marks=[] if kind in ALWAYS else [pytest.mark.nightly])
    for kind in every_class.model_types()
    if kind not in NOT_TRIED
]


def saved(kind, folder):
    """The class and a folder with its small model in bfloat16."""
    model = built(lambda: every_class.build(kind, torch.bfloat16), kind in ALWAYS)
    model.save_pretrained(folder)
    return type(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_skeleton_has_the_buffers_of_the_loaded_model(kind, tmp_path):
    loaded = saved(kind, tmp_path).from_pretrained(tmp_path, dtype="auto")
    shards = Shards(tmp_path)
    laid_out = dict(skeleton(tmp_path, shards, causal=False).named_buffers())
    for name, buffer in loaded.named_buffers():
        if name not in shards:  # those are read later
            torch.testing.assert_close(laid_out[name], buffer, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_same_bytes_from_the_disk_as_in_memory(kind, tmp_path):
    saved(kind, tmp_path / "dense")
    found = []
    for offload in ("none", "disk"):
        try:
            _, path = prune(
                tmp_path / "dense",
                tmp_path / offload,
                {"offload": offload},
                {"source": "tokens"},
                method="balanced + quantize(bits=4)",
            )
        except InputError as error:
            print(f"{kind:<28} refused, offload {offload}: {error}")
            assert kind not in ALWAYS
            return
        found.append(weights_bytes(path))
    assert found[1] == found[0]
