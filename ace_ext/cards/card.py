"""Writes the card of a pruned folder: metadata as the hub reads it, and what was pruned, how, and at what cost.

It has no time, date or path, so equal runs write equal bytes. The card of the dense model, if it has one, is kept
beside it as :data:`BASE_CARD`. Its licence and language are repeated.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import REPOCARD_NAME
from jinja2 import Environment, PackageLoader, StrictUndefined

from ace_ext.data.mixture import without_folders
from ace_ext.errors import InputError
from ace_ext.models._transformers import COMPRESSED_METHOD, OWN_METHOD
from ace_ext.pruning.method import parse, quantize_of
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.removal import BLOCK_SCORES, Blocks, Experts, Params, removal_of
from ace_ext.pruning.removal import SCORES as REMOVAL_SCORES
from ace_ext.pruning.stages import Collect, Round, Score, Stage
from ace_ext.records import PruneReport, figure_text
from ace_ext.whole_files import write_whole

CARD = REPOCARD_NAME
BASE_CARD = "BASE_MODEL_README.md"
"""The card of the model that was pruned, under its new name."""

TAGS = ["pruned", "sparse", "ace_ext"]

_MARK = re.compile(r"^<!-- ace-prune: (\d+) matrices, (\d\.\d{6}) zeros -->$", re.M)
"""A line of each card of this program, and of no other."""


KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")
"""Metadata keys whose values also hold for the pruned model."""

_MOST_BYTES, _MOST_WORDS, _LONGEST = 2**20, 100, 300

_PAPER = {
    "cosp": "the paper's cosine score",
    "cosp-exact": "the paper's cosine score, without its approximation",
    "varp": "the paper's variance score",
    "stade": "standard deviations, the formula of the paper's variance score",
    "cosvar": "variances of tokens weighted as in the paper's cosine score",
    "norm-cosvar": "norms, and variances of tokens weighted as in the paper's cosine score",
    "ace": "the product of the paper's two scores, cosine and variance",
}
"""Descriptions of the metrics that are the paper's scores or are built from them."""

UNUSED = "the paper's scores were not used"


def write_card(folder: Path, report: PruneReport) -> None:
    """Writes the card into the folder of a pruned model. A ``README.md`` that this program did not write was copied
    from the dense model: it becomes :data:`BASE_CARD`. It may be called again, for example by a run that was killed
    here.

    Raises:
        OSError: the folder cannot be written.
    """
    path, beside = folder / CARD, folder / BASE_CARD
    if path.is_file() and card_says(folder) is None:
        path.replace(beside)
    own = read_base(path)  # of a model that was pruned before
    base = replace(read_base(beside), base_model=own.base_model) if beside.is_file() else own
    config = _configuration(folder)
    card = _render(report, base, beside.is_file(), _causal(config)).encode("utf-8")
    form = _quant_method(config)
    if form == OWN_METHOD:
        from ace_ext.packed.card_section import section_of  # imported here: most runs do not pack
        from ace_ext.packed.files import PackedShards

        card += section_of(PackedShards(folder, mapped=False))
    elif form == COMPRESSED_METHOD:
        from ace_ext.packed.compressed_tensors import compressed_section

        card += compressed_section(folder)
    write_whole(path, card)  # an incomplete card would not be recognised as one of this program


def card_says(folder: Path) -> tuple[int, float] | None:
    """The number of pruned matrices and their share of zeros, as a folder's card gives them; None without a card of
    this program."""
    try:
        found = _MARK.search((folder / CARD).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return None if found is None else (int(found[1]), float(found[2]))


@cache
def _environment() -> Environment:
    environment = Environment(  # markdown, not HTML: names are quoted by the filter `code`
        loader=PackageLoader("ace_ext.cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": _code, "perplexity": figure_text}
    return environment


def _code(value: object) -> str:
    """A text as code in markdown, in one line and one cell of a table."""
    plain = re.sub(r"[`|\x00-\x1f\x7f]", "_", str(value))
    return f"`{plain}`"


def _render(report: PruneReport, base: "BaseCard", has_base: bool, causal: bool) -> str:
    healing = report.extra.get("healing") or {}
    metadata = ModelCardData(
        **{**({"pipeline_tag": "text-generation"} if causal else {}), **base.kept},
        base_model=report.extra.get("base_model") or base.base_model,
        library_name="transformers",
        tags=[tag for tag in TAGS if tag != "sparse"] if report.only_removed else TAGS,
    )
    return (
        _environment()
        .get_template(f"{CARD}.j2")
        .render(
            metadata=metadata.to_yaml(),
            mark=f"<!-- ace-prune: {len(report.matrices)} matrices, {report.sparsity:.6f} zeros -->",
            name=_name(report),
            hub_name=report.extra.get("base_model") or base.base_model,
            title=_title(report),
            removal_words=removal_words,
            causal=causal,
            pruned=_stage_of_grid(report.config) is None or bool(report.config["sparsity"]),
            grid=_grid(report),
            kept=_kept(report.config),
            method=report.method,
            stages=[] if report.only_removed else _stages(report.config),
            mask="" if report.only_removed else mask_words(str(report.config["method"])),
            report=report,
            weights=sum(matrix.size for matrix in report.matrices),
            error=_mean_error(report),
            calibration=_calibration(report.extra.get("calibration")),
            trained=any(block.tuning for block in report.blocks),
            commands=[extra["command"] for extra in (report.extra, healing) if extra.get("command")],
            licence=base.kept.get("license_name") or base.kept.get("license"),
            base_card=BASE_CARD if has_base else None,
        )
    )


def _configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a model's folder; empty if it cannot be read."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _quant_method(config: dict[str, Any]) -> str:
    """What reads the weights of a configuration; empty for dense weights."""
    quantization = config.get("quantization_config")
    return str(quantization.get("quant_method")) if isinstance(quantization, dict) else ""


def _causal(config: dict[str, Any]) -> bool:
    """Whether a configuration names a causal language model."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in names)


def _name(report: PruneReport) -> str:
    """The model's name without the folders that it was in."""
    return Path(str(report.extra.get("base_model") or report.extra.get("model") or "a model")).name


def _amount(config: Mapping[str, Any]) -> str:
    return str(config["pattern"]) if config.get("pattern") else f"{100 * config['sparsity']:g} %"


def _title(report: PruneReport) -> str:
    """What was done to the model, in a few words."""
    config = report.config
    stage = _stage_of_grid(config)
    zeros = "" if config.get("pattern") else " zeros"
    amount = f"{_amount(config)}{zeros}" if not report.only_removed and (stage is None or config["sparsity"]) else ""
    removed = [f"{record.before - record.after} of {record.before} {record.kind} removed" for record in report.removed]
    pruned = ", ".join(filter(None, [*removed, amount]))
    grid = f"quantized: {stage.bits} bits" if stage is not None else ""
    return ", ".join(filter(None, [f"pruned: {pruned}" if pruned else "", grid]))


def removal_words(part: str) -> str:
    """How structures were chosen and what compensates for them, given the text of a part of ``remove``."""
    try:
        (found,) = removal_of(part).parts
    except InputError:  # written by another version
        return "a score that this version does not know"
    if isinstance(found, Blocks):
        return BLOCK_SCORES[found.score]
    if isinstance(found, Params):  # the record names what was chosen
        return "chosen by the predictions on held-out samples"
    if isinstance(found, Experts):
        return "the norm of an expert's output times the router's weight, a mean over the tokens routed to it (REAP)"
    if found.published is not None:
        return found.published.formula.replace("|", "\\|")
    after = "; the matrix that reads them is fitted to what it gave with all of them" if found.refit != "none" else ""
    return f"{REMOVAL_SCORES[found.score]}{after}".replace("|", "\\|")


def _stage_of_grid(config: Mapping[str, Any]) -> Round | None:
    return quantize_of(str(config.get("method")))


def _grid(report: PruneReport) -> str:
    """The grid of the weights and the bits of a weight in the packed formats, in words; empty without a grid."""
    stage = _stage_of_grid(report.config)
    if stage is None:
        return ""
    scale = 32 if report.dtype == "float32" else 16
    stored = max(4, stage.bits)  # codes of 3 bits are stored in 4
    packed = min(stored, 1 + stored * (1 - report.sparsity)) + scale / stage.group
    return (
        f"{stage.bits} bits, a scale for each row and {stage.group} columns: {packed:.2f} bits a weight once packed, "
        f"{scale} in the dense format"
    )


def _kept(config: Mapping[str, Any]) -> str:
    """Which weights were kept, in words."""
    if not config.get("pattern") and not config["sparsity"]:
        return "all"
    if config.get("pattern"):
        keep, size = str(config["pattern"]).split(":")
        return f"{keep} of each {size} consecutive weights of a row"
    of = {"row": "each row", "matrix": "each matrix", "model": "all matrices together"}
    shared = ", more or less of each block" if "allocate" in str(config.get("method")) else ""
    return f"the same share of {of.get(config['group'], config['group'])}{shared}"


def _stages(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each stage of the method, and what it does."""
    try:
        stages = parse(str(config["method"])).stages
    except InputError:  # scores of a function, or a stage that is not registered here
        return [(str(config["method"]), "a method of its own")]
    return [(str(stage), _summary(stage)) for stage in stages if not isinstance(stage, Collect)]


def _summary(stage: Stage) -> str:
    if isinstance(stage, Score) and isinstance(stage.metric, str):
        return f"scores {METRICS[stage.metric].formula}"
    return stage.summary


def _mean_error(report: PruneReport) -> float | None:
    errors = [matrix.relative_error for matrix in report.matrices if matrix.tokens]
    return sum(errors) / len(errors) if errors else None


def _calibration(found: object) -> dict[str, Any] | None:
    """The report's description of the calibration text, with its source without folders; None if this is not known."""
    if not isinstance(found, dict) or not {"source", "nsamples", "seed"} <= found.keys():
        return None
    return {"seqlen": None, **found, "source": without_folders(str(found["source"]))}


# --- the card of the dense model --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseCard:
    """The part of a card's metadata that the card of a pruned model repeats."""

    kept: dict[str, Any] = field(default_factory=dict)
    """The keys of :data:`KEPT` that it has, each a text or a list of texts."""
    base_model: str | None = None
    """The hub's name of the model from which the card's own model was made."""


def read_base(path: Path) -> BaseCard:
    """The metadata of a card. Empty for a missing, unreadable or damaged card: a hand-written card must not end a
    run."""
    try:
        if not path.is_file() or path.stat().st_size > _MOST_BYTES:
            return BaseCard()
        text = path.read_text(encoding="utf-8-sig")
        if not text.lstrip().startswith("---"):
            return BaseCard()
        found = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except Exception:  # whatever the YAML library raises
        return BaseCard()
    base_model = found.get("base_model")
    return BaseCard(
        {key: found[key] for key in KEPT if _is_text(found.get(key)) or _is_list(found.get(key))},
        base_model if _is_text(base_model) else None,
    )


def _is_text(value: object) -> bool:
    """Whether a value is a short text in one line."""
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and not re.search(r"[\x00-\x1f\x7f]", value)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and 0 < len(value) <= _MOST_WORDS and all(map(_is_text, value))


# --- what chose the mask ----------------------------------------------------------------------------------------------


def mask_words(method: str) -> str:
    """What chose the mask of a method, given as the text of its stages.

    ``"ADMM's remaining error; the paper's scores were not used"``, for example.
    """
    try:
        stages = parse(method)
    except InputError:  # a metric that is a function, or a stage that is not registered here
        return f"a metric of the caller's; {UNUSED}"
    if not stages.prunes:
        return f"none, because no weight was removed; {UNUSED}"
    if stages.score is None:
        assert stages.solve is not None  # else nothing chooses a mask
        stage = stages.solve.label.upper()
        weighted = getattr(stages.solve, "gram", None) == "cosine"
        return f"{stage}'s remaining error{' of tokens weighted as in the cosine score' if weighted else ''}; {UNUSED}"
    label = stages.score.label
    after = f", exchanged by {stages.refine.label}" if stages.refine is not None else ""
    return f"{_PAPER[label]}{after}" if label in _PAPER else f"{label} scores{after}; {UNUSED}"
