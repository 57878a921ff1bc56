"""Smaller models in llama.cpp and ONNX Runtime, which `make nightly` installs."""

import pytest
import torch
from folders import prune, save_dense
from helpers import script

SCRIPT = "benchmarks/engine_texts.py"
PROMPTS = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0)).tolist()
TOKENS = 12

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def engines():
    return script(SCRIPT)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A folder without a block, half of the heads and a quarter of the neurons."""
    place = tmp_path_factory.mktemp("engines")
    dense, text = save_dense(place / "dense", dtype=torch.float32), {"nsamples": 16, "seqlen": 16}
    removed = "blocks=1 + heads=0.5 + neurons=0.25"
    return prune(dense, place / "smaller", calibration=text, method=None, remove=removed)[1]


def test_onnx_runtime_chooses_the_tokens_of_transformers(smaller, engines):
    found = engines.onnx_tokens(str(smaller), PROMPTS, TOKENS, "")
    assert found == engines.Reference(str(smaller), PROMPTS).tokens(TOKENS)


@pytest.mark.parametrize(("kind", "limit"), [("bf16", 0.1), ("q8_0", 0.1), ("q4_0", 0.3)])
def test_llama_cpp_chooses_likely_tokens(smaller, engines, kind, limit):
    """By the logits of transformers in float32; of random tokens the mean is far below the likeliest."""
    reference = engines.Reference(str(smaller), PROMPTS)
    found = engines.llama_tokens(str(smaller), PROMPTS, TOKENS, kind)
    random = torch.randint(3, 64, (6, TOKENS), generator=torch.Generator().manual_seed(1)).tolist()
    mean = [sum(gaps) / len(gaps) for gaps in map(reference.below, (found, random))]
    assert mean[0] < limit < mean[1] / 2, mean
