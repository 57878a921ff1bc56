"""Checks of the numbers that ask for calibration samples, and the random generator that a seed stands for."""

from numbers import Integral

import torch

from ace_ext.errors import InputError


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator of its own, so that torch's global random state is left alone."""
    return torch.Generator().manual_seed(int(seed))


def check_request(nsamples: int, seqlen: int, seed: int) -> None:
    """Checks the number of samples, the tokens of each, and the seed.

    Raises:
        InputError: one is no whole number, or out of range.
    """
    check_int("nsamples", nsamples, 1)
    check_int("seqlen", seqlen, 2, "; a window of one token attends to nothing but itself and predicts nothing")
    check_int("seed", seed, 0)
    if seed >= 2**63:
        raise InputError(f"seed: {seed} found; use a whole number from 0 to 2**63 - 1")


def check_int(name: str, value: int, least: int, why: str = "") -> None:
    """Raises :class:`InputError` for a value that is no whole number from ``least`` on; ``why`` ends the message."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: {value!r} found; use a whole number of at least {least}{why}")
