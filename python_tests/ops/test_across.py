"""One selection over several matrices, and its parts, against the reference. Contracts: csrc/ops/across.h."""

import pytest
import torch
from helpers import (
    FORMULAS,
    assert_only_slice_changed,
    assert_same_bits,
    embed,
    expected_histogram,
    expected_mask_at,
    formula_arguments,
    make_weight,
    order_key,
    places,
    prune_at_,
    score_histogram,
)

from ace_ext import ops
from ace_ext.ops import ScoredWeight, reference
from ace_ext.ops._across import RADIX_BITS

SHAPES = ((31, 33), (1, 129), (129, 2), (32, 32), (0, 7), (2, 500))


def find_cut(matrices, keep_k):
    """Key and ties of the ``keep_k`` best of all ``(weight, formula, arguments)``, by three rounds of histograms.

    Also how many keys of each matrix equal the cut's.
    """
    key, left, shift = 0, keep_k, 32
    for level, width in enumerate(RADIX_BITS):
        shift -= width
        counts = [score_histogram(w, formula, key, level, **arguments).cpu() for w, formula, arguments in matrices]
        total = sum(counts).tolist()
        digit = len(total) - 1
        while total[digit] < left:
            left -= total[digit]
            digit -= 1
        key |= digit << shift
    return key, left, [int(count[digit]) for count in counts]


def model(formula, dtype, random, ties, device):
    weights = [make_weight(rows, cols, dtype, random, ties).to(device) for rows, cols in SHAPES]
    return [(weight, formula, formula_arguments(formula, weight, random, ties)) for weight in weights]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_one_cut_over_several_matrices(formula, dtype, ties, device, random):
    matrices = model(formula, dtype, random, ties, device)
    scores = [reference.score(w, m, **arguments, dtype=torch.float32) for w, m, arguments in matrices]
    total = sum(score.numel() for score in scores)
    for keep_k in places(total)[1:]:
        key, left, equal = find_cut(matrices, keep_k)
        kept = 0
        masks = reference.keep_mask_model(scores, keep_k)
        for (weight, name, arguments), mask, count in zip(matrices, masks, equal, strict=True):
            ties_here = min(left, count)  # dealt out to the matrices in their order
            left -= ties_here
            outer, view = embed(weight)
            prune_at_(view, name, key, ties_here, **arguments)
            assert_same_bits(view, reference.prune(weight, mask))
            assert_only_slice_changed(outer, view)
            kept += int(mask.sum())
        assert left == 0
        assert kept == keep_k


@pytest.mark.parametrize("formula", ["magnitude", "ria", "cosp_exact", "score"])
def test_histograms_match_the_oracle(formula, dtype, device, random):
    for rows, cols in ((1, 1), (31, 33), (2, 1134), (0, 3), (3, 0)):
        weight = make_weight(rows, cols, dtype, random).to(device)
        arguments = formula_arguments(formula, weight, random)
        if formula == "score":
            arguments = {"moment": torch.randn(rows, cols, generator=random).to(device)}
        score = reference.score(weight, formula, **arguments, dtype=torch.float32)
        keys = order_key(score).reshape(-1).tolist()
        for level in range(3):
            for prefix in {0, 2**32 - 1, *keys[:3]}:
                counts = score_histogram(embed(weight)[1], formula, prefix, level, **arguments)
                assert counts.dtype == torch.int64
                assert torch.equal(counts.cpu(), expected_histogram(score, prefix, level))


def test_prefixes_of_a_level_split_its_parents_bin(device, random):
    weight = torch.randn(50, 60, generator=random).to(device)
    top = score_histogram(weight, "magnitude", 0, 0)
    assert top.sum() == weight.numel()
    for digit in top.nonzero()[:, 0].tolist():
        middle = score_histogram(weight, "magnitude", digit << 21, 1)
        assert middle.sum() == top[digit]


def test_prune_at_matches_the_oracle_for_any_key(dtype, device, random):
    weight = make_weight(31, 33, dtype, random, ties=True).to(device)
    keys = sorted(set(order_key(weight.abs().float()).reshape(-1).tolist()))
    between = [keys[1] - 1, keys[1] + 1, 0, 1, 2**32 - 1, 2**31]
    for key in keys + between:
        for ties in (0, 1, 5, 100, 10**12):
            twin = weight.clone()
            prune_at_(twin, "magnitude", key, ties)
            assert_same_bits(twin, reference.prune(weight, expected_mask_at(weight.abs(), key, ties)))


def test_ties_of_a_cut_go_row_by_row(device):
    weight = torch.full((4, 3), -2.0, device=device)
    key = int(order_key(torch.tensor([2.0]))[0])
    prune_at_(weight, "magnitude", key, 5)
    assert (weight != 0).int().tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_topk_across_matches_the_oracle(ties, device, random):
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    weights = [make_weight(*shape, dtypes[i % 3], random, ties).to(device) for i, shape in enumerate(SHAPES)]
    formulas = [FORMULAS[i % len(FORMULAS)] for i in range(len(SHAPES))]
    arguments = [formula_arguments(f, w, random, ties) for f, w in zip(formulas, weights, strict=True)]
    scores = [
        reference.score(w, f, **a, dtype=torch.float32) for w, f, a in zip(weights, formulas, arguments, strict=True)
    ]
    for keep_k in places(sum(w.numel() for w in weights)):
        views = [embed(weight) for weight in weights]
        scored = [ScoredWeight(v, f, **a) for (_, v), f, a in zip(views, formulas, arguments, strict=True)]
        ops.prune_topk_across_(scored, keep_k)
        masks = reference.keep_mask_model(scores, keep_k)
        for (outer, view), weight, mask in zip(views, weights, masks, strict=True):
            assert_same_bits(view, reference.prune(weight, mask))
            assert_only_slice_changed(outer, view)


def test_topk_across_refuses_before_it_writes(device):
    good, bad = torch.ones(2, 3, device=device), torch.full((2, 3), float("nan"))
    for keep_k in (-1, 7):
        with pytest.raises(ValueError, match=rf"^prune_topk_across_: keep_k must be from 0 to 6 \(got {keep_k}\)$"):
            ops.prune_topk_across_([ScoredWeight(good, "magnitude")], keep_k)
    for keep_k in (0, 5):
        with pytest.raises(ValueError, match="weight must be finite"):
            ops.prune_topk_across_([ScoredWeight(good, "magnitude"), ScoredWeight(bad, "magnitude")], keep_k)
    ops.prune_topk_across_([], 0)
    assert (good == 1).all()
