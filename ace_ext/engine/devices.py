"""Which device a run uses."""

import torch

from ace_ext.engine.distributed import launched, number_of
from ace_ext.errors import InputError
from ace_ext.ops._extension import build_info


def pick_device(name: str) -> torch.device:
    """The device of a name. ``auto`` is the GPU if there is one and the extension was built for it, else the CPU. A GPU
    without a number is, in a process that ``torchrun`` started, the GPU of the process's local rank.

    Raises:
        InputError: the name is not a device, or the device cannot be used on this machine.
    """
    usable = torch.cuda.is_available() and build_info()["cuda"] is not None
    if name == "auto":
        name = "cuda" if usable else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"device must be auto, cpu or cuda (got {name!r})") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not usable):
        why = "torch sees no GPU" if not torch.cuda.is_available() else "ace_ext was built CPU-only; see README"
        raise InputError(f"device {name!r} cannot be used here ({why}); use --device cpu")
    if device == torch.device("cuda") and launched():
        return torch.device("cuda", number_of("LOCAL_RANK", 0))
    return device
