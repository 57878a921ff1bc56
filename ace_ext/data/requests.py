"""From text to token windows: what a model is calibrated on and evaluated on."""

from numbers import Integral

import torch

from ace_ext.errors import InputError


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def _check_request(nsamples: int, seqlen: int, seed: int) -> None:
    _check_int("nsamples", nsamples, 1)
    _check_int("seqlen", seqlen, 2, "; a window of one token attends to nothing but itself and predicts nothing")
    _check_int("seed", seed, 0)
    if seed >= 2**63:
        raise InputError(f"seed: {seed} found; use a whole number from 0 to 2**63 - 1")


def _check_int(name: str, value: int, least: int, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: {value!r} found; use a whole number of at least {least}{why}")
