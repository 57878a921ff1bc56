"""What a benchmark measures, and who is told how it proceeds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ace_ext.errors import InputError
from ace_ext.models.location import ModelLocation, as_input_error


@dataclass(frozen=True)
class BenchSettings:
    """How much is measured.

    Raises:
        InputError: a number that is not positive.
    """

    tokens: int = 16
    """New tokens of each decoding run."""
    rounds: int = 5
    """Runs of each model; medians are reported."""
    batches: tuple[int, ...] = (1, 4, 16)
    prompt: int = 8
    """Tokens before the new ones."""
    prefill: int = 512
    """Tokens of a prefill, or what the model takes at most."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if min(value if isinstance(value, tuple) else (value,), default=0) < 1:
                raise InputError(f"{name} must be positive (got {value})")

    def prefill_within(self, positions: int | None) -> int:
        """Tokens of the prefill of a model with so many positions (None: no limit).

        Raises:
            InputError: decoding takes more positions.
        """
        if positions is None:
            return self.prefill
        if self.prompt + self.tokens > positions:
            raise InputError(
                f"tokens: {self.tokens} after a prompt of {self.prompt} found, but the model has {positions} "
                "positions; use fewer"
            )
        return min(self.prefill, positions)

    @property
    def runs(self) -> int:
        """Runs of one model, those that are not counted included."""
        return (len(self.batches) + 1) * (1 + self.rounds)


@dataclass(frozen=True)
class BenchProgress:
    """Is told how the work proceeds."""

    phase: Callable[[str], None] = lambda _: None
    """Called with what is measured next."""
    step: Callable[[], object] = lambda: None
    """Called after each load and each run."""


def text_config_of(folder: str | Path) -> Any:
    """The configuration of the language part of a folder's model.

    Raises:
        InputError: it cannot be read.
    """
    with as_input_error(f"model {str(folder)!r} could not be read"):
        return ModelLocation(str(Path(folder).expanduser())).config().get_text_config()
