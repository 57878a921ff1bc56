"""Accuracy on downstream tasks, by lm-eval (the Language Model Evaluation Harness), if it is installed.

A task is one of lm-eval's, whose data come from the hub, a YAML file in a folder of your own, or one of
:mod:`ace_ext.data.local_tasks`, which need no data.
"""

import contextlib
import copy
import hashlib
import io
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ace_ext.data.local_tasks import LOCAL, TASKS, samples_sha256, task_of
from ace_ext.errors import InputError, one_line
from ace_ext.models.tokenizer import Tokenizer

BATCH = 8
"""Requests per forward pass."""

_FIRST = ("acc", "acc_norm", "exact_match", "f1")
"""Metrics in order of preference: the first one that a task has is shown."""


@dataclass(frozen=True)
class TaskScore:
    """A model's score on one task."""

    metric: str
    """Its name in lm-eval."""
    value: float
    samples: int
    stderr: float | None = None
    """Standard error over samples, by lm-eval; None if it gives none."""


@dataclass(frozen=True)
class Tasks:
    """The tasks of a comparison.

    Raises:
        InputError: a name is empty or given twice, or a folder or a limit is invalid.
    """

    names: tuple[str, ...] = ()
    """``local`` is replaced by the names of all local tasks."""
    folder: Path | None = None
    """A folder with YAML files of tasks."""
    limit: int | None = None
    """Samples of each task, at most."""

    def __post_init__(self) -> None:
        whole = [tuple(TASKS) if name == LOCAL else (name,) for name in self.names]
        object.__setattr__(self, "names", tuple(name for names in whole for name in names))
        if len(set(self.names)) < len(self.names):
            raise InputError(f"tasks must each be given once (got {', '.join(self.names)})")
        if self.folder is not None and not self.folder.is_dir():
            raise InputError(f"task-path must be a folder with YAML files of tasks (got {str(self.folder)!r})")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"task-limit must be at least 1 (got {self.limit})")
        if not self.names and (self.folder is not None or self.limit is not None):
            raise InputError("task-path and task-limit are for tasks: give --tasks too")

    def settings(self) -> dict[str, Any]:
        """All that the figures depend on, as JSON values; empty without tasks."""
        if not self.names:
            return {}
        files = {} if self.folder is None else _hashes(self.folder)
        files |= {name: samples_sha256(name) for name in self.names if name in TASKS}
        version = _harness().__version__
        return {"tasks": list(self.names), "task_files": files, "task_limit": self.limit, "lm_eval": version}

    def check(self) -> None:
        """Checks that lm-eval is installed and knows every task. Call it before any work.

        Raises:
            InputError: lm-eval or a task is missing; the message names the first.
        """
        if self.names:
            _harness()
            self._manager()

    def scores(self, model: nn.Module, tokenizer: Tokenizer) -> dict[str, TaskScore]:
        """The scores of a model, by task.

        Raises:
            InputError: a task cannot be read, or its data cannot be fetched.
        """
        if not self.names:
            return {}
        harness, manager = _harness(), self._manager()
        tasks = [task_of(name) if name in TASKS else name for name in self.names]
        from lm_eval.models.huggingface import HFLM

        try:
            with _quiet():
                wrapped = HFLM(
                    pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH
                )  # it adds a pad token
                found = harness.simple_evaluate(
                    model=wrapped,
                    tasks=tasks,
                    task_manager=manager,
                    limit=self.limit,
                    log_samples=False,
                )
            return {name: _score(name, found) for name in self.names}
        except InputError:
            raise
        except Exception as error:  # from a task's own code, its data or the hub
            raise InputError(f"tasks {', '.join(self.names)} could not be evaluated: {one_line(error)}") from error

    def _manager(self) -> Any:
        """lm-eval's index of tasks: only the folder's tasks if they suffice, else lm-eval's own too."""
        names = {name for name in self.names if name not in TASKS}
        from lm_eval.tasks import TaskManager

        place = None if self.folder is None else str(self.folder)
        try:
            with _quiet():
                manager = TaskManager(include_path=place, include_defaults=False)
                if not names <= set(manager.all_tasks):
                    manager = TaskManager(include_path=place)
        except Exception as error:  # an invalid YAML file
            raise InputError(f"task-path {place!r} could not be read: {one_line(error)}") from error
        missing = sorted(names - set(manager.all_tasks))
        if missing:
            raise InputError(
                f"tasks: lm-eval knows no task {missing[0]!r}; `lm_eval ls tasks` lists its own, --task-path names a "
                f"folder with yours, {LOCAL} needs neither"
            )
        return manager


def _harness() -> Any:
    try:
        import lm_eval
    except ImportError as error:
        raise InputError(f"tasks need lm-eval: pip install 'lm-eval[hf]' ({one_line(error)})") from error
    return lm_eval


def _score(name: str, found: dict[str, Any]) -> TaskScore:
    """The score of a task, from lm-eval's ``{"metric,filter": value}``."""
    values = {
        key: value
        for key, value in found["results"].get(name, {}).items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    if not values:
        raise InputError(f"tasks: lm-eval reports no score for {name!r}; name its subtasks instead")
    by_metric = {key.split(",")[0]: key for key in reversed(values)}
    metric = next((metric for metric in _FIRST if metric in by_metric), next(iter(values)).split(",")[0])
    key = by_metric[metric]
    error = found["results"][name].get(key.replace(",", "_stderr,", 1))
    counts = found.get("n-samples", {})
    own = [name] if name in counts else found.get("group_subtasks", {}).get(name, [])
    samples = sum(int(counts[one]["effective"]) for one in own if one in counts)
    return TaskScore(metric, float(values[key]), samples, float(error) if isinstance(error, int | float) else None)


def _hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder of tasks, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def _silent_children() -> Iterator[None]:
    """Gives child processes no stderr: they inherit the file descriptor, not ``sys.stderr``."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences lm-eval's notes and bars on stderr, also those of the ``git`` that it calls: outside a repository git
    prints ``fatal``. It also stops the message to the hub with which datasets counts its uses, even of local files."""
    from datasets import config
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    logger, bars, counts = logging.getLogger("lm_eval"), is_progress_bar_enabled(), config.HF_UPDATE_DOWNLOAD_COUNTS
    level = logger.level
    logger.setLevel(logging.ERROR)
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()), _silent_children():
            yield
    finally:
        config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        logger.setLevel(level)
        if bars:
            enable_progress_bar()
