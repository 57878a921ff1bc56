"""Estimates of memory grow with the sizes, and agree with what solvers and runs hold."""

import contextlib
import ctypes
import gc
import itertools
from collections.abc import Iterator

import pytest
import torch
import transformers
from helpers import rest_nightly
from tiny_models import VOCABULARY, make_model, make_tokens
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import ProfilerActivity, profile

from ace_ext import PruneConfig, prune_model
from ace_ext.data.bos import WINDOW_TOKENS, WINDOWS, perplexity_of
from ace_ext.engine import model_shape
from ace_ext.engine.context import RunContext
from ace_ext.engine.matrix_pruner import MatrixPruner
from ace_ext.healing import HealSettings, distill_
from ace_ext.healing.batches import Batches
from ace_ext.healing.context import HealContext
from ace_ext.models import products
from ace_ext.models.block_store import ResidentBlocks
from ace_ext.models.blocks import find_blocks
from ace_ext.models.hidden_states import HiddenStates
from ace_ext.models.whole_forward import whole_logits
from ace_ext.pruning import gram
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.prune_linear import prune_linear_, working_bytes
from ace_ext.pruning.sketch import SketchState
from ace_ext.pruning.stages import Score, admm, quantize, thanos
from ace_ext.pruning.statistics import LinearStatistics, MomentState
from ace_ext.runs.heal_memory import Division, HealDemand
from ace_ext.runs.memory_model import estimate


def need(config=None, nsamples=8, seqlen=16, model=None, **options):
    model = model or make_model("llama", torch.bfloat16)
    options = {"offload": False, "process": 0, **options}
    return estimate(model, find_blocks(model), None, config or PruneConfig("wanda"), nsamples, seqlen, **options)


def test_estimate_counts_what_is_there():
    """Llama: 64 x 32 embedding and head, 3 blocks of 32 x 32 twice, 16 x 32 twice, 48 x 32 three times, and norms."""
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    found = need(PruneConfig("collect(order=block) + cosp"))
    assert found.model == 2 * (2 * 64 * 32 + 3 * block + 32)
    assert found.hidden == 2 * 8 * 16 * 32
    assert found.statistics > 4 * (block - 2 * 32)  # the cross moment of each Linear, float32
    assert found.total == sum(found.parts().values())


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"nsamples": 8}, {"nsamples": 64}),
        ({"seqlen": 16}, {"seqlen": 64}),
        (
            {"config": PruneConfig("collect(batch_tokens=16) + wanda")},
            {"config": PruneConfig("collect(batch_tokens=64) + wanda")},
        ),
        ({"config": PruneConfig("magnitude")}, {"config": PruneConfig("wanda")}),
        ({"config": PruneConfig("wanda")}, {"config": PruneConfig("norm-cosvar")}),
        ({"config": PruneConfig("norm-cosvar")}, {"config": PruneConfig("cosp")}),
        ({"config": PruneConfig("cosp")}, {"config": PruneConfig("collect(order=block) + cosp")}),
        ({"config": PruneConfig("collect(order=block) + cosp")}, {"config": PruneConfig("cosp", group="model")}),
        ({"config": PruneConfig("wanda")}, {"config": PruneConfig("wanda + swaps")}),
        ({"config": PruneConfig("wanda + swaps")}, {"config": PruneConfig("admm")}),
        ({"config": PruneConfig("admm")}, {"config": PruneConfig("collect(batch_tokens=64) + admm")}),
        ({"config": PruneConfig("admm")}, {"config": PruneConfig("collect(order=block) + admm")}),
        ({"config": PruneConfig("admm")}, {"config": PruneConfig("admm + train(epochs=1)")}),
        ({"config": PruneConfig("wanda")}, {"config": PruneConfig("allocate + wanda")}),
        ({"resident_hidden": False}, {"resident_hidden": True}),
        (
            {"config": PruneConfig("collect(batch_tokens=64) + wanda")},
            {"config": PruneConfig("collect(batch_tokens=64) + wanda"), "keeps_forwards": True},
        ),
        ({"offload": True, "nsamples": 1}, {"offload": True, "nsamples": 1, "overlap": True}),
        ({"offload": True}, {"offload": False}),
        ({"nsamples": 1}, {"nsamples": 1, "measures": True}),
    ],
    ids=lambda value: "",
)
def test_estimate_grows(less, more):
    assert need(**less).total < need(**more).total


def test_more_samples_than_a_batch_cost_hidden_states_alone():
    config = PruneConfig("collect(batch_tokens=64) + wanda")
    few, many = need(config, nsamples=8), need(config, nsamples=80)
    assert many.total - few.total == many.hidden - few.hidden == 72 * 16 * 32 * 2


def test_a_tied_head_is_counted_once():
    untied, tied = need(model=make_model("llama")), need(model=make_model("llama-tied"))
    assert untied.model - tied.model == 64 * 32 * 4


def test_offload_holds_the_embedding_only_at_the_entrance():
    """With a large vocabulary and few tokens the phase "enter", with embedding and a block, holds most."""
    model = make_model("llama", torch.bfloat16)
    model.resize_token_embeddings(4096)
    block = sum(p.nbytes for p in model.model.layers[0].parameters())
    outside = sum(p.nbytes for p in [model.model.embed_tokens.weight, model.model.norm.weight])
    entering = need(model=model, nsamples=1, offload=True)
    assert (entering.phase, entering.model) == ("enter", block + outside)
    pruning = need(model=model, nsamples=4096, offload=True)
    assert (pruning.phase, pruning.model) == ("prune", block)


def convert(monkeypatch, *dtypes):
    """Makes this CPU slow at these dtypes."""
    for module in (products, model_shape):
        monkeypatch.setattr(module, "slow_dtypes", lambda: frozenset(dtypes))


@pytest.mark.parametrize("slow", [(), (torch.bfloat16,)], ids=["native", "converted"])
def test_measuring_for_the_bos_token_holds_logits(slow, monkeypatch):
    """A forward pass of the whole model; from the disk, the model is not in memory while losses are computed. Where a
    CPU is slow at its dtype, most is held while the head's product is converted."""
    convert(monkeypatch, *slow)
    model = make_model("llama", torch.bfloat16)
    model.resize_token_embeddings(4096)
    model.config.max_position_embeddings = 256
    resident, disk = (need(model=model, nsamples=1, seqlen=2, measures=True, offload=part) for part in (False, True))
    assert (resident.phase, disk.phase) == ("bos", "bos")
    outside = sum(p.nbytes for p in [model.model.embed_tokens.weight, model.model.norm.weight])
    assert resident.model == sum(p.nbytes for p in model.parameters())
    assert disk.model == (outside if slow else 0)
    windows = torch.zeros(2 * WINDOWS, WINDOW_TOKENS + 1, dtype=torch.long)

    def measure():
        logits = whole_logits(model, ResidentBlocks(find_blocks(model)), windows, torch.device("cpu"))
        perplexity_of(logits[:1], windows[:1])

    found = resident.total - resident.model
    if slow:  # the activations of a block, which are counted too, are freed before the head's product
        found -= resident.forward
    assert found == pytest.approx(peak_of(measure), rel=0.01)
    assert resident.total - resident.model == disk.total - disk.model


def test_the_process_is_measured_unless_given():
    assert need(process=None).process >= 10**8


def test_a_callables_scores_are_counted():
    assert working_bytes(PruneConfig(Score(lambda weight, stats: weight.abs())), 7, 5) > working_bytes(
        PruneConfig("wanda"), 7, 5
    )


def test_description_names_the_largest_first():
    assert need(process=3 * 10**9).describe().startswith("process 3.00 GB")


# Against what is allocated: every tensor's bytes as the profiler saw them come and go.


def peak_of(work) -> int:
    """The peak of bytes of tensors that ``work()`` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # a chrome trace has the same, in seconds for large ones
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    peak = max(itertools.accumulate(size for _, size in changes))
    del events, profiler
    return_small_allocations()
    return peak


@pytest.fixture(scope="module", autouse=True)
def _older_objects_are_no_garbage() -> Iterator[None]:
    """Collecting after each test takes a third of a second if it searches all that was imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def return_small_allocations() -> None:
    """Gives what the profiler freed back to the system: glibc keeps such small allocations, over the tests of this file
    9 GB, and then later tests of the same process have too little memory."""
    gc.collect()
    with contextlib.suppress(AttributeError, TypeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


SOLVERS = [
    {"method": "obs", "group": "row"},
    {"method": "admm"},
    {"method": "admm", "pattern": "2:4"},
    {"method": "admm(gram=sketch)"},
    {"method": "alps(iterations=6)"},
    {"method": "thanos"},
    {"method": "wanda + dsnot"},
    {"method": "wanda + mean-swaps"},
    {"method": "wanda + mean-update"},
    {"method": "wanda + swaps(max_swaps=2) + admm"},
    {"method": "admm + quantize"},
    {"method": "quantize(group=64, sweeps=0)"},
]
IN_PARTS = [
    (setting, parts)
    for setting in SOLVERS
    if "admm" in setting["method"] and "quantize" not in setting["method"]  # whose final weight is counted in float32
    for parts in (3, 40)
]
FEWER = [
    {"method": "admm"},
    {"method": "wanda + dsnot"},
    {"method": "admm + quantize"},
    {"method": "obs", "group": "row"},
]
IN_CI = [*((setting, 1) for setting in FEWER), *IN_PARTS[:2]]


@pytest.mark.parametrize("shape", rest_nightly([(2048, 256)], [(128, 512), (2048, 256)]), ids=["wide", "tall"])
@pytest.mark.parametrize(
    ("setting", "parts"),
    rest_nightly(IN_CI, [*((setting, 1) for setting in SOLVERS), *IN_PARTS], several=True),
    ids=str,
)
def test_a_solver_holds_what_is_estimated(setting, shape, parts, monkeypatch):
    """Counts tensors only, so neither the rows that swaps copies nor what oneDNN copies for a product in bfloat16. With
    AMX that is as large as the matrix up to 512 columns, and 7 MB a thread at most with 4,096. The estimate is that of
    products in float32."""
    monkeypatch.setattr(admm, "slow_dtypes", lambda: frozenset({torch.bfloat16}))
    monkeypatch.setattr(gram, "LOSS_ROWS", 16)  # of a real matrix these are a small part
    monkeypatch.setattr(gram, "MASKED_AT_ONCE", 2**10)
    monkeypatch.setattr(admm, "PART_ENTRIES", shape[0] * shape[1] // parts)
    monkeypatch.setattr(quantize, "PART_ENTRIES", shape[0] * shape[1] // parts)
    monkeypatch.setattr(thanos, "PART_ENTRIES", shape[0] * shape[1] // 4)
    config = PruneConfig(**setting)
    weight, x = torch.randn(shape).bfloat16(), torch.randn(512, shape[1])
    state = (SketchState if "sketch" in setting["method"] else GramState)(shape[1])
    stats = LinearStatistics(*(MomentState(shape[1]) for _ in range(2)), None, state, 512, [x])
    stats.input.update(x)
    stats.weighted.update(x, torch.ones(len(x)))
    stats.gram.update(x)
    with torch.backends.mkldnn.flags(enabled=False):
        peak = peak_of(lambda: prune_linear_(weight, stats, config))
    assert 1 <= working_bytes(config, *shape) / peak < 1.1


def make_wide_model():
    """So wide that matrices take more memory than sample rows."""
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **shape)).eval()
    return model.to(torch.bfloat16)


RUNS = [
    {},
    {"method": "collect(batch_tokens=256) + wanda"},
    {"method": "cosp"},
    {"method": "collect(order=block) + cosp"},
    {"group": "matrix"},
    {"group": "model"},
    {"method": "wanda + swaps"},
    {"method": "wanda + mean-swaps + mean-update"},
    {"method": "obs", "group": "row"},
    {"method": "admm"},
    {"method": "admm(gram=cosine)"},
    {"method": "admm(gram=sketch)"},
    {"method": "collect(batch_tokens=256) + admm"},
    {"method": "collect(batch_tokens=256) + admm(gram=cosine)"},
    {"method": "collect(order=block) + admm"},
    {"method": "collect(order=block) + admm(gram=cosine)"},
    {"method": "admm + train(epochs=1)"},
    {"method": "admm + quantize"},
    {"method": "quantize"},
    {"method": "collect(batch_tokens=256) + wanda + train(epochs=1)"},
    {"method": "allocate + wanda"},
]


@pytest.mark.parametrize("setting", RUNS, ids=str)
def test_a_run_holds_no_more_than_estimated(setting):
    """And not far less. The estimate does not know which Linears read the same input, so it counts a shared Gram matrix
    several times. What training holds was measured as the growth of processes, which is more than its tensors."""
    model = make_wide_model()
    config, tokens = PruneConfig(**{"method": "wanda", **setting}), make_tokens(16, 64)
    found = need(config, *tokens.shape, model=model)
    context = RunContext(keeps_forwards=False)
    peak = peak_of(lambda: prune_model(model, tokens, config, context=context))
    assert 1 <= (found.total - found.model) / peak < 2.2


@pytest.mark.parametrize(
    "setting", [{}, {"method": "collect(batch_tokens=256) + admm"}, {"method": "wanda + train(epochs=1)"}], ids=str
)
def test_a_run_that_converts_holds_no_more_than_estimated(setting, monkeypatch):
    convert(monkeypatch, torch.bfloat16)
    test_a_run_holds_no_more_than_estimated(setting)


def live_bytes() -> int:
    """Bytes of all tensors that Python objects hold, those of waiting forwards too. A compiler's fake tensors have
    none."""
    found = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not issubclass(type(t), FakeTensor)]
    tensors = [t for t in found if t.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("stays", [True, False], ids=["on-the-heap", "returned"])
def test_lockstep_holds_no_more_than_estimated(stays, monkeypatch):
    """While a matrix is pruned: hidden states, what each batch's forward holds, and statistics. Freed tensors of this
    size stay in the process, so forwards are counted with all that they held; larger ones do not."""
    if not stays:
        monkeypatch.setattr("ace_ext.engine.strategies._strategy.HEAP_TENSOR", 0)
    model, tokens, config = make_wide_model(), make_tokens(16, 64), PruneConfig("collect(batch_tokens=256) + wanda")
    held, real, before = [], MatrixPruner.prune, live_bytes()

    def prune(self, *arguments):
        held.append(live_bytes() - before)
        return real(self, *arguments)

    monkeypatch.setattr(MatrixPruner, "prune", prune)
    prune_model(model, tokens, config, context=RunContext(keeps_forwards=True))
    found = need(config, *tokens.shape, model=model, keeps_forwards=True)  # its process: stacks, which are no tensors
    assert 1 <= (found.total - found.model - found.process) / max(held) < 3


def make_mixture():
    """Many small experts: the routing is then most of what a forward holds."""
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 64}
    config = transformers.Qwen3MoeConfig(vocab_size=VOCABULARY, **shape, num_experts=64, num_experts_per_tok=8)
    return transformers.Qwen3MoeForCausalLM(config).eval().to(torch.bfloat16)


@pytest.mark.parametrize(
    "method",
    rest_nightly(
        ["wanda + train(epochs=1)"],
        ["wanda", "cosp", "admm", "collect(batch_tokens=256) + admm", "wanda + train(epochs=1)"],
    ),
)
def test_a_mixture_holds_no_more_than_estimated(method):
    model = make_mixture()
    config, tokens = PruneConfig(method), make_tokens(16, 64)
    found = need(config, *tokens.shape, model=model)
    context = RunContext(keeps_forwards=False)
    peak = peak_of(lambda: prune_model(model, tokens, config, context=context))
    assert 1 <= (found.total - found.model - found.process) / peak < 2.8  # the process: kernels, which are no tensors


@pytest.mark.parametrize("make", rest_nightly([make_wide_model], [make_wide_model, make_mixture]))
@pytest.mark.parametrize("division", [Division(), Division(graphs=2), Division(parts=2)], ids=str)
def test_a_distillation_holds_no_more_than_estimated(make, division):
    """What a block stores for its backward pass was measured as the growth of processes, which is more than its
    tensors."""
    model, tokens, settings = make(), make_tokens(17, 64), HealSettings(step_tokens=512, held_out=1)
    prune_model(model, tokens, PruneConfig("magnitude"))
    blocks = find_blocks(model)
    found = HealDemand.of(model, blocks, Batches.of(tokens, settings).tokens).peak(division, 0)
    states = HiddenStates([torch.zeros(len(part), 64, 128, dtype=torch.bfloat16) for part in tokens.split(8)])
    context = HealContext(parts=division.parts, graphs=division.graphs)
    peak = peak_of(lambda: distill_(model, states, tokens, settings, context=context))
    assert found.phase == "train"
    assert 1 <= (found.total - found.model - states.nbytes) / peak < 2.8
