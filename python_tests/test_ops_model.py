"""One cut over several matrices: score_histogram and prune_at_ against the oracle. Contracts: csrc/ops.h."""

import pytest
import torch
from helpers import METRICS, assert_only_slice_changed, assert_same_bits, embed, make_weight, metric_arguments, places

from ace_ext import ops
from ace_ext.ops import reference

SHAPES = ((31, 33), (1, 129), (129, 2), (32, 32), (0, 7), (2, 500))


def find_cut(matrices, keep_k):
    """Key and ties of the ``keep_k`` best of all ``(weight, metric, arguments)``, by three rounds of histograms.

    Also how many keys of each matrix equal the cut's.
    """
    key, left, shift = 0, keep_k, 32
    for level, width in enumerate(ops.RADIX_BITS):
        shift -= width
        counts = [ops.score_histogram(w, metric, key, level, **arguments).cpu() for w, metric, arguments in matrices]
        total = sum(counts).tolist()
        digit = len(total) - 1
        while total[digit] < left:
            left -= total[digit]
            digit -= 1
        key |= digit << shift
    return key, left, [int(count[digit]) for count in counts]


def model(metric, dtype, random, ties, device):
    weights = [make_weight(rows, cols, dtype, random, ties).to(device) for rows, cols in SHAPES]
    return [(weight, metric, metric_arguments(metric, weight, random, ties)) for weight in weights]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_one_cut_over_several_matrices(metric, dtype, ties, device, random):
    matrices = model(metric, dtype, random, ties, device)
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
            ops.prune_at_(view, name, key, ties_here, **arguments)
            assert_same_bits(view, reference.prune(weight, mask))
            assert_only_slice_changed(outer, view)
            kept += int(mask.sum())
        assert left == 0
        assert kept == keep_k


@pytest.mark.parametrize("metric", ["magnitude", "ria", "cosp-exact", "score"])
def test_histograms_match_the_oracle(metric, dtype, device, random):
    for rows, cols in ((1, 1), (31, 33), (2, 1134), (0, 3), (3, 0)):
        weight = make_weight(rows, cols, dtype, random).to(device)
        arguments = metric_arguments(metric, weight, random)
        if metric == "score":
            arguments = {"moment": torch.randn(rows, cols, generator=random).to(device)}
        score = reference.score(weight, metric, **arguments, dtype=torch.float32)
        keys = reference.order_key(score).reshape(-1).tolist()
        for level in range(3):
            for prefix in {0, 2**32 - 1, *keys[:3]}:
                counts = ops.score_histogram(embed(weight)[1], metric, prefix, level, **arguments)
                assert counts.dtype == torch.int64
                assert torch.equal(counts.cpu(), reference.score_histogram(score, prefix, level))


def test_prefixes_of_a_level_split_its_parents_bin(device, random):
    weight = torch.randn(50, 60, generator=random).to(device)
    top = ops.score_histogram(weight, "magnitude", 0, 0)
    assert top.sum() == weight.numel()
    for digit in top.nonzero()[:, 0].tolist():
        middle = ops.score_histogram(weight, "magnitude", digit << 21, 1)
        assert middle.sum() == top[digit]


def test_prune_at_matches_the_oracle_for_any_key(dtype, device, random):
    weight = make_weight(31, 33, dtype, random, ties=True).to(device)
    keys = sorted(set(reference.order_key(weight.abs().float()).reshape(-1).tolist()))
    between = [keys[1] - 1, keys[1] + 1, 0, 1, 2**32 - 1, 2**31]
    for key in keys + between:
        for ties in (0, 1, 5, 100, 10**12):
            twin = weight.clone()
            ops.prune_at_(twin, "magnitude", key, ties)
            assert_same_bits(twin, reference.prune(weight, reference.keep_mask_at(weight.abs(), key, ties)))


def test_ties_of_a_cut_go_row_by_row(device):
    weight = torch.full((4, 3), -2.0, device=device)
    key = int(reference.order_key(torch.tensor([2.0]))[0])
    ops.prune_at_(weight, "magnitude", key, 5)
    assert (weight != 0).int().tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
