"""Hidden states in memory and in files read the same, and are complete on the disk before a state refers to them."""

import pytest
import torch

from ace_ext import InputError
from ace_ext.models.hidden_states import HiddenStates

KINDS = {"memory": (False, True), "both": (True, True), "files": (True, False)}


def batches(dtype=torch.bfloat16, seed: int = 0) -> list[torch.Tensor]:
    """Batches of unequal size, like the last one of a run."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 5, 4, generator=random).to(dtype) for rows in (3, 3, 1)]


@pytest.fixture(params=KINDS)
def make(request, tmp_path):
    in_folder, resident = KINDS[request.param]
    return lambda states: HiddenStates(states, tmp_path if in_folder else None, resident)


def assert_states(states: HiddenStates, expected: list[torch.Tensor]) -> None:
    assert len(states) == len(expected)
    for i, tensor in enumerate(expected):
        assert states[i].dtype == tensor.dtype
        assert torch.equal(states[i], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(make, dtype):
    states = make(iter(batches(dtype)))
    assert_states(states, batches(dtype))
    assert states.nbytes == 7 * 5 * 4 * dtype.itemsize


def test_a_turn_brings_what_was_put(make):
    states = make(batches())
    for seed in (1, 2, 3):
        for i, tensor in enumerate(batches(seed=seed)):
            states.put(i, tensor)
        states.commit()
        assert_states(states, batches(seed=seed))


def test_batches_may_be_put_in_any_order_and_not_contiguous(make):
    states = make([torch.zeros(2, 3), torch.zeros(2, 3)])
    new = torch.arange(12.0).view(2, 3, 2).permute(2, 0, 1)
    for i in (1, 0):
        states.put(i, new[i])
    states.commit()
    assert_states(states, list(new))


def test_in_files_the_block_reads_what_entered_it_until_the_turn(tmp_path):
    states = HiddenStates(batches(), tmp_path, resident=False)
    states.put(0, batches(seed=1)[0])
    assert torch.equal(states[0], batches()[0])


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_reopened_is_what_entered_the_block_that_was_cut_off(resident, turns, tmp_path):
    states = HiddenStates(batches(), tmp_path, resident)
    for seed in range(1, turns + 1):
        for i, tensor in enumerate(batches(seed=seed)):
            states.put(i, tensor)
        states.commit()
    for i in range(2):  # the next block was at its second batch
        states.put(i, batches(seed=9)[i])
    for again in (resident, not resident):
        reopened = HiddenStates.reopen(states.layout, turns % 2, tmp_path, again)
        assert_states(reopened, batches(seed=turns))


@pytest.mark.parametrize("resident", [True, False])
def test_a_fork_goes_its_own_way(resident, tmp_path):
    states = HiddenStates(batches(), tmp_path, resident)
    fork = states.fork("other")
    for i, tensor in enumerate(batches(seed=1)):
        fork.put(i, tensor)
    fork.commit()
    assert_states(states, batches())
    assert_states(fork, batches(seed=1))


def test_an_older_longer_file_does_not_shine_through(tmp_path):
    HiddenStates([torch.ones(9, 9)], tmp_path, resident=False)
    assert_states(HiddenStates(batches(), tmp_path, resident=False), batches())


@pytest.mark.parametrize("resident", [True, False])
def test_what_is_brought_to_the_disk_later_has_its_checksum(resident, tmp_path):
    """Also over an older file that is longer; and a changed byte is named."""
    path = tmp_path / "hidden-1.bin"
    path.write_bytes(b"older" * 1000)
    states = HiddenStates(batches(), tmp_path, resident)
    for i, tensor in enumerate(batches(seed=1)):
        states.put(i, tensor)
    bring = states.commit_later()
    with pytest.raises(InputError, match=r"hidden-1\.bin has changed .*checksum differs"):
        HiddenStates.reopen(states.layout, 1, tmp_path, resident)
    bring()
    assert_states(HiddenStates.reopen(states.layout, 1, tmp_path, resident), batches(seed=1))
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"hidden-1\.bin has changed .*checksum differs"):
        HiddenStates.reopen(states.layout, 1, tmp_path, resident)


def test_a_short_file_is_named(tmp_path):
    states = HiddenStates(batches(), tmp_path, resident=False)
    path = tmp_path / "hidden-0.bin"
    path.write_bytes(path.read_bytes()[:-33])
    states[1]
    with pytest.raises(
        InputError, match=r"hidden-0\.bin ends before the states of batch 2; start over without --resume"
    ):
        states[2]


def test_files_hold_no_more_than_the_states(tmp_path):
    states = HiddenStates(batches(), tmp_path, resident=False)
    for i, tensor in enumerate(batches(seed=1)):
        states.put(i, tensor)
    states.commit()
    assert {f.name: f.stat().st_size for f in tmp_path.iterdir()} == {
        "hidden-0.bin": states.nbytes + 32,  # a checksum
        "hidden-1.bin": states.nbytes + 32,
    }
