"""Several processes that prune one model, as ``torchrun`` starts them, over gloo on the CPU."""

import json
import socket
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from children import one_of_ranks
from folders import TEXT, command, fork, fork_run, prune, save_dense, spawn, weights_bytes
from helpers import rest_nightly
from safetensors.torch import load_file
from tiny_models import make_tokenizer
from tiny_networks import make_network
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ace_ext import InputError, PruneConfig
from ace_ext.engine.distributed import Alone, Ranks, hash_of, share_of
from ace_ext.pruning import gram
from ace_ext.pruning.prune_linear import prune_linear_
from ace_ext.pruning.statistics import StatisticsCollector


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def torchrun(dense, output, *options, script: str | None = None, processes: int = 2):
    """``(status, stdout, stderr)`` of a run by several processes; ``script`` is run in place of the command line."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
    arguments = command(dense, output, *options, launcher=tuple(launcher))
    if script is not None:
        path = dense.parent / "script.py"
        path.write_text(script)
        arguments[arguments.index("ace_ext") - 1 : arguments.index("ace_ext") + 1] = [str(path)]
    child = spawn(arguments)
    try:
        out, err = child.communicate(timeout=240)
    except BaseException:
        child.kill()
        raise
    return child.returncode, out, err


def ranks(dense, output, *options, script: str | None = None, processes: int = 2):
    """As :func:`torchrun`, in processes that are forked from one that has imported everything. If one fails, the others
    are ended."""
    arguments, port = command(dense, output, *options)[3:], free_port()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        children = [fork(one_of_ranks, arguments, rank, processes, port, place, script) for rank in range(processes)]
        deadline = time.monotonic() + 240
        while any(child.is_alive() for child in children):
            if any(child.exitcode for child in children) or time.monotonic() > deadline:
                for child in children:
                    child.terminate()
            time.sleep(0.05)
        printed = ["".join(file.read_text() for file in sorted(place.glob(f"*-{stream}"))) for stream in (1, 2)]
    return next((child.exitcode for child in children if child.exitcode), 0), *printed


def share_differing(one, other) -> float:
    """The share of mask entries in which two outputs differ."""
    masks = []
    for folder in (one, other):
        weights = load_file(folder / "model.safetensors")
        masks.append(torch.cat([w.flatten() != 0 for n, w in sorted(weights.items()) if n.endswith("proj.weight")]))
    assert masks[0].float().mean() < 0.99
    return float((masks[0] != masks[1]).double().mean())


DIVISIONS = [
    ("--nsamples", 7, "--method", "fast"),
    ("--nsamples", 7, "--offload", "disk", "--method", "collect(batch_tokens=32) + wanda + swaps"),
    ("--nsamples", 7),
    ("--nsamples", 8, "--method", "collect(order=block) + cosp"),
    ("--nsamples", 7, "--group", "model", "--method", "collect(batch_tokens=32) + wanda"),
]


@pytest.mark.parametrize("options", rest_nightly(DIVISIONS[:2], DIVISIONS), ids=str)
def test_two_derive_the_masks_of_one(options, tmp_path):
    """Also with uneven numbers of samples. Sums over tokens are rounded in another order, so near-ties may differ."""
    dense = save_dense(tmp_path / "dense", dtype=torch.float32)
    status, out, err = ranks(dense, tmp_path / "two", *options)
    assert status == 0, err
    assert out.count("written to") == 1
    one = fork_run(command(dense, tmp_path / "one", *options)[3:])
    one.join()
    assert one.exitcode == 0
    share = share_differing(tmp_path / "one", tmp_path / "two")
    print(f"share of differing mask entries: {share:.2e}")
    assert share < 1e-5
    reports = [json.loads((tmp_path / name / "ace_report.json").read_text()) for name in ("one", "two")]
    tokens = [{m["tokens"] for block in report["blocks"] for m in block["matrices"]} for report in reports]
    assert tokens[0] == tokens[1] == {options[1] * 16}
    assert not (tmp_path / ".two.unfinished").exists()


def test_a_mixture_of_experts(tmp_path):
    """Each process routes other tokens to an expert, or none."""
    dense = save_dense(tmp_path / "dense", "qwen3-moe", torch.float32)
    status, _, err = ranks(dense, tmp_path / "two")
    assert status == 0, err
    _, one = prune(dense, tmp_path / "one")
    assert share_differing(one, tmp_path / "two") < 1e-5


@pytest.mark.nightly
def test_two_prune_an_encoder_and_a_decoder(tmp_path):
    """Each enters the decoder with its own samples and the encoder that both have pruned."""
    dense = tmp_path / "t5"
    make_network("t5").save_pretrained(dense)
    make_tokenizer().save_pretrained(dense)
    (tmp_path / "text.txt").write_text(TEXT)
    status, _, err = ranks(dense, tmp_path / "two", "--method", "collect(batch_tokens=32) + wanda", "--offload", "disk")
    assert status == 0, err
    one = fork_run(command(dense, tmp_path / "one", "--method", "collect(batch_tokens=32) + wanda")[3:])
    one.join()
    assert one.exitcode == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    blocks = [name for name, weight in weights[0].items() if ".block." in name and weight.dim() == 2]
    differing = sum(int(((weights[0][n] != 0) != (weights[1][n] != 0)).sum()) for n in blocks)
    assert differing <= 1e-3 * sum(weights[0][n].numel() for n in blocks)


@pytest.mark.nightly
def test_torchrun_writes_what_two_processes_write(tmp_path):
    """The other tests start the processes themselves, which is quicker."""
    dense = save_dense(tmp_path / "dense")
    for start, name in ((torchrun, "torchrun"), (ranks, "forked")):
        status, out, err = start(dense, tmp_path / name)
        assert status == 0, err
        assert out.count("written to") == 1
    assert weights_bytes(tmp_path / "torchrun") == weights_bytes(tmp_path / "forked")


COUNTS_WORK = """
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode
from ace_ext.engine import matrix_pruner
from ace_ext.engine.strategies import in_steps
from ace_ext.models import padded_experts
from ace_ext.pruning import gram
work = {"run_block": 0, "prune_linear_": 0}
def counted(module, name):
    real = getattr(module, name)
    def call(*arguments):
        with FlopCounterMode(display=False) as counter:
            result = real(*arguments)
        work[name] += counter.get_total_flops()
        return result
    setattr(module, name, call)
for module in (padded_experts, in_steps):
    counted(module, "run_block")
counted(matrix_pruner, "prune_linear_")
gram.power_diagonals = _disable_current_modes()(gram.power_diagonals)
status = main(sys.argv[1:])
print("work", *work.values(), flush=True)
raise SystemExit(status)
"""


def test_work_is_shared(tmp_path):
    """Each of two and of four processes runs its share of the samples, and one more with which it finds the order of
    the Linears, and solves its share of the rows. Counted in floating point operations, those of factorisations not."""
    dense = save_dense(tmp_path / "dense")
    found = {}
    for size in (1, 2, 4):
        options = ("--nsamples", 16, "--method", "collect(batch_tokens=16) + balanced")
        status, out, err = ranks(dense, tmp_path / f"{size}", *options, script=COUNTS_WORK, processes=size)
        assert status == 0, err
        found[size] = [tuple(map(int, line.split()[1:])) for line in out.splitlines() if line.startswith("work")]
        assert len(found[size]) == size
    print(found)
    ((forwards, solver),) = found[1]
    one = forwards / 17  # a batch's forward through all blocks
    for size in (2, 4):
        for own_forwards, own_solver in found[size]:
            assert own_forwards == pytest.approx((16 / size + 1) * one, rel=1e-6)
            assert own_solver < 1.1 * solver / size


COUNTS_THREADS = """
import sys
from pathlib import Path
from ace_ext.cli import main as cli
status = cli.main(sys.argv[1:])
names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
left = [name for name in names if "gloo" in name]
sys.exit(status or (f"left: {left}" if left else 0))
"""


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list a process's threads")
def test_no_thread_is_left_to_the_end_of_the_interpreter(tmp_path):
    """Such a thread may abort the process at exit, after everything is written."""
    status, _, err = torchrun(save_dense(tmp_path / "dense"), tmp_path / "out", script=COUNTS_THREADS)
    assert status == 0, err


DIES_IN_THE_THIRD_BLOCK = """
import os, sys
from ace_ext.cli import main as cli
from ace_ext.runs.workspace import Workspace
real, done = Workspace._write_state, []
def write(self, *arguments):
    if len(done) == 2:
        os._exit(9)
    done.append(None)
    real(self, *arguments)
Workspace._write_state = write
sys.exit(cli.main(sys.argv[1:]))
"""


def test_resumed_by_as_many_and_refused_by_others(tmp_path):
    dense = save_dense(tmp_path / "dense")
    status, _, _ = ranks(dense, tmp_path / "out", script=DIES_IN_THE_THIRD_BLOCK)
    assert status != 0
    assert json.loads((tmp_path / ".out.unfinished" / "state.json").read_text())["finished"] == 2
    with pytest.raises(InputError, match="resume: the unfinished run differs from this one: processes was 2, now 1"):
        prune(dense, tmp_path / "out", {"resume": True})
    status, _, err = ranks(dense, tmp_path / "out", "--resume", processes=3)
    assert status != 0
    assert "processes was 2, now 3" in err
    status, _, err = ranks(dense, tmp_path / "out", "--resume")
    assert status == 0, err
    status, _, err = ranks(dense, tmp_path / "whole")
    assert status == 0, err
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "whole")


def test_kept_statistics_are_those_of_all(tmp_path):
    dense = save_dense(tmp_path / "dense")
    status, _, err = ranks(dense, tmp_path / "two", "--save-stats", tmp_path / "stats.zip")
    assert status == 0, err
    _, again = prune(
        dense, tmp_path / "again", {"stats": tmp_path / "stats.zip"}, method="collect(order=block) + wanda"
    )
    assert weights_bytes(again) == weights_bytes(tmp_path / "two")


FAILS_ON_ONE = """
import os, sys
from ace_ext.cli import main as cli
from ace_ext.engine.walk import Walk
from ace_ext.errors import InputError
real = Walk._run_block
def run_block(self, index, training):
    if os.environ["RANK"] == "{rank}" and index == 1:
        raise InputError("this process met something bad")
    real(self, index, training)
Walk._run_block = run_block
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("start", "rank"),
    [pytest.param(torchrun, 0, marks=pytest.mark.nightly), (ranks, 0), (ranks, 1)],
    ids=["torchrun-0", "0", "1"],
)
def test_an_error_of_one_ends_all(start, rank, tmp_path):
    dense = save_dense(tmp_path / "dense")
    status, _, err = start(dense, tmp_path / "out", script=FAILS_ON_ONE.replace("{rank}", str(rank)))
    assert status != 0
    assert "ace-prune: this process met something bad" in err
    assert not (tmp_path / "out").exists()
    status, _, err = ranks(dense, tmp_path / "out", "--resume")  # the first block was done
    assert status == 0, err


KILLED = """
import os, signal, sys
from ace_ext.cli import main as cli
from ace_ext.engine.matrix_pruner import MatrixPruner
from ace_ext.engine.recorder import Recorder
from ace_ext.engine.walk import Walk
name, reports, made = "{step}", [], Recorder.__init__
owner = {"_run_block": Walk, "prune": MatrixPruner, "finish": Recorder}[name]
real = getattr(owner, name)
def init(self, report, *given):
    reports.append(report)
    made(self, report, *given)
def step(self, *given, **named):
    if os.environ["RANK"] == "{rank}" and len(reports[-1].blocks) == {block}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *given, **named)
Recorder.__init__ = init
setattr(owner, name, step)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.nightly
@pytest.mark.parametrize("step", ["_run_block", "prune", "finish"])
@pytest.mark.parametrize("block", [0, 1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed(rank, block, step, tmp_path):
    """The others end too, and a resumed run gives the same bytes and leaves nothing."""
    dense = save_dense(tmp_path / "dense")
    script = KILLED.replace("{rank}", str(rank)).replace("{block}", str(block)).replace("{step}", step)
    status, _, _ = torchrun(dense, tmp_path / "out", script=script)
    assert status != 0
    assert not (tmp_path / "out").exists()
    (tmp_path / "script.py").unlink()
    for name in ("out", "whole"):
        status, _, err = torchrun(dense, tmp_path / name, "--resume")
        assert status == 0, err
    assert weights_bytes(tmp_path / "out") == weights_bytes(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out", "text.txt", "whole"]


OTHER_MASKS = """
import os, sys
import torch
from ace_ext.cli import main as cli
from ace_ext.engine.matrix_pruner import MatrixPruner
real = MatrixPruner.prune
def prune(self, block, child, stats):
    report = real(self, block, child, stats)
    if os.environ["RANK"] == "1":
        block.linears[child].weight.data[0] = 0
    return report
MatrixPruner.prune = prune
sys.exit(cli.main(sys.argv[1:]))
"""


def test_processes_that_disagree_write_nothing(tmp_path):
    dense = save_dense(tmp_path / "dense")
    status, _, err = ranks(dense, tmp_path / "out", script=OTHER_MASKS)
    assert status != 0
    assert "model.layers.0: the processes derived different masks" in err
    assert not (tmp_path / "out").exists()


def test_bad_input_ends_all(tmp_path):
    dense = save_dense(tmp_path / "dense")
    status, _, err = ranks(dense, tmp_path / "out", "--nsamples", 1)
    assert status != 0
    assert "nsamples must be at least the number of processes, 2 (got 1)" in err


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_are_all_samples_once(size):
    tokens = torch.arange(14).view(7, 2)
    shares = [share_of(tokens, Alone(rank, size)) for rank in range(size)]
    assert sorted(torch.cat(shares)[:, 0].tolist()) == tokens[:, 0].tolist()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# Merging, on threads in place of processes


class Together(Ranks):
    """One process of a merge, simulated by a thread; calls of torch.distributed go through shared memory."""

    def __init__(self, rank: int, board: list, barrier: threading.Barrier) -> None:
        self.rank, self.size, self._device = rank, len(board), torch.device("cpu")
        self._board, self._barrier, self._dist = board, barrier, self

    def gather(self, value: object) -> list[object]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        values = list(self._board)
        self._barrier.wait(60)
        return values

    def _all(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return self.gather(tensor.clone())

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self._all(tensor)))


def test_experts_that_only_some_processes_reach():
    """Process 0 hands ``a`` and ``b`` the same tensor, as one expert's Linears; process 1 calls ``b`` alone, and
    neither reaches ``c``. Both end with the bits of all tokens, and ``a`` gets none of ``b``'s."""
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(6, 8, generator=random), torch.randn(5, 8, generator=random)
    linears = {name: nn.Linear(8, 8, bias=False) for name in "abc"}
    needs = frozenset({"input", "weighted", "moment"})
    calls = [[("a", first), ("b", first)], [("b", second)]]
    board, barrier = [None, None], threading.Barrier(2)

    @torch.no_grad()
    def one(rank: int) -> dict:
        collector = StatisticsCollector(linears, needs)
        for name, x in calls[rank]:
            collector.observe(name, x, linears[name](x))
        Together(rank, board, barrier).merge_(collector.stats, list(linears), collector.empty)
        return collector.stats

    with ThreadPoolExecutor(2) as pool:
        merged = list(pool.map(one, range(2)))
    assert [merged[0][name].tokens for name in "abc"] == [6, 11, 0]
    for name, x in (("a", first), ("b", torch.cat([first, second]))):
        for kind in ("input", "weighted"):
            states = [getattr(stats[name], kind).tensors() for stats in merged]
            assert all(torch.equal(states[0][leaf], states[1][leaf]) for leaf in states[0])
        assert torch.equal(merged[0][name].moment, merged[1][name].moment)
        assert torch.equal(torch.cat(merged[0][name].sampled), torch.cat(merged[1][name].sampled))
        torch.testing.assert_close(merged[0][name].input.mean, x.double().mean(0))
        torch.testing.assert_close(merged[0][name].input.square_sum, x.double().square().sum(0))


def together(size: int, work) -> list:
    """The results of ``work(peers)`` of so many processes, each a thread."""
    board, barrier = [None] * size, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Together(rank, board, barrier)), range(size)))


SOLVERS = [
    {"method": "wanda + swaps"},
    {"method": "wanda + swaps", "pattern": "2:4"},
    {"method": "wanda + mean-swaps + mean-update"},
    {"method": "obs", "group": "row"},
    {"method": "admm(iterations=8)"},
    {"method": "obs", "group": "matrix"},
    {"method": "admm(iterations=8) + quantize(bits=8)"},
    {"method": "quantize(bits=8)"},
]


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("setting", SOLVERS, ids=str)
def test_rows_are_shared_by_solvers(setting, size, monkeypatch):
    """Each process multiplies its share of the rows, all get the same bits, and these are those of one process up to
    the rounding of its matrix products, which depends on the number of rows. The group matrix is not shared, nor is the
    factorisation, whose products are not counted."""
    monkeypatch.setattr(gram, "power_diagonals", _disable_current_modes()(gram.power_diagonals))
    random = torch.Generator().manual_seed(0)
    weight, x = torch.randn(62, 32, generator=random), torch.randn(96, 32, generator=random)
    config = PruneConfig(**setting)

    @torch.no_grad()
    def one(peers) -> tuple[torch.Tensor, int, float]:
        linear = nn.Linear(32, 62, bias=False)
        linear.weight.copy_(weight)
        collector = StatisticsCollector({"it": linear}, config.needs.prune)
        collector.observe("it", x, linear(x))
        with FlopCounterMode(display=False) as flops:
            solution = prune_linear_(linear.weight, collector.stats["it"], config, None, peers)
        return linear.weight, flops.get_total_flops(), solution.loss_after

    (whole, work, loss), *_ = together(1, one)
    shared = together(size, one)
    for pruned, own, found in shared:
        assert torch.equal(pruned, shared[0][0])
        assert found == pytest.approx(loss, rel=1e-5)
        if setting.get("group") != "matrix":
            assert own <= work / size * 1.1
    torch.testing.assert_close(shared[0][0], whole, rtol=1e-4, atol=1e-4)
    if config.method.solve is None:  # no product of matrices decides
        assert torch.equal(shared[0][0], whole)


def test_a_hash_is_that_of_the_bytes_and_their_places(monkeypatch):
    weight = torch.randn(33, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = int(hash_of(weight))
    assert int(hash_of(weight.T.contiguous().T)) == whole, "the same values in another layout"
    monkeypatch.setattr("ace_ext.engine.distributed.HASHED_AT_ONCE", 64)
    assert int(hash_of(weight)) == whole
    others = [weight.clone() for _ in range(4)]
    others[0][32, 6] += 1
    others[1][0, :8:4] *= -1  # the highest bits of two words
    others[2][[0, 8]] = others[2][[8, 0]]
    others[3][5, 5] = -others[3][5, 5]
    assert len({whole, *(int(hash_of(other)) for other in others)}) == 5


def test_the_hash_is_splitmix():
    """Of one word, computed with Python's integers."""

    def mixed(word: int) -> int:
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            word = (word ^ (word >> shift)) * factor % 2**64
        return word

    word = -123456789012345
    expected = mixed(word % 2**64 ^ mixed(0x9E3779B97F4A7C15))
    assert int(hash_of(torch.tensor([word]))) % 2**64 == expected
