"""Which device a run uses, and on which devices it asks for what its ops met."""

import pytest
import torch

from ace_ext import ops
from ace_ext.engine import devices
from ace_ext.engine.distributed import Alone
from ace_ext.engine.matrix_pruner import MatrixPruner
from ace_ext.errors import InputError
from ace_ext.pruning.config import PruneConfig


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which torch sees a GPU and the extension was built for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "build_info", lambda: {"cuda": "13.0"})
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_each_process_of_torchrun_takes_its_own_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.pick_device(name) == torch.device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.pick_device(name) == torch.device("cuda", 1)


@pytest.mark.usefixtures("two_gpus")
def test_a_named_device_is_taken_as_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.pick_device("cuda:0") == torch.device("cuda", 0)
    assert devices.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="auto, cpu or cuda"):
        devices.pick_device("gpu")


def test_the_flag_is_read_on_every_device_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def take(device: torch.device) -> str:
        asked.append(device)
        return "prune_nm_" if device.type == "meta" else ""

    monkeypatch.setattr(ops, "take_not_finite", take)
    pruner = MatrixPruner(PruneConfig("wanda"), Alone(), torch.device("cpu"))
    pruner.check("layers.0", [torch.ones(1), torch.ones(1)])
    assert asked == [torch.device("cpu")]
    asked.clear()
    with pytest.raises(InputError, match=r"layers\.0: prune_nm_ met NaN"):
        pruner.check("layers.0", [torch.ones(1, device="meta"), torch.ones(1), torch.ones(1, device="meta")])
    assert asked == [torch.device("cpu"), torch.device("meta")]
