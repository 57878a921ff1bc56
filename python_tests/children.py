"""What tests run in processes of their own: functions of a module that such a process can import by name."""

import contextlib
import os

import torch

from ace_ext.cli.main import main
from ace_ext.runs import heal, heal_journal


def heal_saving_often(arguments, parts, resident, states):
    """``ace-prune heal`` with one thread, which saves its state after each step, and with a given division."""
    torch.set_num_threads(1)
    heal_journal.SAVE_SECONDS = heal_journal.SAVE_SHARE = 0
    heal.HealDemand.divide = lambda *_: (heal.Division(parts, resident, states), heal.Estimate())
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        raise SystemExit(main(arguments))
