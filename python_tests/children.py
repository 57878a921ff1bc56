"""What tests run in processes of their own: functions of a module that such a process can import by name."""

import contextlib
import os
import sys
from pathlib import Path

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


def one_of_ranks(arguments, rank, size, port, place: Path, script):
    """``ace-prune`` with these arguments, or a script, as one of the processes that torchrun starts. What it prints
    goes to files in ``place``."""
    for stream in (1, 2):
        os.dup2(os.open(place / f"{rank}-{stream}", os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.argv = ["ace-prune", *arguments]
    exec(script or "raise SystemExit(main(sys.argv[1:]))", {"__name__": "__main__", "main": main, "sys": sys})
