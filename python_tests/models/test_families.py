"""A tiny random model of every causal-LM class of the installed transformers is pruned.

    pytest -s -m nightly python_tests/models/test_families.py -k table

prints what becomes of each, and which share of its matrices stays dense (routers, convolutions, a vision tower): ok;
partly dense, where more of a block stays dense than is allowed unasked; refused, with an ``InputError``; not built.
"""

import re
from collections import Counter
from functools import cache

import every_class
import pytest
import torch
from class_checks import NOT_BUILT, OK, PARTLY, REFUSED, Row, check_routers, check_weights
from torch import nn
from transformers.models.aria import modeling_aria

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.dense_weights import NO_MATRIX, NOT_CALLED, OUTSIDE, ROUTER
from ace_ext.models.blocks import find_blocks
from ace_ext.pruning.groups import keep_count

CANNOT = {
    "gemma3n": "its vision tower needs the package timm",
    "gemma4_assistant": "drafts for another model, whose states it needs",
    "gemma4_unified_assistant": "drafts for another model, whose states it needs",
    "dots3_note": "its audio adapter's sizes cannot be shrunk by name",
    "musicgen": "its class takes the configuration of a part of its own model",
    "musicgen_melody": "its class takes the configuration of a part of its own model",
}
"""What is not built here, and why. A new release of transformers may add to this list; the test then names it."""

CROSS = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"]
CROSS += ["prophetnet", "trocr", "whisper"]
"""Decoders whose cross attention text alone does not use."""
REFUSES = ["deepseek_v4", "zamba"]
"""A Linear's groups of rows read different inputs; blocks share their weights."""
EXPECTED = dict.fromkeys(REFUSES, REFUSED) | dict.fromkeys(CROSS, PARTLY) | dict.fromkeys(CANNOT, NOT_BUILT)
"""What becomes of the classes that are not ok."""

if hasattr(modeling_aria, "AriaGroupedExpertsGemm"):  # an older transformers: its experts multiply in their own way
    EXPECTED["aria_text"] = PARTLY

classes = pytest.mark.parametrize("model_type", every_class.model_types())

MANY = 164
"""At least so many classes prune without being asked for more."""


def tokens() -> torch.Tensor:
    return torch.randint(4, every_class.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@cache
def row_of(model_type: str) -> Row:
    """Builds and prunes one class, and checks what was done to its weights."""
    if model_type in CANNOT:
        return Row(NOT_BUILT, CANNOT[model_type])
    model = every_class.build(model_type)
    words = ""
    try:
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        report = prune_model(model, tokens(), PruneConfig("wanda"))
    except InputError as error:
        words = str(error)
        share = re.search(r"--max-dense ([\d.]+)", words)
        if share is None:
            return Row(REFUSED, words)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "changed, then refused"
        try:
            report = prune_model(model, tokens(), PruneConfig("wanda", max_dense=float(share[1])))
        except InputError as second:
            return Row(REFUSED, str(second))
    check_weights(model, before, report)
    check_routers(model, report)
    dense = sum(weight.size for weight in report.dense)
    share = dense / (dense + sum(matrix.size for matrix in report.matrices))
    return Row(PARTLY if words else OK, words, share, report)


@classes
def test_every_class(model_type):
    """As expected: pruned, or refused with words; nothing is dense unsaid."""
    row = row_of(model_type)
    assert row.fate == EXPECTED.get(model_type, OK), row.words
    if row.report is not None:
        assert {weight.reason for weight in row.report.dense} <= {ROUTER, NO_MATRIX, NOT_CALLED, OUTSIDE}


@pytest.mark.nightly
def test_the_table():
    """Most classes are ok."""
    rows = {model_type: row_of(model_type) for model_type in every_class.model_types()}
    print()
    for model_type, row in rows.items():
        print(f"{model_type:<28} {row.fate:<13} {row.dense:6.1%}  {row.words}")
    counts = Counter(row.fate for row in rows.values())
    print(", ".join(f"{count} {fate}" for fate, count in counts.items()))
    assert counts[OK] >= MANY


@pytest.mark.nightly
@classes
def test_each_in_full(model_type, tmp_path):
    """At sparsity 0 nothing changes; masks of Linears are those of their inputs, by Wanda's definition, where no pruned
    weight comes before; what is saved and loaded has the same logits."""
    if EXPECTED.get(model_type, OK) not in (OK, PARTLY):
        pytest.skip("is not pruned")
    model = every_class.build(model_type)
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
        prune_model(model, tokens(), PruneConfig("wanda", sparsity=0.0, max_dense=1.0))
        assert torch.equal(model(tokens(), use_cache=False).logits, logits)
    (block, *_) = find_blocks(model)
    inputs = inputs_of(model, block.module)
    dense = {name: module.weight.detach().clone() for name, module in inputs}
    prune_model(model, tokens(), PruneConfig("collect(order=block) + wanda", max_dense=1.0))
    for (name, module), x in inputs.items():
        if name not in block.linears or not x.any():  # all scores are 0
            continue
        score = dense[name].abs() * x.double().norm(dim=0).float()
        keep = keep_count(score.shape[1], 0.5)
        kept = torch.zeros_like(score).scatter_(1, score.topk(keep, dim=1).indices, 1.0).bool()
        assert ((module.weight != 0) != kept).float().mean() < 5e-3, name
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
        for tensor in (*again.parameters(), *again.buffers()):
            tensor.data = tensor.data.clone()  # in the file they begin at odd addresses, where products round otherwise
        assert torch.equal(again(tokens(), use_cache=False).logits, logits)


def inputs_of(model: nn.Module, block: nn.Module) -> dict[tuple[str, nn.Linear], torch.Tensor]:
    """``[tokens, d_in]``: all that a block's Linears read in a forward pass of the model, by name and Linear."""
    found: dict[tuple[str, nn.Linear], list[torch.Tensor]] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda m, args, name=name: found.setdefault((name, m), []).append(args[0].flatten(0, -2))
        )
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(tokens(), use_cache=False)
    for handle in handles:
        handle.remove()
    return {key: torch.cat(parts) for key, parts in found.items()}
