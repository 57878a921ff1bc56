"""Every op of the schema, called with random tensors of every kind: it is refused in words and nothing is written, or
its result is the reference's. A crash ends the test run."""

import random

import pytest
import torch
from helpers import (
    FORMULAS,
    admm_change,
    admm_update,
    assert_same_bits,
    cosine_moment_bound,
    expected_histogram,
    expected_mask_at,
    formula_arguments,
    gram_bound,
    input_rounding,
    inverse_square_norm_bound,
    moment_bounds,
    obs_bounds,
    order_key,
)
from torch import Tensor

from ace_ext import ops
from ace_ext.ops import mean_reference, packed_reference, reference
from ace_ext.ops._extension import registered

CALLS = 150  # of each op
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about kinds of tensors that it will drop

# Valid arguments of each op, by the schema's names


def matrix(draw, rows, cols, dtype=None) -> Tensor:
    return torch.randn(rows, cols, generator=draw.tensors).to(
        dtype or draw.choice([torch.float32, torch.float16, torch.bfloat16])
    )


def boolean(draw, rows, cols) -> Tensor:
    return torch.rand(rows, cols, generator=draw.tensors) < draw.choice([0.0, 0.3, 0.5, 1.0])


def scored(draw, cols=None) -> dict:
    weight = matrix(draw, draw.randrange(6), cols or draw.choice([0, 1, 4, 12, 24, 67]))
    formula = draw.choice([*FORMULAS, "score"])
    if formula == "score":
        return {"weight": weight, "formula": formula, "moment": torch.randn(weight.shape, generator=draw.tensors)}
    return {"weight": weight, "formula": formula, **formula_arguments(formula, weight, draw.tensors)}


def ranked(draw) -> dict:
    made, group = scored(draw), draw.choice(["row", "matrix"])
    size = made["weight"].shape[1] if group == "row" else made["weight"].numel()
    return {**made, "keep_k": draw.randint(0, size), "group": group}


def grouped(draw) -> dict:
    group_m = draw.choice([1, 2, 4, 12])
    return {**scored(draw, 24), "keep_n": draw.randint(0, group_m), "group_m": group_m}


def histogram(draw) -> dict:
    level = draw.randrange(3)
    return {**scored(draw), "prefix": draw.choice([0, 2**31, 0xBF800000]), "level": level}


def cut(draw) -> dict:
    made = scored(draw)
    keys = order_key(score_of(made)).flatten().tolist() or [0]
    return {**made, "key": draw.choice(keys), "ties": draw.randrange(4)}


def tokens(draw) -> dict:
    x = matrix(draw, draw.randrange(150), draw.randint(0, 70))
    state = draw.choice([torch.float32, torch.float64])
    weights = draw.choice([None, torch.rand(len(x), generator=draw.tensors)])
    zeros = {"mean": torch.zeros(x.shape[1], dtype=state), "m2": torch.zeros(x.shape[1], dtype=state)}
    return {"weight_sum": torch.zeros((), dtype=state), **zeros, "x": x, "token_weight": weights}


def products(draw) -> dict:
    dtype, count = draw.choice([torch.float32, torch.bfloat16]), draw.randrange(20)
    x, a = matrix(draw, count, draw.randint(0, 20), dtype), matrix(draw, count, draw.randint(0, 20), dtype)
    return {"moment": torch.zeros(a.shape[1], x.shape[1]), "x": x, "a": a}


def tokens_of_a_gram(draw) -> dict:
    x = matrix(draw, draw.randrange(20), draw.randint(0, 70))
    return {"gram": torch.zeros(x.shape[1], x.shape[1]), "x": x, "mirror": draw.randrange(2) == 1}


def gram(draw, cols) -> Tensor:
    x = torch.randn(cols + 3, cols, generator=draw.tensors)
    return x.T @ x


def swaps(draw) -> dict:
    weight = matrix(draw, draw.randrange(4), draw.choice([0, 1, 4, 8]))
    return {
        "mask": boolean(draw, *weight.shape),
        "weight": weight,
        "gram": gram(draw, weight.shape[1]),
        "max_swaps": draw.randrange(5),
    }


def balance(draw) -> dict:
    weight = matrix(draw, draw.randrange(4), draw.choice([0, 4, 8, 40]))
    cols = weight.shape[1]
    vectors = {"variance": torch.rand(cols, generator=draw.tensors), "mean": torch.randn(cols, generator=draw.tensors)}
    return {
        "mask": boolean(draw, *weight.shape),
        "weight": weight,
        **vectors,
        "group_m": draw.choice([0, 4]),
        "rounds": draw.randrange(3),
    }


def restore(draw) -> dict:
    weight = matrix(draw, draw.randrange(5), draw.randint(0, 70), torch.float32)
    mean = torch.randn(weight.shape[1], generator=draw.tensors)
    return {"weight": weight, "mask": boolean(draw, *weight.shape), "mean": mean, "direction": mean * 0.5}


def admm(draw, other) -> dict:
    weight = matrix(draw, draw.randrange(5), draw.randint(0, 70), torch.float32)
    given = matrix(draw, *weight.shape, draw.choice([torch.float32, torch.bfloat16]))
    norm = torch.rand(weight.shape[1], generator=draw.tensors)
    read = {"mask": boolean(draw, *weight.shape), "dense": weight * 0.5, "norm": norm}
    if other == "change":
        return {"change": given, "weight": weight, **read}
    return {"weight": weight, "product": given, **read, "dual_scale": 0.4}


def obs(draw) -> dict:
    weight = matrix(draw, draw.randrange(5), draw.choice([0, 1, 4, 12]), torch.float32)
    inverse = torch.linalg.inv(gram(draw, weight.shape[1]) + torch.eye(weight.shape[1]))
    factor = torch.linalg.cholesky(inverse, upper=True).contiguous()
    return {
        "weight": weight,
        "error": torch.zeros_like(weight),
        "mask": boolean(draw, *weight.shape),
        "factor": factor,
    }


def quantize(draw) -> dict:
    made = obs(draw)
    dtype = draw.choice([torch.float32, torch.float16, torch.bfloat16])
    scale = torch.rand(len(made["weight"]), generator=draw.tensors).to(dtype)
    current = draw.choice([None, matrix(draw, *made["weight"].shape, torch.float32)])
    return {**made, "scale": scale, "bits": draw.choice([2, 3, 4, 8]), "current": current}


def packed(draw) -> dict:
    weight = matrix(draw, draw.randint(1, 5), draw.choice([0, 1, 8, 70]))
    mask = boolean(draw, *weight.shape)
    bitmap = torch.zeros(len(weight), 8 * -(-weight.shape[1] // 64), dtype=torch.uint8)
    for i, j in mask.nonzero().tolist():
        bitmap[i, j // 8] |= 1 << j % 8
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return {"bitmap": bitmap, "values": weight[mask], "row_start": starts, "cols": weight.shape[1]}


def product(draw) -> dict:
    made = packed(draw)
    cols, dtype = made.pop("cols"), made["values"].dtype
    bias = draw.choice([None, torch.randn(len(made["bitmap"]), generator=draw.tensors).to(dtype)])
    return {"x": matrix(draw, draw.randint(1, 9), cols, dtype), **made, "bias": bias}


def quantized(draw) -> dict:
    """As packed, with codes and scales in place of values."""
    made = packed(draw)
    bits, rows, cols = draw.choice([8, 4]), len(made["bitmap"]), made["cols"]
    parts = []
    for kept in made["row_start"].diff().tolist():
        codes = torch.randint(256, (-(-kept * bits // 8),), generator=draw.tensors).to(torch.uint8)
        if bits == 4 and kept % 2:
            codes[-1] &= 15  # there is no second code
        parts.append(codes)
    group = draw.choice([64, 128])
    scales = torch.rand(rows, -(-cols // group), generator=draw.tensors).to(made["values"].dtype)
    starts = torch.tensor([0, *map(len, parts)]).cumsum(0)
    return {
        "bitmap": made["bitmap"],
        "codes": torch.cat(parts),
        "scales": scales,
        "bits": bits,
        "group": group,
        "row_start": starts,
        "cols": cols,
    }


def quantized_product(draw) -> dict:
    made = quantized(draw)
    cols, dtype = made.pop("cols"), made["scales"].dtype
    bias = draw.choice([None, torch.randn(len(made["bitmap"]), generator=draw.tensors).to(dtype)])
    return {"x": matrix(draw, draw.randint(1, 9), cols, dtype), **made, "bias": bias}


# Checks of each op's result, given its arguments before the call


def score_of(given) -> Tensor:
    return reference.score(
        given["weight"], given["formula"], given.get("column"), given.get("moment"), dtype=torch.float32
    )


def check_pruned(mask, before, after, result) -> None:
    assert_same_bits(after["weight"], reference.prune(before["weight"], mask))


def check_topk(before, after, result) -> None:
    score = score_of(before)
    check_pruned(reference.keep_mask(score, before["keep_k"], before["group"]), before, after, result)
    if len(score):
        assert torch.equal(result.double(), reference.threshold(score, before["keep_k"], before["group"]))


def check_cut(before, after, result) -> None:
    check_pruned(expected_mask_at(score_of(before), before["key"], before["ties"]), before, after, result)


def nm_mask(before) -> Tensor:
    return reference.keep_mask_nm(score_of(before), before["keep_n"], before["group_m"])


def close(actual, expected, bound) -> None:
    assert ((actual.double() - expected).abs() <= bound).all()


def check_moments(before, after, result) -> None:
    expected = reference.moments(before["x"], before["token_weight"])
    if expected.weight_sum > 0:
        bounds = moment_bounds(before["x"], before["token_weight"], before["mean"].dtype)
        for name, bound in zip(("weight_sum", "mean", "m2"), bounds, strict=True):
            close(after[name], getattr(expected, name), bound)


def check_cosine(before, after, result) -> None:
    expected = reference.cosine_moment(before["x"], before["a"])
    close(after["moment"], expected, cosine_moment_bound(len(before["x"]), before["a"].shape[1]) * expected)


def check_gram(before, after, result) -> None:
    sums = (after["gram"], reference.gram(before["x"]), gram_bound(before["x"]))
    close(*(sums if before["mirror"] else map(torch.tril, sums)))


def check_norm(before, after, result) -> None:
    expected = reference.inverse_square_norm(before["a"])
    close(result, expected, inverse_square_norm_bound(before["a"].shape[1]) * expected)


def check_swaps(before, after, result) -> None:
    mask, made = reference.refine_swaps(before["mask"], before["weight"], before["gram"], max_swaps=before["max_swaps"])
    assert torch.equal(after["mask"], mask)
    assert torch.equal(result, made)


def check_balance(before, after, result) -> None:
    mask, made = mean_reference.balance_mean(**before)
    assert torch.equal(after["mask"], mask)
    assert torch.equal(result, made)


def check_change(before, after, result) -> None:
    given = {name: value for name, value in before.items() if name != "change"}
    assert_same_bits(after["change"], admm_change(**given).to(after["change"].dtype))


def check_obs(before, after, result) -> None:
    weight, error, _ = reference.obs_block(before["weight"], before["mask"], before["factor"])
    weights, errors = obs_bounds(before["weight"], before["mask"], before["factor"], error)
    close(after["weight"], weight, weights)
    close(after["error"], error, errors)


def check_quantize(before, after, result) -> None:
    arguments = {name: value for name, value in before.items() if name != "error"}
    weight, error = reference.quantize_block(**arguments, dtype=torch.float32)
    assert torch.equal(after["weight"], weight)
    assert torch.equal(after["error"], error)


def check_product(before, after, result) -> None:
    expected = packed_reference.packed_linear(**before)
    weight = packed_reference.unpack_bitmap(
        before["bitmap"], before["values"], before["row_start"], before["x"].shape[1]
    )
    check_sums(before, weight, 0, expected, result)


def check_quantized_product(before, after, result) -> None:
    expected = packed_reference.quantized_linear(**before)
    given = {name: before[name] for name in ("bitmap", "codes", "scales", "bits", "group", "row_start")}
    weight = packed_reference.exact_weight(**given, cols=before["x"].shape[1])
    rounding = input_rounding(before["x"], before["group"]) @ weight.abs().T
    check_sums(before, weight, before["scales"].shape[1], expected, result, rounding)


def check_sums(before, weight, groups, expected, result, rounding=0.0) -> None:
    size = before["x"].double().abs() @ weight.double().abs().T
    size += 0.0 if before["bias"] is None else before["bias"].double().abs()
    unit = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[result.dtype]
    least = 2.0**-25 if result.dtype == torch.float16 else 0.0  # half the step of its subnormal numbers
    summing = (weight.shape[1] + groups + 8) * 2.0**-24 * size
    close(result, expected, unit * expected.abs() + summing + rounding + least)


OPS = {
    "score": (scored, lambda b, a, r: assert_same_bits(r, score_of(b))),
    "prune_topk_": (ranked, check_topk),
    "topk_mask": (
        ranked,
        lambda b, a, r: torch.testing.assert_close(r, reference.keep_mask(score_of(b), b["keep_k"], b["group"])),
    ),
    "prune_nm_": (grouped, lambda b, a, r: check_pruned(nm_mask(b), b, a, r)),
    "nm_mask": (grouped, lambda b, a, r: torch.testing.assert_close(r, nm_mask(b))),
    "score_histogram": (
        histogram,
        lambda b, a, r: torch.testing.assert_close(r, expected_histogram(score_of(b), b["prefix"], b["level"])),
    ),
    "prune_at_": (cut, check_cut),
    "update_moments_": (tokens, check_moments),
    "inverse_square_norm": (lambda draw: {"a": matrix(draw, draw.randrange(20), draw.randint(0, 70))}, check_norm),
    "update_cosine_moment_": (products, check_cosine),
    "update_gram_": (tokens_of_a_gram, check_gram),
    "refine_swaps_": (swaps, check_swaps),
    "balance_mean_": (balance, check_balance),
    "restore_mean_": (restore, lambda b, a, r: assert_same_bits(a["weight"], mean_reference.restore_mean(**b))),
    "admm_change_": (lambda draw: admm(draw, "change"), check_change),
    "admm_update_": (
        lambda draw: admm(draw, "product"),
        lambda b, a, r: assert_same_bits(a["weight"], admm_update(**b)),
    ),
    "obs_block_": (obs, check_obs),
    "quantize_block_": (quantize, check_quantize),
    "unpack_bitmap": (packed, lambda b, a, r: assert_same_bits(r, packed_reference.unpack_bitmap(**b))),
    "packed_linear": (product, check_product),
    "unpack_quantized": (
        quantized,
        lambda b, a, r: assert_same_bits(r, packed_reference.unpack_quantized(**b)),
    ),
    "quantized_linear": (quantized_product, check_quantized_product),
}
"""By op: random arguments that it must take, and the check of what it did with them."""


# Changes of a tensor, or of its kind


class Named(torch.Tensor):
    """A subclass without a behaviour of its own."""


def short_of_storage(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def with_not_a_number(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[t.numel() // 2] = float("nan")
    return t


KINDS = {
    "negative view": torch._neg_view,
    "imaginary part of a conjugate": lambda t: torch.complex(t, -t).conj().imag,
    "conjugate": lambda t: t.to(torch.complex64).conj(),
    "zeros without memory": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.as_nested_tensor([t]),
    "mkldnn": lambda t: t.to_mkldnn(),
    "meta": lambda t: t.to("meta"),
    "storage too small": short_of_storage,
    "expanded": lambda t: t[:1].expand_as(t),
    "transposed": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "slice": lambda t: torch.cat([t, t], -1)[..., t.shape[-1] :],
    "flipped": lambda t: t.flip(0),
    "shorter": lambda t: t[..., :-1],
    "another dimension": lambda t: t[None],
    "empty": lambda t: t[:0],
    "float64": torch.Tensor.double,
    "float16": torch.Tensor.half,
    "int8": lambda t: t.to(torch.int8),
    "subclass": lambda t: t.clone().as_subclass(Named),
    "parameter": lambda t: torch.nn.Parameter(t.clone()),
    "not a number": with_not_a_number,
}
NUMBERS = (-1, 0, 1, 3, 2**31, 2**62, 2**63 - 1, -(2**63))


def changed(draw, arguments: dict) -> dict:
    """The arguments with one of them changed: another kind of tensor, one that shares memory with another argument, or
    another number."""
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    numbers = [name for name, value in arguments.items() if isinstance(value, int)]
    if numbers and draw.random() < 0.2:
        return {**arguments, draw.choice(numbers): draw.choice(NUMBERS)}
    name = draw.choice(tensors)
    if draw.random() < 0.1:
        return {**arguments, name: arguments[draw.choice(tensors)]}
    try:
        return {**arguments, name: KINDS[draw.choice([*KINDS])](arguments[name])}
    except (RuntimeError, IndexError, NotImplementedError, AssertionError):  # torch has no such kind of this tensor
        return arguments


def values_of(arguments: dict) -> dict | None:
    """Copies of the arguments' values; None if a tensor has no finite values to compare."""
    shown = {}
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            shown[name] = value
            continue
        if value.is_meta or value.layout != torch.strided or value.is_nested or value.is_quantized:
            return None
        if value.untyped_storage().nbytes() < value.numel() * value.element_size() and 0 not in value.stride():
            return None  # cut, or without memory
        if value.is_neg() and not value.is_floating_point():
            return None  # torch cannot read it either
        plain = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg().clone()
        if plain.is_floating_point() and not torch.isfinite(plain).all():
            return None
        shown[name] = plain
    return shown


def same(before: dict, after: dict) -> bool:
    return all(not isinstance(v, Tensor) or torch.equal(v, after[k]) for k, v in before.items())


def keeps_contract(given: dict) -> bool:
    """Whether the arguments keep the part of the contract that the op does not check, because that costs too much."""
    gram, bitmap = given.get("gram"), given.get("bitmap")
    if gram is not None:
        return torch.equal(gram, gram.T)
    if bitmap is not None:
        counts = (bitmap[..., None] >> torch.arange(8)).bitwise_and(1).sum((1, 2))
        if "codes" in given:
            counts = (counts * given["bits"] + 7) // 8
        stored, ends = given.get("codes", given.get("values")), counts.cumsum(0)
        return len(stored) == (int(ends[-1]) if len(ends) else 0) and torch.equal(given["row_start"][1:], ends)
    return True


def one_call(draw, op: str) -> bool:
    """One call with changed arguments; returns whether it was taken."""
    make, check = OPS[op]
    arguments = make(draw)
    for _ in range(draw.choice([0, 1, 1, 1, 2])):
        arguments = changed(draw, arguments)
    before = values_of(arguments)
    error, result = None, None
    try:
        with torch.no_grad():
            result = getattr(registered(), op)(**arguments)
    except (ValueError, TypeError, RuntimeError) as raised:
        error = raised
    if error is not None:
        assert isinstance(error, ValueError), repr(error)
        assert before is None or same(before, values_of(arguments)), f"written before it was refused: {error}"
        return False
    after = values_of(arguments)
    if before is not None and after is not None and keeps_contract(before):  # after: what overflowed cannot be compared
        check(before, after, result)
    return True


class Draw(random.Random):
    """Random numbers of Python and of torch from one seed."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.tensors = torch.Generator().manual_seed(seed)


def test_the_table_has_every_op():
    registered()
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ace_ext::")}
    assert names == {f"ace_ext::{op}" for op in OPS}


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op):
    taken = sum(one_call(Draw(seed), op) for seed in range(CALLS))
    assert 0 < taken < CALLS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("kind", [*KINDS][:11])
def test_every_tensor_of_another_kind(op, kind):
    """Each argument in turn: refused by a message that names it."""
    arguments = OPS[op][0](Draw(5))
    seen = 0
    for name in [name for name, value in arguments.items() if isinstance(value, Tensor) and value.numel()]:
        try:
            other = KINDS[kind](arguments[name])
        except (RuntimeError, IndexError):
            continue  # torch has no such kind of this dtype
        if kind == "meta" and sum(isinstance(value, Tensor) for value in arguments.values()) == 1:
            continue  # it is taken: no values, no result
        with pytest.raises(ValueError, match=rf"^{op}: \w+ must .*\(got .*\)$") as caught, torch.no_grad():
            getattr(registered(), op)(**{**arguments, name: other})
        assert kind == "meta" or f"{op}: {name} must" in str(caught.value)
        seen += 1
    assert seen or kind in ("sparse rows", "quantized", "mkldnn", "imaginary part of a conjugate", "meta")


def test_what_is_written_shares_no_memory():
    state = torch.zeros(3, 8)
    with pytest.raises(ValueError, match="update_moments_: mean must not share memory with m2"):
        ops.update_moments_(torch.zeros(()), state[0], state[0], torch.ones(4, 8))
    with pytest.raises(ValueError, match="update_moments_: weight_sum must not share memory with mean"):
        ops.update_moments_(state[0, 0], state[0], state[1], torch.ones(4, 8))
    ops.update_moments_(torch.zeros(()), state[0], state[1], torch.ones(4, 8))
    work = torch.ones(4, 12)
    factor, mask = torch.eye(4), torch.zeros(4, 4, dtype=torch.bool)
    ops.obs_block_(work[:, :4], work[:, 4:8], mask, factor)  # side by side in one matrix
    with pytest.raises(ValueError, match="obs_block_: weight must not share memory with error"):
        ops.obs_block_(work[:, :4], work[:, 3:7], mask, factor)
    with pytest.raises(ValueError, match="prune_topk_: weight must not share memory with column"):
        ops.prune_topk_(work, "scaled", 3, column=work[0])


def test_vmap_is_refused_or_right():
    weights = torch.randn(3, 4, 8)
    expected = torch.stack([ops.score(w, "magnitude") for w in weights])
    assert torch.equal(torch.func.vmap(lambda w: ops.score(w, "magnitude"))(weights), expected)
    before = weights.clone()
    with pytest.raises(RuntimeError, match="Batching rule not implemented for ace_ext::prune_topk_"):
        torch.func.vmap(lambda w: ops.prune_topk_(w, "magnitude", 2))(weights)
    assert torch.equal(weights, before)


def results_with(threads: int) -> dict[str, list[Tensor]]:
    """For every op whose contract says so, on matrices that are divided among threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        draw = Draw(1)
        weight, x = matrix(draw, 300, 512, torch.float32), matrix(draw, 700, 512, torch.bfloat16)
        kinds = {formula: formula_arguments(formula, weight, draw.tensors) for formula in FORMULAS}
        mask, cosines = boolean(draw, 300, 512), {}
        for formula, given in kinds.items():
            pruned, by_matrix, by_group = weight.clone(), weight.clone(), weight.clone()
            cut = [ops.prune_topk_(pruned, formula, 200, **given)]
            cut.append(ops.prune_topk_(by_matrix, formula, 70000, **given, group="matrix"))
            ops.prune_nm_(by_group, formula, 2, 4, **given)
            counts = registered().score_histogram(weight, formula, 0, 0, **given)
            cosines[formula] = [ops.score(weight, formula, **given), pruned, by_matrix, by_group, *cut, counts]
        state = [torch.zeros(()), torch.zeros(512), torch.zeros(512)]
        ops.update_moments_(*state, x)
        mean, variance = state[1], state[2] / 700
        balanced, swapped, restored = mask.clone(), mask[:20].clone(), weight.clone()
        swaps = [ops.balance_mean_(balanced, weight, variance, mean, rounds=2)]
        swaps.append(ops.refine_swaps_(swapped, weight[:20], gram(draw, 512), max_swaps=5))
        ops.restore_mean_(restored, mask, mean, mean / variance.clamp_min(1e-3))
        work, error = weight[:, :64].clone(), torch.zeros(300, 64)
        ops.obs_block_(work, error, mask[:, :64].clone(), torch.eye(64) + 0.01)
        norms = [ops.inverse_square_norm(x)]
        return {**cosines, "others": [*state, balanced, swapped, restored, work, error, *swaps, *norms]}
    finally:
        torch.set_num_threads(before)


def test_results_do_not_depend_on_the_number_of_threads():
    one, three = results_with(1), results_with(3)
    for kind, tensors in one.items():
        for a, b in zip(tensors, three[kind], strict=True):
            assert torch.equal(a, b), kind
