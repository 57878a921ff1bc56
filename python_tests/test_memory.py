"""Sizes in words, peaks of the process, and estimates that grow with what they are estimates of."""

import pytest
import torch
from tiny_models import make_model

from ace_ext import InputError, PruneConfig
from ace_ext.memory import estimate, parse_bytes, peak_memory_bytes, reset_peak, resident_bytes, solver_bytes
from ace_ext.model_walk import find_blocks


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("800 mb", 8 * 10**8), (" 4kib ", 4096), ("1TB", 10**12)],
)
def test_parse_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.0GB", "GB", "-1GB", "2 G", "2GBs", "1,5GB", "nan"])
def test_parse_bytes_refuses(text):
    with pytest.raises(InputError, match="max-memory must be a size like 2GB or 1500MiB"):
        parse_bytes(text)


def test_reset_starts_the_peak_anew():
    size = 2**28
    held = torch.ones(size, dtype=torch.uint8)
    high = peak_memory_bytes()
    assert high >= size
    del held
    if not reset_peak():
        pytest.skip("this system cannot reset a process's peak")
    assert peak_memory_bytes() < high - size // 2
    assert resident_bytes() <= peak_memory_bytes() + 2**20


def need(config=None, nsamples=8, seqlen=16, model=None, **options):
    model = model or make_model("llama", torch.bfloat16)
    options = {"offload": False, "process": 0, **options}
    return estimate(model, find_blocks(model), None, config or PruneConfig(), nsamples, seqlen, **options)


def test_estimate_counts_what_is_there():
    """Llama: 64 x 32 embedding and head, 3 blocks of 32 x 32 twice, 16 x 32 twice, 48 x 32 three times, and norms."""
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    found = need(PruneConfig("cosp"))
    assert found.model == 2 * (2 * 64 * 32 + 3 * block + 32)
    assert found.hidden == 2 * 8 * 16 * 32
    assert found.statistics > 4 * (block - 2 * 32)  # the cross moment of each Linear, float32
    assert found.total == sum(found.parts().values())


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"nsamples": 8}, {"nsamples": 64}),
        ({"seqlen": 16}, {"seqlen": 64}),
        ({"config": PruneConfig(batch_tokens=16)}, {"config": PruneConfig(batch_tokens=128)}),
        ({"config": PruneConfig("magnitude")}, {"config": PruneConfig("wanda")}),
        ({"config": PruneConfig("wanda")}, {"config": PruneConfig("ace")}),
        ({"config": PruneConfig("ace")}, {"config": PruneConfig("cosp")}),
        ({"config": PruneConfig("cosp", order="block")}, {"config": PruneConfig("cosp", group="model")}),
        ({"resident_hidden": False}, {"resident_hidden": True}),
        ({"offload": True}, {"offload": False}),
    ],
    ids=lambda value: "",
)
def test_estimate_grows(less, more):
    assert need(**less).total < need(**more).total


def test_more_samples_than_a_batch_cost_hidden_states_alone():
    config = PruneConfig(batch_tokens=64)
    few, many = need(config, nsamples=8), need(config, nsamples=80)
    assert many.total - few.total == many.hidden - few.hidden == 72 * 16 * 32 * 2


def test_a_tied_head_is_counted_once():
    untied, tied = need(model=make_model("llama")), need(model=make_model("llama-tied"))
    assert untied.model - tied.model == 64 * 32 * 4


def test_offload_holds_the_embedding_only_at_the_entrance():
    """A large vocabulary and few tokens: the entrance, with embedding and a block, holds the most."""
    model = make_model("llama", torch.bfloat16)
    model.resize_token_embeddings(4096)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in [model.model.embed_tokens.weight, model.model.norm.weight])
    entering = need(model=model, nsamples=1, offload=True)
    assert (entering.phase, entering.model) == ("enter", block + outside)
    pruning = need(model=model, nsamples=4096, offload=True)
    assert (pruning.phase, pruning.model) == ("prune", block)


def test_the_process_is_measured_unless_given():
    assert need(process=None).process >= 10**8


def test_a_callables_scores_are_counted():
    assert solver_bytes(PruneConfig(lambda weight, stats: weight.abs()), 7, 5) > solver_bytes(PruneConfig(), 7, 5)


def test_description_names_the_largest_first():
    assert need(process=3 * 10**9).describe().startswith("process 3.00 GB")
