"""A method: the ordered list of stages that prune, the statistics they need, and the text that stands for it.

An example is ``admm(iterations=30) + distill(tokens=65536)``. A preset is a name for such a text: ``balanced`` stands
for ``admm``, and ``balanced(damping=0.2)`` changes the option ``damping`` of its stage. :func:`parse` reads a text and
``str`` writes it; each is the inverse of the other.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, TypeVar

from ace_ext.errors import InputError, suggestion
from ace_ext.grids import Grid
from ace_ext.pruning.kinds import INPUT, MOMENT, WEIGHTED
from ace_ext.pruning.metrics import DEFAULT_METRIC, METRICS
from ace_ext.pruning.settings import Setting, option_texts
from ace_ext.pruning.stages import (
    KINDS,
    STAGES,
    Collect,
    Divide,
    MatrixStage,
    Refine,
    Round,
    Score,
    Solve,
    Stage,
    TrainBlock,
    TrainModel,
)
from ace_ext.pruning.stages._stage import AUTO, GRAM_KINDS, SHARED, SKETCHED

PRESETS = {
    "fast": "admm(damping=1, iterations=10, relaxation=1, gram=sketch)",
    "balanced": "admm",
    "better": "admm + distill(tokens=20480)",
    "best": "admm + distill",
}
"""From the fastest to the most accurate. ``fast`` needs vectors, ``balanced`` Gram matrices, ``better`` and ``best``
gradients of the whole model."""

DEFAULT = "fast"

PUBLISHED = {
    "published-wanda": "collect(order=block) + wanda",
    "published-sparsegpt": "collect(order=block) + obs(gram=plain)",
    "published-admm": "collect(order=block) + "
    "admm(floor=0, iterations=30, relaxation=1, saliency=magnitude, gram=plain)",
    "published-alps": "collect(order=block) + alps(gram=plain)",
    "published-dsnot": "collect(order=block) + wanda + dsnot",
    "published-thanos": "collect(order=block) + thanos(gram=plain)",
}
"""Baselines with the settings of their papers: Wanda (arXiv 2306.11695), SparseGPT (arXiv 2301.00774), ADMM pruning
(arXiv 2401.02938), ALPS (arXiv 2406.07831), DSnoT (arXiv 2310.08915) and Thanos (arXiv 2504.05346)."""

Kind = TypeVar("Kind", bound=Stage)


@dataclass(frozen=True)
class Method:
    """Stages in the order in which they run, at most one of each kind; A text joins them with ``+``.
    :func:`method_of` makes one of stages, and :func:`parse` of a text; both leave out a :class:`Collect` with its
    defaults, because every method collects, and add Wanda's scores if no stage chooses the mask. A method without a
    mask is one that only quantizes: it removes no weight.

    ``label`` is what the user wrote; tables show it. It is not compared: two methods with the same stages are equal.

    Raises:
        InputError: the stages are in a different order, two are of the same kind, or no stage reads an option.
    """

    stages: tuple[Stage, ...]
    label: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        places = [_place(stage) for stage in self.stages]
        for (first, second), (place, later) in zip(pairwise(self.stages), pairwise(places), strict=True):
            if place == later:
                raise InputError(
                    f"method takes one stage of each kind (got {first.label} and {second.label}); leave out one"
                )
            if place > later:
                ordered = " + ".join(map(str, sorted(self.stages, key=_place)))
                raise InputError(f"method {self} must have its stages in the order in which they run; write {ordered}")
        self._check_options()

    def _check_options(self) -> None:
        if self.solve is not None and self.score is not None:
            for name, _ in self.solve.changed():
                if name in self.solve.mask_options:
                    chosen = self.refine or self.score
                    raise InputError(
                        f"{name} says how {self.solve.label} chooses the mask, but {chosen} does; leave out one of them"
                    )
        read = SHARED if self.quantize is None else self.quantize.gram_read
        asked = {stage.label: stage.gram for stage in self.matrix_stages if hasattr(stage, "gram")}
        grams = {label: read if gram == AUTO else gram for label, gram in asked.items()}
        if len(set(grams.values())) > 1:
            found = " and ".join(f"{gram} for {label}" for label, gram in grams.items())
            raise InputError(f"gram must be the same for all stages of the method (got {found})")
        if self.collect.token_norm is not None and not self.weighs_tokens:
            raise InputError(
                f"token_norm is for methods whose scores weight tokens by their output norm (got {self}); leave it out"
            )

    def _of(self, kind: type[Kind]) -> Kind | None:
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    @property
    def collect(self) -> Collect:
        """How statistics are collected: the stage of the method, or the defaults."""
        return self._of(Collect) or Collect()

    @property
    def allocate(self) -> Divide | None:
        """The stage that gives blocks different sparsities; None: all blocks have the same."""
        return self._of(Divide)

    @property
    def score(self) -> Score | None:
        """The stage that chooses the mask by scores; None if the solve stage chooses it."""
        return self._of(Score)

    @property
    def refine(self) -> Refine | None:
        """The stage that exchanges entries of the mask."""
        return self._of(Refine)

    @property
    def solve(self) -> Solve | None:
        """The stage that updates kept weights."""
        return self._of(Solve)

    @property
    def quantize(self) -> Round | None:
        """The stage that rounds kept weights to a grid."""
        return self._of(Round)

    @property
    def grid(self) -> Grid | None:
        """The grid of all pruned matrices; None if no stage rounds to one."""
        return None if self.quantize is None else self.quantize.grid

    @property
    def embeddings(self) -> Round | None:
        """The stage that rounds the token embedding and the LM head; None if they are left as they are."""
        stage: Any = self.quantize
        return None if stage is None or not stage.embeddings else replace(stage, bits=stage.embeddings)

    @property
    def prunes(self) -> bool:
        """Whether a stage chooses a mask. A method that only quantizes removes no weight."""
        return self.score is not None or self.solve is not None

    @property
    def only_distills(self) -> bool:
        """Whether the user wrote the stage ``distill`` alone. Wanda's scores then choose the mask, unless the run only
        removes structures."""
        return re.match(r"\s*distill\b", self.label) is not None

    @property
    def train(self) -> TrainBlock | None:
        """The stage that trains each block."""
        return self._of(TrainBlock)

    @property
    def distill(self) -> TrainModel | None:
        """The stage that trains the whole model."""
        return self._of(TrainModel)

    @property
    def matrix_stages(self) -> list[MatrixStage]:
        """The stages that follow the scores of one matrix, in order."""
        return [stage for stage in (self.refine, self.solve, self.quantize) if stage is not None]

    @property
    def scored_by(self) -> Score:
        """The scores of the method, or Wanda's if the solve stage chooses the mask: :class:`Divide` then divides the
        sparsity by these."""
        return self.score or Score(DEFAULT_METRIC)

    @property
    def weighs_tokens(self) -> bool:
        """Whether a stage reads statistics that weight tokens by the norm of their output."""
        return bool(Needs.of(self).prune & {WEIGHTED, MOMENT})

    @property
    def name(self) -> str:
        """The names of the stages that follow the scores of one matrix, ``"swaps + admm"`` or ``""``."""
        return " + ".join(stage.label for stage in self.matrix_stages)

    @property
    def published(self) -> bool:
        """Whether the user wrote a published method, with options changed or not."""
        return re.split(r"[\s(+]", self.label, maxsplit=1)[0] in PUBLISHED

    @property
    def preset(self) -> str | None:
        """The name of the preset or published method if no option is changed, else None."""
        return self.label if self.label in PRESETS | PUBLISHED else None

    def without(self, kind: type[Stage]) -> "Method":
        """The method without the stages of a kind."""
        return Method(tuple(stage for stage in self.stages if not isinstance(stage, kind)))

    def collected(self, **options: Any) -> "Method":
        """The method with these options of :class:`Collect`."""
        rest = [stage for stage in self.stages if not isinstance(stage, Collect)]
        collect = replace(self.collect, **options)
        return Method(tuple(rest) if collect == Collect() else (collect, *rest), self.label)

    def __str__(self) -> str:
        """The stages as text; :func:`parse` reads it back."""
        return " + ".join(map(str, self.stages))


def _place(stage: Stage) -> int:
    return next(place for place, kind in enumerate(KINDS) if isinstance(stage, kind))


def method_of(given: "str | Stage | Sequence[Stage] | Method") -> Method:
    """The method that a text, a stage or a list of stages stands for. If no stage chooses the mask, Wanda's scores
    choose it, unless the method only quantizes.

    Raises:
        InputError: as :func:`parse` and :class:`Method`.
    """
    if isinstance(given, Method):
        return given
    if isinstance(given, str):
        return parse(given)
    stages = (given,) if isinstance(given, Stage) else given
    if not isinstance(stages, Sequence) or not stages or not all(isinstance(stage, Stage) for stage in stages):
        function = callable(given) and not isinstance(given, type)
        hint = "; a score of your own is the stage Score(function)" if function else ""
        raise InputError(f'method must be a text like "balanced", or a list of stages (got {str(given)[:100]}){hint}')
    return _complete(list(stages))


def _complete(stages: list[Stage], label: str = "") -> Method:
    """The method of these stages. Wanda's scores are added if none of them chooses the mask, unless they only quantize.
    ``label``: what the user wrote."""
    chooses = any(isinstance(stage, Score) or (isinstance(stage, Solve) and stage.chooses_mask) for stage in stages)
    if any(isinstance(stage, Refine) for stage in stages):
        chooses = any(isinstance(stage, Score) for stage in stages)
    only_quantizes = any(isinstance(stage, Round) for stage in stages) and not any(
        isinstance(stage, Divide | Refine | Solve) for stage in stages
    )
    if not chooses and not only_quantizes:
        score = Score(DEFAULT_METRIC)
        at = next((at for at, stage in enumerate(stages) if _place(stage) > _place(score)), len(stages))
        stages = [*stages[:at], score, *stages[at:]]
    Method(tuple(stages))  # checks the order, also of a Collect that is then left out
    method = Method(tuple(stage for stage in stages if stage != Collect()))
    return replace(method, label=label or str(method))


@dataclass(frozen=True)
class Needs:
    """The kinds of statistics (:mod:`ace_ext.pruning.kinds`) that a run needs, by their use. Only this class
    decides it."""

    prune: frozenset[str]
    """Read to prune a matrix."""
    measure: frozenset[str]
    """Read by the extra pass that divides the sparsity among blocks; empty without this pass."""

    @classmethod
    def of(cls, method: Method) -> "Needs":
        """The kinds that the stages of a method read."""
        scored = method.scored_by.needs if method.prunes else frozenset()
        quantize = method.quantize
        solved = frozenset(kind for stage in method.matrix_stages if stage != quantize for kind in stage.needs)
        measure: frozenset[str] = frozenset()
        if method.allocate is not None:
            measure = scored
        if quantize is not None:
            grams = frozenset(GRAM_KINDS.values())
            solved = solved - grams | ({GRAM_KINDS[quantize.gram_read]} if solved & grams else quantize.needs)
        return cls(scored | solved, measure)

    @property
    def read(self) -> frozenset[str]:
        """What a statistics file must hold so that a run can prune from it."""
        return self.prune | self.measure

    @property
    def kept(self) -> frozenset[str]:
        """What a run writes to a statistics file.

        ``input`` and ``weighted`` are vectors: most metrics read them, and they are small. The cross moment and the
        Gram matrices are as large as weights. They are written only if the run itself reads them.
        """
        return self.prune | {INPUT, WEIGHTED}


# --- texts ------------------------------------------------------------------------------------------------------------

_STAGE = re.compile(r"(?P<name>[^\s()+]+)(?:\s*\((?P<options>[^()]*)\))?")


def names() -> list[str]:
    """Every name that may stand in a method: presets, published methods, metrics, and the other stages."""
    return [*PRESETS, *PUBLISHED, *METRICS, *(name for name in STAGES if name != Score.name)]


def parse(text: str) -> Method:
    """The method that a text stands for.

    Raises:
        InputError: the text is not stages joined by ``+``; a name is unknown; a stage does not have the option (the
            message names the stage that has it); a value has the wrong type or is outside its limits; or as
            :class:`Method`.
    """
    stages: list[Stage] = []
    labels: list[str] = []
    parts = _split(text)
    quantizes = any(map(_quantizes, parts))
    for part in parts:
        match = _STAGE.fullmatch(part.strip())
        if match is None:
            raise InputError(
                f'method must be stages joined by +, each a name or name(option=value, …), e.g. "admm(iterations=30) + '
                f'distill" (got {text[:100]!r}){_hint_of_list(part)}'
            )
        options = option_texts(match["options"] or "", part.strip(), "options of a stage")
        found = _stages(match["name"], options)
        if quantizes and match["name"] in PRESETS and "gram" not in options:  # quantize reads whole Gram matrices
            found = [_reading(AUTO, stage) if getattr(stage, "gram", None) == SKETCHED else stage for stage in found]
        stages += found
        given = ", ".join(f"{key}={value}" for key, value in options.items())
        labels.append(f"{match['name']}({given})" if given else match["name"])
    return _complete(stages, " + ".join(labels))


def quantize_of(text: str) -> Round | None:
    """The stage ``quantize`` of a report's method text, None without one. Other stages may be unknown here, such as
    scores that are a function of the caller's.

    Raises:
        InputError: the stage cannot be read.
    """
    own = [part.strip() for part in _split(text) if _quantizes(part)]
    return parse(own[0]).quantize if own else None


def parse_list(text: str) -> tuple[Method, ...]:
    """Methods separated by ``;``.

    Raises:
        InputError: as :func:`parse`; the list is empty; or a method is given twice.
    """
    found = [parse(part) for part in text.split(";") if part.strip()]
    if not found:
        raise InputError(f"methods must name at least one of {', '.join(names())} (got {text!r})")
    if len({method.label for method in found}) < len(found):
        raise InputError(f"methods must each be given once (got {text!r})")
    return tuple(found)


def _split(text: str) -> list[str]:
    """The parts between those ``+`` that are outside parentheses: a number such as ``1e+3`` has one inside."""
    parts = [""]
    for piece in re.findall(r"\([^()]*\)|\+|[^+(]+|\(", text):  # no piece is scanned twice, however long the text
        if piece == "+":
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def _reading(gram: str, stage: Stage) -> Stage:
    """A stage with another value of its option ``gram``."""
    changed: dict[str, Any] = {"gram": gram}
    return replace(stage, **changed)


def _quantizes(part: str) -> bool:
    """Whether a part of a method's text is the stage ``quantize``."""
    return re.match(r"\s*quantize\b", part) is not None


def _hint_of_list(part: str) -> str:
    """A hint for a list with commas such as ``"wanda, ace"``; empty for any other text."""
    return "; separate methods by ;" if "," in part and "(" not in part else ""


def _hint_of_options(name: str) -> str:
    """A hint for options after a colon such as ``"wanda:exponent=1"``; empty for any other text."""
    stage, colon, options = name.partition(":")
    return f"; options are in parentheses: {stage}({options})" if colon and "=" in options else ""


def _stages(name: str, options: dict[str, str]) -> list[Stage]:
    """The stages that a name with its options stands for."""
    if name in PRESETS or name in PUBLISHED:
        return _preset(name, options)
    if name in METRICS:
        return [Score(name, **_values(name, options_of(Score(name)), options))]
    if name not in STAGES or name == Score.name:
        hint = _hint_of_list(name) or _hint_of_options(name) or suggestion(name, names())
        raise InputError(f"method must be made of {', '.join(names())} (got {name!r}){hint}")
    known = {setting.name: setting for setting in STAGES[name].settings()}
    return [STAGES[name](**_values(name, known, options))]


def _preset(name: str, options: dict[str, str]) -> list[Stage]:
    """The stages of a preset. Each option goes to the one stage that has it."""
    stages = list(parse((PRESETS | PUBLISHED)[name]).stages)
    if not isinstance(stages[0], Collect):
        stages.insert(0, Collect())
    for key, text in options.items():
        having = [place for place, stage in enumerate(stages) if key in options_of(stage)]
        if len(having) != 1:
            _refuse_option(name, key, [option for stage in stages for option in options_of(stage)])
        stage = stages[having[0]]
        stages[having[0]] = replace(stage, **{key: options_of(stage)[key].parse(text)})
    return [stage for stage in stages if stage != Collect()]


def options_of(stage: Stage) -> dict[str, Setting]:
    """The options of a stage by name. ``ria`` is the only score with an option."""
    if isinstance(stage, Score) and stage.metric != "ria":
        return {}
    return {setting.name: setting for setting in stage.settings()}


def _values(stage: str, known: dict[str, Setting], options: dict[str, str]) -> dict[str, Any]:
    for key in options:
        if key not in known:
            _refuse_option(stage, key, list(known))
    return {key: known[key].parse(text) for key, text in options.items()}


def _refuse_option(stage: str, key: str, known: list[str]) -> None:
    """Raises :class:`InputError`. The message names the options of the stage, or the stages that have this option."""
    own, elsewhere = list(dict.fromkeys(known)), option_hint(key)
    if key in own:
        where = f"several stages of {stage} have it; write its stages instead of the name"
    elif elsewhere:
        where = elsewhere.removeprefix("; ")
    else:
        where = f"its options are {', '.join(own)}{suggestion(key, own)}" if own else "it has none"
    raise InputError(f"{stage} has no option {key}: {where}")


def option_hint(name: str) -> str:
    """``"; iterations is an option of admm and alps, as in admm(iterations=…)"``: a hint where the name of an option of
    stages is given elsewhere. Empty for any other name."""
    having = [
        "ria" if stage == Score.name else stage
        for stage, kind in STAGES.items()
        if name in {setting.name for setting in kind.settings()}
    ]
    if not having:
        return ""
    listed = " and ".join(filter(None, [", ".join(having[:-1]), having[-1]]))
    return f"; {name} is an option of {listed}, as in {having[0]}({name}=…)"
