"""The base classes of stages, and the input and the result of a stage that works on one matrix.

A stage is a frozen dataclass. Its fields are its options. Its class declares the rest: name, summary, the statistics
that it reads, the comparison groups that it supports, its code, and the memory that the code needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ace_ext.errors import InputError
from ace_ext.grids import Grid
from ace_ext.models.blocks import Block
from ace_ext.pruning.gram import GramState
from ace_ext.pruning.groups import GROUPS, ComparisonGroup, PatternGroup, SparsityPattern
from ace_ext.pruning.kinds import COSINE_GRAM, GRAM, SHARED_GRAM, SKETCH
from ace_ext.pruning.moment_gram import MomentGram
from ace_ext.pruning.scaling import exponent_of, times_power, times_power_
from ace_ext.pruning.settings import Limits, Options, option
from ace_ext.pruning.sketch import SketchState
from ace_ext.records import Tuning

AUTO, PLAIN, SHARED, COSINE, SKETCHED = "auto", "plain", "shared", "cosine", "sketch"
GRAM_KINDS = {AUTO: SHARED_GRAM, PLAIN: GRAM, SHARED: SHARED_GRAM, COSINE: COSINE_GRAM, SKETCHED: SKETCH}
"""The kind of statistics that each value of the option ``gram`` reads. :class:`~ace_ext.pruning.method.Needs` replaces
that of ``auto`` and of ``sketch`` before ``quantize``."""


def gram_option(*choices: str, auto: str = "what quantize reads, shared without it") -> Any:
    """The option ``gram`` of a stage that reads a Gram matrix; the first choice is the default. ``auto``: what that
    choice means."""
    helps = {
        AUTO: f"auto: {auto}",
        PLAIN: "plain: all tokens count the same",
        SHARED: "shared: token t is weighted by about 1 / ‖A_t‖², A being the output of the input's first Linear",
        COSINE: "cosine: token t is weighted by about 1 / ‖A_t‖², A being the Linear's own output, so each Linear has "
        "its own matrix",
        SKETCHED: "sketch: shared, approximated by its diagonal and a few directions",
    }
    text = "; ".join(helps[choice] for choice in choices)
    return option(choices[0], f"the Gram matrix that measures errors ({text})", Limits(choices=choices))


def damping_option(default: float) -> Any:
    """The option ``damping`` of a stage that factorises the Gram matrix."""
    return option(
        default,
        "share of the Gram matrix's mean diagonal added to its diagonal",
        Limits(at_least=0, words="a share of the mean diagonal, 0 or more"),
    )


@dataclass(frozen=True)
class Units:
    """How float32 values that stages compute stand to a weight: it has this dtype, and values are those of the weight
    divided by ``2^power``."""

    dtype: torch.dtype = torch.float32
    power: int = 0

    def in_dtype(self, values: Tensor) -> Tensor:
        """``values`` as the weight's dtype holds them in its own units."""
        return times_power(values, self.power).to(self.dtype)

    def rounded(self, values: Tensor) -> Tensor:
        """``values`` float32, rounded to what the weight's dtype holds."""
        return values if self.dtype == torch.float32 else times_power_(self.in_dtype(values).float(), -self.power)


@dataclass
class Problem:
    """One matrix to prune. A stage may write to ``mask`` if there is one, and to nothing else.

    Very small and very large weights and statistics are divided by powers of two (:mod:`ace_ext.pruning.scaling`). The
    result of a stage must not depend on their units.
    """

    dense: Tensor  # [rows, cols] float32: the dense weight
    matrix: GramState | SketchState | None  # the Gram matrix of the inputs, or its sketch, if a stage reads it
    group: ComparisonGroup
    keep: int
    """How many weights of one group are kept."""
    mask: Tensor | None = None  # [rows, cols] bool, True where a weight is kept; None: the stage chooses
    vectors: MomentGram | None = None  # mean and variance of each input column, if a stage reads them
    units: Units = Units()
    """How ``dense`` stands to the weight, whose dtype rounds the result."""

    @classmethod
    def without_statistics(cls, weight: Tensor) -> "Problem":
        """The problem of ``weight [rows, cols]`` of any dtype, for stages that read no statistics and no target."""
        power = exponent_of(weight) or 0
        dense = times_power_(weight.detach().to(torch.float32, copy=True), -power)
        return cls(dense, None, GROUPS["row"], weight.shape[1], units=Units(weight.dtype, power))

    def of_rows(self, rows: slice) -> "Problem":
        """The problem of some of the rows. Its mask is a view of this mask."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, dense=self.dense[rows], mask=mask)

    @property
    def gram(self) -> GramState | SketchState:
        """The Gram matrix or its sketch; ValueError if it was not collected."""
        if self.matrix is None:
            raise ValueError("the stage needs the Gram matrix of the inputs (got statistics without it)")
        return self.matrix

    @property
    def moments(self) -> MomentGram:
        """Mean and variance of the input columns; ValueError if they were not collected."""
        if self.vectors is None:
            raise ValueError("the stage needs the moments of the inputs (got statistics without them)")
        return self.vectors

    @property
    def measure(self) -> GramState | SketchState | MomentGram:
        """What measures the losses in the report: the Gram matrix if it was collected, else the moments."""
        return self.moments if self.matrix is None else self.matrix

    @property
    def whole_gram(self) -> GramState:
        """The Gram matrix, for stages that cannot use a sketch."""
        assert isinstance(self.gram, GramState)  # their option gram does not offer the sketch
        return self.gram

    @property
    def pattern(self) -> SparsityPattern | None:
        """The N:M pattern; None without one."""
        return self.group.pattern if isinstance(self.group, PatternGroup) else None

    @property
    def nm(self) -> tuple[int, int]:
        """``keep_n`` and ``group_m`` as the ops take them: both 0 without a pattern."""
        return (0, 0) if self.pattern is None else (self.pattern.keep_n, self.pattern.group_m)


@dataclass(frozen=True)
class Solved:
    """A pruned weight, and how the Gram matrix was factorised."""

    weight: Tensor  # [rows, cols] float32, in the units of Problem.dense
    damping: float = 0.0  # relative to the Gram matrix's mean diagonal
    attempts: int = 0  # factorisations that were tried


def overflow(stages: str, damping: float, dtype: torch.dtype) -> InputError:
    """The error of an update that the weight's dtype cannot hold. It may be too narrow alone, such as float16."""
    wider = ", or load the model as bfloat16" if dtype == torch.float16 else ""
    return InputError(f"{stages} overflowed with damping {damping:g}; raise damping{wider}")


@dataclass(frozen=True)
class BlockSizes:
    """The sizes that determine the memory for training a block."""

    trained: int  # entries of all its Linears
    largest: int  # entries of its largest Linear
    itemsize: int  # bytes of one entry in the model's dtype
    activations: int  # bytes of one gradient step's activations


@dataclass(frozen=True)
class Stage(Options):
    """One stage of a method. Its options are fields declared with :func:`ace_ext.pruning.settings.option`."""

    name: ClassVar[str]
    """What users write."""
    summary: ClassVar[str]
    """One line for help texts, with the paper it comes from."""

    @property
    def label(self) -> str:
        """The name of this stage in a text."""
        return self.name

    def __str__(self) -> str:
        """The stage as text; :func:`ace_ext.pruning.method.parse` reads it back."""
        given = ", ".join(f"{name}={_plain(value)}" for name, value in self.changed())
        return f"{self.label}({given})" if given else self.label


def _plain(value: object) -> str:
    """A value as text; a whole float without its fraction, and any other float with all its digits."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else str(value)


class Divide(Stage):
    """Divides the sparsity among blocks, with the same total. The code is in :mod:`ace_ext.pruning.allocation`."""

    range: float
    """How far a block's sparsity may differ from the target."""


class MatrixStage(Stage):
    """A stage that works on one matrix at a time and reads its statistics.

    If ``shares_rows``, the result of a row must not depend on other rows, except with the group ``matrix``: several
    processes may take a share of the rows each.
    """

    shares_rows: ClassVar[bool] = True

    groups: ClassVar[tuple[str, ...]]
    """The comparison groups that it supports, its default first; a pattern counts as ``row``."""
    reads: ClassVar[frozenset[str]] = frozenset()
    """The kinds of statistics that it reads (:mod:`ace_ext.pruning.kinds`). The Gram matrix that its option ``gram``
    names is added."""

    @property
    def needs(self) -> frozenset[str]:
        """The kinds of statistics that it reads, with the Gram matrix that its option ``gram`` names."""
        gram = getattr(self, "gram", None)
        return self.reads if gram is None else self.reads | {GRAM_KINDS[gram]}

    def working_bytes(self, rows: int, cols: int) -> int:
        """Bytes in addition to the weight, its float32 copy, the mask and the statistics."""
        raise NotImplementedError

    def shared_bytes(self, cols: int) -> int:
        """Bytes of those ``working_bytes`` that stay with the statistics, for other Linears with the same input."""
        return 0


class Refine(MatrixStage):
    """Exchanges entries of the mask and changes no weight."""

    def refine_(self, problem: Problem) -> None:
        """Writes to ``problem.mask``."""
        raise NotImplementedError


class Solve(MatrixStage):
    """Updates kept weights to compensate for the removed ones."""

    chooses_mask: ClassVar[bool] = True
    """Whether it chooses the mask if the method has no score stage. If not, it always gets a mask."""
    mask_options: ClassVar[tuple[str, ...]] = ()
    """Options that say how it chooses the mask. They are refused if another stage chooses it."""

    def solve(self, problem: Problem) -> Solved:
        """The pruned weight. If ``problem.mask`` is None, this stage chooses the mask."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rounded:
    """A matrix on a grid, and how the Gram matrix was factorised."""

    weight: Tensor  # [rows, cols] in the weight's dtype and units
    damping: float
    attempts: int


class Round(MatrixStage):
    """Rounds kept weights to a grid."""

    bits: int
    """Bits of a code."""
    group: int
    """Columns that share a scale in a row."""
    embeddings: int
    """Bits of the token embedding and the LM head, which are rounded too; 0: they are left as they are."""
    gram: str
    """The Gram matrix that it reads, or ``auto``."""

    @property
    def gram_read(self) -> str:
        """The Gram matrix that it reads. The stages before it read the same one."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """The grid of every matrix."""
        return Grid(self.bits, self.group)

    def quantize(self, problem: Problem, weight: Tensor) -> Rounded:
        """``weight [rows, cols]`` float32, the result of the stages before, on the grid. Zeros stay zeros."""
        raise NotImplementedError

    def round_plainly(self, weight: Tensor) -> Tensor:
        """``weight [rows, cols]`` of any dtype with each entry rounded to the nearest point of the grid: for a matrix
        without statistics."""
        raise NotImplementedError


class TrainBlock(Stage):
    """Trains a block with fixed masks once all its matrices are pruned."""

    def train_(
        self,
        block: Block,
        inputs: Sequence[tuple[Tensor, Any]],
        targets: Sequence[Tensor],
        masks: dict[str, Tensor],
        token_masks: Sequence[Tensor | None],
        grid: Grid | None = None,
        sample_shapes: Any = None,
    ) -> Tuning:
        """Trains in place; arguments as :func:`ace_ext.pruning.block_training.train_block_`."""
        raise NotImplementedError

    def step_samples(self, seqlen: int) -> int:
        """How many samples of ``seqlen`` tokens one gradient step takes."""
        raise NotImplementedError

    def working_bytes(self, sizes: BlockSizes) -> int:
        """Bytes in addition to the block, its inputs and its targets."""
        raise NotImplementedError


class TrainModel(Stage):
    """Trains the whole model with fixed masks once all its blocks are pruned. The code is in
    :mod:`ace_ext.engine.distillation`."""

    learning_rate: float | None
    """Its peak, as a share of each matrix's root mean square weight; None: the default."""

    def budget(self, causal: bool) -> int:
        """The tokens to train on: for a causal language model, or for another network."""
        raise NotImplementedError
