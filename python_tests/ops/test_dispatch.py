"""The ops as torch sees them: schemas, Meta kernels, threads. Contracts: csrc/ops.h and csrc/ops/."""

import pytest
import torch
from helpers import FORMULAS, assert_same_bits, formula_arguments, make_weight, prune_at_, score_histogram

from ace_ext import ops
from ace_ext.ops._extension import registered
from ace_ext.ops._packed import register_packed

NAMESPACE = registered()
register_packed()  # before any op is traced: torch keeps what it found then, gradients or none


def samples():
    """Name and arguments, in the schema's order, of at least one call of every op."""
    random = torch.Generator().manual_seed(0)
    x, a = torch.randn(9, 8, generator=random), torch.randn(9, 6, generator=random)
    for state in (torch.float32, torch.float64):
        for token_weight in (None, torch.ones(9)):
            sums = [torch.zeros(shape, dtype=state) for shape in ((), (8,), (8,))]
            yield "update_moments_", (*sums, x, token_weight)
    yield "inverse_square_norm", (a.half(),)
    yield "update_cosine_moment_", (torch.zeros(6, 8), x, a)
    yield "update_gram_", (torch.zeros(8, 8), x)
    yield "update_gram_", (torch.zeros(8, 8), x.bfloat16(), False)
    score = torch.randn(6, 8, generator=random)
    for formula in (*FORMULAS, "score"):
        weight = make_weight(6, 8, torch.float32, random)
        arguments = {"moment": score} if formula == "score" else formula_arguments(formula, weight, random)
        scored = (arguments.get("column"), arguments.get("moment"))
        yield "score", (weight, formula, *scored)
        yield "prune_topk_", (weight.clone(), formula, 3, *scored, "row")
        yield "prune_topk_", (weight.bfloat16(), formula, 11, *scored, "matrix")
        yield "prune_nm_", (weight.half(), formula, 2, 4, *scored)
        yield "topk_mask", (weight, formula, 3, *scored, "row")
        yield "topk_mask", (weight.bfloat16(), formula, 11, *scored, "matrix")
        yield "nm_mask", (weight.half(), formula, 2, 4, *scored)
        yield "score_histogram", (weight, formula, 2**31, 1, *scored)
        yield "prune_at_", (weight.clone(), formula, 2**31 + 2**29, 1, *scored)
    for keep_n, group_m in ((0, 0), (2, 4)):
        mask = torch.tensor([True, True, False, False]).repeat(6, 2)
        yield "refine_swaps_", (mask, score.half(), x.T @ x, keep_n, group_m, 5)
        yield "balance_mean_", (mask.clone(), score.half(), torch.ones(8), torch.ones(8), group_m, 2)
        yield "restore_mean_", (score.clone(), mask.clone(), torch.ones(8), torch.ones(8))
    for change in (score.clone(), score.bfloat16()):
        yield "admm_change_", (change, score, score > 0, score.clone(), torch.ones(8))
        yield "admm_update_", (score.clone(), change, score > 0, score.clone(), torch.ones(8), 0.4)
    bitmap = torch.tensor([[0b10110], [0b01011]], dtype=torch.uint8).repeat(1, 8)
    bitmap[:, 1:] = 0
    uniform, ragged = torch.randn(2, 3, generator=random), torch.randn(6, generator=random)
    starts = torch.tensor([0, 3, 6])
    for tokens in (1, 20):
        row = torch.randn(tokens, 5, generator=random)
        yield "packed_linear", (row, bitmap, uniform, None, None)
        yield "packed_linear", (row.half(), bitmap, ragged.half(), starts, torch.ones(2).half())
        for bits, codes in ((8, torch.arange(6, dtype=torch.uint8)), (4, torch.arange(4, dtype=torch.uint8))):
            packed = (bitmap, codes, torch.ones(2, 1), bits, 64)
            yield "quantized_linear", (row, *packed, torch.tensor([0, len(codes) // 2, len(codes)]), torch.ones(2))
            uniform_codes = codes.view(2, -1)
            yield "quantized_linear", (row, bitmap, uniform_codes, torch.ones(2, 1), bits, 64, None, None)
            yield "unpack_quantized", (bitmap, uniform_codes, torch.ones(2, 1).bfloat16(), bits, 64, None, 5)
    yield "unpack_bitmap", (bitmap, ragged, starts, 5)
    yield "unpack_bitmap", (bitmap, uniform.bfloat16(), None, 5)
    for keep_n, group_m in ((0, 0), (2, 4)):
        mask = torch.tensor([True, True, False, False]).repeat(6, 2)
        yield "obs_block_", (score.clone(), torch.zeros(6, 8), mask.clone(), torch.eye(8), keep_n, group_m)
    scale, mask = torch.rand(6, generator=random), score > 0
    yield "quantize_block_", (score.clone(), torch.zeros(6, 8), mask, scale.bfloat16(), torch.eye(8), 4, None)
    yield "quantize_block_", (score.clone(), torch.zeros(6, 8), mask, scale, torch.eye(8), 8, score.clone())


def test_samples_cover_every_op():
    prefix = "ace_ext::"
    registered = {n.removeprefix(prefix) for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    assert registered == {name for name, _ in samples()}


@pytest.mark.parametrize(("name", "arguments"), list(samples()))
def test_opcheck(name, arguments):
    torch.library.opcheck(getattr(NAMESPACE, name).default, arguments)


@pytest.mark.parametrize(("name", "arguments"), list(samples()))
def test_meta_gives_the_shape_and_dtype_of_the_real_result(name, arguments):
    def to_meta(argument):
        return argument.to("meta") if isinstance(argument, torch.Tensor) else argument

    op = getattr(NAMESPACE, name)
    real, meta = op(*arguments), op(*[to_meta(argument) for argument in arguments])
    assert (meta is None) == (real is None)
    if real is not None:
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_meta_refuses_what_the_kernels_refuse():
    weight = torch.empty(4, 12, device="meta")
    with pytest.raises(ValueError, match="prune_nm_: group_m must divide"):
        ops.prune_nm_(weight, "magnitude", 2, 5)
    with pytest.raises(ValueError, match="score: column must be on meta"):
        ops.score(weight, "scaled", column=torch.ones(12))


def test_parameters_that_require_grad_can_be_pruned():
    weight = torch.nn.Parameter(torch.tensor([[3.0, -1.0, 2.0, 0.5]]))
    ops.prune_topk_(weight, "magnitude", 2)
    assert weight.tolist() == [[3.0, 0.0, 2.0, 0.0]]
    assert weight.requires_grad


def run_everything(formula, dtype):
    """Results of every op on matrices large enough to be divided among threads."""
    random = torch.Generator().manual_seed(0)
    x, a = torch.randn(700, 1134, generator=random).to(dtype), torch.randn(700, 300, generator=random).to(dtype)
    weight = make_weight(300, 1134, dtype, random)
    arguments = formula_arguments(formula, weight, random)
    own = torch.randn(300, 1134, generator=random)
    state = [torch.zeros(()), torch.zeros(1134), torch.zeros(1134)]
    ops.update_moments_(*state, x, ops.inverse_square_norm(a))
    moment = torch.zeros(300, 1134)
    ops.update_cosine_moment_(moment, x, a)
    gram = torch.zeros(1134, 1134)
    ops.update_gram_(gram, x)
    results = [*state, moment, gram, ops.inverse_square_norm(a), ops.score(weight, formula, **arguments)]
    for group, keep_k in (("row", 567), ("matrix", 170_100)):
        pruned, by_score = weight.clone(), weight.clone()
        results += [pruned, ops.prune_topk_(pruned, formula, keep_k, **arguments, group=group)]
        results += [by_score, ops.prune_topk_(by_score, "score", keep_k, moment=own, group=group)]
        results += [ops.topk_mask(weight, formula, keep_k, **arguments, group=group).half()]
    results += [weight.clone() for _ in range(3)]
    ops.prune_nm_(results[-1], formula, 1, 2, **arguments)
    ops.prune_nm_(results[-2], "score", 3, 7, moment=own)
    results += [ops.nm_mask(weight, formula, n, m, **arguments).half() for n, m in ((1, 2), (3, 7))]
    prune_at_(results[-5], formula, 0xBE800000, 10, **arguments)
    return [*results, score_histogram(weight, formula, 0, 0, **arguments).double()]


@pytest.mark.parametrize("formula", ["ria", "cosp_exact"])
def test_results_do_not_depend_on_the_number_of_threads(formula, dtype, threads):
    threads(1)
    alone = run_everything(formula, dtype)
    for number in (1, 2, 3):
        threads(number)
        for result, expected in zip(run_everything(formula, dtype), alone, strict=True):
            assert_same_bits(result, expected)
