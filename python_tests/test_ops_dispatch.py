"""The ops as torch sees them: schemas, Meta kernels, threads. Contracts: csrc/ops.h."""

import pytest
import torch
from helpers import METRICS, assert_same_bits, make_weight, metric_arguments

from ace_ext import ops

NAMESPACE = torch.ops.ace_ext


def samples():
    """Name and arguments, in the schema's order, of a call or more of every op."""
    random = torch.Generator().manual_seed(0)
    x, a = torch.randn(9, 8, generator=random), torch.randn(9, 6, generator=random)
    for state in (torch.float32, torch.float64):
        for token_weight in (None, torch.ones(9)):
            sums = [torch.zeros(shape, dtype=state) for shape in ((), (8,), (8,))]
            yield "update_moments_", (x, token_weight, *sums)
    yield "inverse_square_norm", (a.half(),)
    yield "update_cosine_moment_", (x, a, torch.zeros(6, 8))
    for metric in METRICS:
        weight = make_weight(6, 8, torch.float32, random)
        arguments = metric_arguments(metric, weight, random)
        scored = (metric, arguments.get("column"), arguments.get("moment"))
        yield "score", (weight, *scored)
        yield "prune_topk_", (weight.clone(), *scored, 3, "row")
        yield "prune_topk_", (weight.bfloat16(), *scored, 11, "matrix")
        yield "prune_nm_", (weight.half(), *scored, 2, 4)
        yield "score_histogram", (weight, *scored, 2**31, 1)
        yield "prune_at_", (weight.clone(), *scored, 2**31 + 2**29, 1)
    score = torch.randn(6, 8, generator=random)
    yield "prune_by_score_", (torch.ones(6, 8), score.half(), 3, "row")
    yield "prune_by_score_", (torch.ones(6, 8), score, 3, "matrix")
    yield "prune_nm_by_score_", (torch.ones(6, 8), score, 2, 4)
    for keep_n, group_m in ((0, 0), (2, 4)):
        mask = torch.tensor([True, True, False, False]).repeat(6, 2)
        yield "refine_swaps_", (mask, score.half(), x.T @ x, keep_n, group_m, 5)
        yield "obs_block_", (score.clone(), torch.zeros(6, 8), mask.clone(), torch.eye(8), keep_n, group_m)


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
        ops.score(weight, "wanda", column=torch.ones(12))


def test_parameters_that_require_grad_can_be_pruned():
    weight = torch.nn.Parameter(torch.tensor([[3.0, -1.0, 2.0, 0.5]]))
    ops.prune_topk_(weight, "magnitude", 2)
    assert weight.tolist() == [[3.0, 0.0, 2.0, 0.0]]
    assert weight.requires_grad


def run_everything(metric, dtype):
    """Results of every op on matrices large enough to be shared among threads."""
    random = torch.Generator().manual_seed(0)
    x, a = torch.randn(700, 1134, generator=random).to(dtype), torch.randn(700, 300, generator=random).to(dtype)
    weight = make_weight(300, 1134, dtype, random)
    arguments = metric_arguments(metric, weight, random)
    own = torch.randn(300, 1134, generator=random)
    state = [torch.zeros(()), torch.zeros(1134), torch.zeros(1134)]
    ops.update_moments_(*state, x, ops.inverse_square_norm(a))
    moment = torch.zeros(300, 1134)
    ops.update_cosine_moment_(moment, x, a)
    results = [*state, moment, ops.inverse_square_norm(a), ops.score(weight, metric, **arguments)]
    for group, keep_k in (("row", 567), ("matrix", 170_100)):
        pruned, by_score = weight.clone(), weight.clone()
        results += [pruned, ops.prune_topk_(pruned, metric, keep_k, **arguments, group=group)]
        results += [by_score, ops.prune_by_score_(by_score, own, keep_k, group)]
    results += [weight.clone() for _ in range(3)]
    ops.prune_nm_(results[-1], metric, 1, 2, **arguments)
    ops.prune_nm_by_score_(results[-2], own, 3, 7)
    ops.prune_at_(results[-3], metric, 0xBE800000, 10, **arguments)
    return [*results, ops.score_histogram(weight, metric, 0, 0, **arguments).double()]


@pytest.mark.parametrize("metric", ["ria", "cosp-exact"])
def test_results_do_not_depend_on_the_number_of_threads(metric, dtype, threads):
    threads(1)
    alone = run_everything(metric, dtype)
    for number in (1, 2, 3):
        threads(number)
        for result, expected in zip(run_everything(metric, dtype), alone, strict=True):
            assert_same_bits(result, expected)
