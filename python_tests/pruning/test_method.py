"""Methods as texts and as lists of stages: reading, writing, completion, presets, and the errors."""

import dataclasses

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiny_models import make_model

from ace_ext import InputError, PruneConfig, prune_model
from ace_ext.pruning.method import DEFAULT, PRESETS, PUBLISHED, Method, method_of, names, parse, parse_list
from ace_ext.pruning.metrics import METRICS
from ace_ext.pruning.stages import (
    KINDS,
    STAGES,
    Admm,
    Allocate,
    Alps,
    Collect,
    Distill,
    Dsnot,
    MeanSwaps,
    Obs,
    Quantize,
    Score,
    Swaps,
    Train,
    stages_of,
)

NAMED = PRESETS | PUBLISHED

# Writing and reading are inverse


def valid_values(setting):
    """Values that an option accepts."""
    if setting.choices:
        chosen = st.sampled_from([*setting.choices])
        return st.none() | chosen if type(None) in setting.types else chosen
    limits = setting.limits
    if int in setting.types:
        step, end = limits.multiple_of or 1, limits.below or 2**63
        return st.integers(-(-limits.at_least // step), (end - 1) // step).map(lambda count: count * step)
    assert float in setting.types
    least = next((limit for limit in (limits.at_least, limits.above) if limit is not None), -(2.0**62))
    largest = 2.0**62 if limits.below is None else limits.below
    above, below = limits.above is not None, limits.below is not None
    return st.floats(least, largest, exclude_min=above, exclude_max=below)


def stages(kind):
    """Any stage of a kind with any valid options, or None."""
    if kind is Score:
        plain = st.sampled_from([name for name in METRICS if name != "ria"]).map(Score)
        (exponent,) = Score.settings()
        return st.none() | plain | valid_values(exponent).map(lambda value: Score("ria", value))
    return st.none() | st.one_of(
        st.builds(stage, **{setting.name: valid_values(setting) for setting in stage.settings()})
        for stage in stages_of(kind).values()
    )


@st.composite
def methods(draw):
    """Any method. Options that two stages must agree on, or that no stage reads, are left at their defaults."""
    found = [stage for stage in (draw(stages(kind)) for kind in KINDS) if stage is not None]
    if any(isinstance(stage, Quantize) for stage in found):
        found = [stage for stage in found if not isinstance(stage, Train)]
    assume(found)
    if sum(hasattr(stage, "gram") for stage in found) > 1:
        found = [dataclasses.replace(s, gram="plain") if hasattr(s, "gram") else s for s in found]
    if any(isinstance(stage, Score | Swaps | MeanSwaps | Dsnot) for stage in found):
        found = [dataclasses.replace(s, saliency="obs") if isinstance(s, Admm) else s for s in found]
        found = [dataclasses.replace(s, iterations=300) if isinstance(s, Alps) else s for s in found]
    if not method_of([s for s in found if not isinstance(s, Collect)] or [Score()]).weighs_tokens:
        found = [dataclasses.replace(s, token_norm=None) if isinstance(s, Collect) else s for s in found]
    return method_of(found)


@given(methods())
@example(method_of(Admm(damping=1e-5, floor=1e17)))
@example(method_of(Score("ria", -1.5e17)))
@example(method_of([Collect(), Admm()]))
@settings(deadline=None, max_examples=200)
def test_a_text_is_read_as_what_was_written(method):
    text = str(method)
    assert parse(text) == method
    assert hash(parse(text)) == hash(method)
    assert str(parse(text)) == text
    assert method_of(list(method.stages)) == method


@st.composite
def texts(draw):
    """Texts that users may write: presets and stages, options with and without their defaults, and spaces."""
    spaces = st.sampled_from(["", " ", "  ", "\t", "\n"])

    def written(name, known):
        chosen = draw(st.lists(st.sampled_from([*known]), unique_by=lambda s: s.name)) if known else []
        options = [
            (setting.name, draw(valid_values(setting).filter(lambda value: value is not None))) for setting in chosen
        ]
        inside = ",".join(
            f"{draw(spaces)}{key}{draw(spaces)}={draw(spaces)}{value}{draw(spaces)}" for key, value in options
        )
        return f"{draw(spaces)}{name}{draw(spaces)}({inside})" if options or draw(st.booleans()) else name

    name = draw(st.sampled_from([*NAMED, *METRICS, *(name for name in STAGES if name != "score")]))
    if name in NAMED:
        of = [Collect, *(type(stage) for stage in parse(NAMED[name]).stages if not isinstance(stage, Collect | Score))]
    else:
        of = [Score] if name == "ria" else [STAGES[name]] if name in STAGES else []
    known = [setting for stage in of for setting in stage.settings() if setting.name != "token_norm"]
    more = draw(st.sampled_from(["", "+ distill", f"+{draw(spaces)}train(epochs=2, held_out=0){draw(spaces)}"]))
    text = f"{written(name, known)}{more}"
    assume(not (more and name in {"distill", "train", "better", "best"}))
    return text


@given(texts())
@settings(deadline=None, max_examples=200)
def test_what_users_write_is_read_once_and_for_all(text):
    method = parse(text)
    assert parse(str(method)) == method
    assert str(parse(str(method))) == str(method)
    assert parse(method.label) == method
    assert parse(method.label).label == method.label


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("admm", [Admm()]),
        ("wanda", [Score("wanda")]),
        (" wanda+swaps ", [Score("wanda"), Swaps()]),
        (
            "admm(iterations=30) + distill(tokens=65536)",
            [Admm(iterations=30), Distill(tokens=65536)],
        ),
        ("admm(damping=1e+3, gram=sketch)+train", [Admm(damping=1000.0, gram="sketch"), Train()]),
        ("ria(exponent=-0.25)", [Score("ria", -0.25)]),
        ("collect + wanda", [Score("wanda")]),
        ("admm()", [Admm()]),
        (
            "collect(order=block, batch_tokens=64) + allocate(range=0.1) + cosvar + swaps(gram=cosine) + "
            "obs(gram=cosine) + train(epochs=2) + distill",
            [
                Collect(order="block", batch_tokens=64),
                Allocate(0.1),
                Score("cosvar"),
                Swaps(gram="cosine"),
                Obs(gram="cosine"),
                Train(epochs=2),
                Distill(),
            ],
        ),
    ],
)
def test_texts_and_their_stages(text, found):
    assert parse(text).stages == tuple(found)
    assert method_of(found) == method_of(text)


def test_options_get_the_type_of_their_field():
    (stage,) = parse("admm(damping=1, iterations=30)").stages
    assert (type(stage.damping), type(stage.iterations)) == (float, int)


def test_a_stage_shows_what_differs_from_its_defaults():
    assert str(method_of(Admm(damping=1.0, iterations=16))) == "admm(damping=1)"
    assert str(method_of(Score("ria"))) == "ria"
    assert str(method_of([Collect(), Obs()])) == "obs"


# Completion


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("swaps", "wanda + swaps"),
        ("mean-swaps(rounds=2)", "wanda + mean-swaps(rounds=2)"),
        ("swaps + admm", "wanda + swaps + admm"),
        ("mean-update", "wanda + mean-update"),
        ("train", "wanda + train"),
        ("distill", "wanda + distill"),
        ("allocate", "allocate + wanda"),
        ("collect(order=block)", "collect(order=block) + wanda"),
        ("collect(order=block) + allocate + swaps", "collect(order=block) + allocate + wanda + swaps"),
        ("admm + train", "admm + train"),
        ("obs", "obs"),
        ("allocate + admm", "allocate + admm"),
        ("ria + swaps", "ria + swaps"),
    ],
)
def test_where_no_stage_chooses_the_mask_wanda_does(text, complete):
    method = parse(text)
    assert str(method) == complete
    assert method.label == text  # as written
    assert method_of(list(parse(complete).stages)) == method


def test_a_method_may_be_a_stage_a_list_or_a_method():
    expected = (Score("wanda"), Swaps())
    assert method_of(Swaps()).stages == expected
    assert method_of([Swaps()]).stages == method_of((Swaps(),)).stages == expected
    method = method_of("swaps")
    assert method_of(method) is method
    assert PruneConfig([Score("wanda"), Swaps()]).method == PruneConfig("swaps").method


def test_who_chooses_the_mask_and_by_which_scores():
    admm, refined = parse("admm"), parse("ria + swaps + admm")
    assert (admm.score, admm.scored_by) == (None, Score("wanda"))
    assert refined.score == refined.scored_by == Score("ria")
    assert (admm.name, refined.name, parse("wanda").name) == ("admm", "swaps + admm", "")


@pytest.mark.parametrize("text", ["ace", "cosvar", "norm-cosvar + admm"])
def test_token_norm_is_read_where_tokens_are_weighted(text):
    assert parse(text).weighs_tokens
    assert parse(f"collect(token_norm=exact) + {text}").collect.token_norm == "exact"


def test_other_options_of_collect():
    method = parse("balanced")
    assert method.collect == Collect()
    other = method.collected(order="block")
    assert str(other) == "collect(order=block) + admm"
    assert other.label == "balanced"
    assert other.collected(order=None) == method
    assert str(parse("admm + distill").without(Distill)) == "admm"


# Presets


def test_the_texts_of_presets():
    assert PRESETS == {
        "fast": "admm(damping=1, iterations=10, relaxation=1, gram=sketch)",
        "balanced": "admm",
        "better": "admm + distill(tokens=20480)",
        "best": "admm + distill",
    }
    assert PUBLISHED == {
        "published-wanda": "collect(order=block) + wanda",
        "published-sparsegpt": "collect(order=block) + obs(gram=plain)",
        "published-admm": "collect(order=block) + "
        "admm(floor=0, iterations=30, relaxation=1, saliency=magnitude, gram=plain)",
        "published-alps": "collect(order=block) + alps(gram=plain)",
        "published-dsnot": "collect(order=block) + wanda + dsnot",
        "published-thanos": "collect(order=block) + thanos(gram=plain)",
    }


def test_names_are_unique():
    assert len(set(names())) == len(names())
    assert {*NAMED, *METRICS, *STAGES} - {"score"} == set(names())


@pytest.mark.parametrize("name", NAMED)
def test_a_preset_is_its_text(name):
    method = parse(name)
    assert method == parse(NAMED[name])
    assert sorted(str(method)) == sorted(NAMED[name])  # options may be in another order
    assert (method.label, method.preset) == (name, name)
    assert method.published == (name in PUBLISHED)
    assert parse(NAMED[name]).preset is None or NAMED[name] in NAMED
    assert not parse(NAMED[name]).published


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("target", [{}, {"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_presets_are_valid_whatever_is_pruned(name, target):
    config = PruneConfig(name, **target)
    assert config.sparsity == target.get("sparsity", 0.5)
    in_matrix = name in ("published-sparsegpt", "published-alps", "published-thanos") and "pattern" not in target
    assert config.group == ("matrix" if in_matrix else "row")


def test_the_default_method():
    assert DEFAULT == "fast"
    report = prune_model(make_model("llama"), torch.randint(0, 64, (2, 16)))
    assert report.config == PruneConfig("fast").to_dict()
    assert report.config["preset"] == "fast"


@pytest.mark.parametrize(
    ("text", "stages"),
    [
        ("balanced(damping=0.2)", (Admm(damping=0.2),)),
        ("fast(iterations=16)", (Admm(damping=1.0, relaxation=1.0, gram="sketch"),)),
        ("best(tokens=2, iterations=3)", (Admm(iterations=3), Distill(tokens=2))),
        ("best(order=block)", (Collect(order="block"), Admm(), Distill())),
        ("balanced(batch_tokens=64)", (Collect(batch_tokens=64), Admm())),
        ("published-wanda(order=sequential)", (Collect(order="sequential"), Score("wanda"))),
        ("published-sparsegpt(damping=0.1)", (Collect(order="block"), Obs(damping=0.1, gram="plain"))),
        ("published-dsnot(cycles=9)", (Collect(order="block"), Score("wanda"), Dsnot(cycles=9))),
        ("balanced + distill", (Admm(), Distill())),
        ("balanced(damping=0.2) + train", (Admm(damping=0.2), Train())),
    ],
)
def test_an_option_of_a_preset_goes_to_the_stage_that_has_it(text, stages):
    method = parse(text)
    assert method.stages == stages
    assert (method.label, method.preset) == (text, None)
    assert method.published == text.startswith("published-")


def test_an_option_that_several_stages_of_a_preset_have(monkeypatch):
    monkeypatch.setitem(PRESETS, "both", "wanda + train + distill")
    with pytest.raises(InputError) as caught:
        parse("both(learning_rate=1)")
    assert str(caught.value) == (
        "both has no option learning_rate: several stages of both have it; write its stages instead of the name"
    )


# Lists


def test_labels_are_what_was_written_with_one_spacing():
    first, second, third = parse_list("wanda;  ria( exponent = 0.250 )+swaps ; published-wanda(order=sequential);")
    assert [method.label for method in (first, second, third)] == [
        "wanda",
        "ria(exponent=0.250) + swaps",
        "published-wanda(order=sequential)",
    ]
    assert second.stages == (Score("ria", 0.25), Swaps())


def test_labels_do_not_tell_methods_apart():
    assert parse("balanced") == parse("admm") == parse("admm(iterations=16)") == method_of(Admm())
    assert parse("balanced").label != parse("admm").label
    assert len({parse("balanced"), parse("admm")}) == 1
    assert method_of(Swaps()).label == "wanda + swaps"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"methods must name at least one of {', '.join(names())} (got '')"),
        (" ; ", f"methods must name at least one of {', '.join(names())} (got ' ; ')"),
        ("ace;ace", "methods must each be given once (got 'ace;ace')"),
        ("ace; ace ", "methods must each be given once (got 'ace; ace ')"),
    ],
)
def test_bad_lists_are_refused(text, message):
    with pytest.raises(InputError) as caught:
        parse_list(text)
    assert str(caught.value) == message


# Errors

FORM = 'method must be stages joined by +, each a name or name(option=value, …), e.g. "admm(iterations=30) + distill"'
KNOWN = f"method must be made of {', '.join(names())}"
FORM_OF_OPTIONS = "options of a stage must be name=value, separated by commas"
ONE_OF_A_KIND = "method takes one stage of each kind"
ADMM_OPTIONS = "its options are damping, floor, iterations, relaxation, saliency, gram"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # the form
        ("", f"{FORM} (got '')"),
        ("+", f"{FORM} (got '+')"),
        ("admm +", f"{FORM} (got 'admm +')"),
        ("+ admm", f"{FORM} (got '+ admm')"),
        ("admm ++ distill", f"{FORM} (got 'admm ++ distill')"),
        ("admm(damping=1", f"{FORM} (got 'admm(damping=1')"),
        ("admm damping=1", f"{FORM} (got 'admm damping=1')"),
        ("admm((damping=1))", f"{FORM} (got 'admm((damping=1))')"),
        ("(admm)", f"{FORM} (got '(admm)')"),
        ("wanda swaps", f"{FORM} (got 'wanda swaps')"),
        ("x " * 500, f"{FORM} (got {'x ' * 50!r})"),
        ("wanda, ace", f"{FORM} (got 'wanda, ace'); separate methods by ;"),
        ("admm(damping)", f"{FORM_OF_OPTIONS} (got 'admm(damping)')"),
        ("admm(damping=)", f"{FORM_OF_OPTIONS} (got 'admm(damping=)')"),
        ("admm(=1)", f"{FORM_OF_OPTIONS} (got 'admm(=1)')"),
        ("admm(damping=1,)", f"{FORM_OF_OPTIONS} (got 'admm(damping=1,)')"),
        ("admm(damping=1 iterations=2)", f"{FORM_OF_OPTIONS} (got 'admm(damping=1 iterations=2)')"),
        ("admm(damping=1; iterations=2)", f"{FORM_OF_OPTIONS} (got 'admm(damping=1; iterations=2)')"),
        (
            "admm(damping=1, damping=2)",
            "option damping is given twice in 'admm(damping=1, damping=2)'; give it once",
        ),
        # names
        ("wonda", f"{KNOWN} (got 'wonda'); did you mean wanda?"),
        ("balancd(damping=1)", f"{KNOWN} (got 'balancd'); did you mean balanced?"),
        ("admm + destill", f"{KNOWN} (got 'destill'); did you mean distill?"),
        ("WANDA", f"{KNOWN} (got 'WANDA')"),
        ("score", f"{KNOWN} (got 'score')"),
        ("score(metric=wanda)", f"{KNOWN} (got 'score')"),
        ("wanda,ace", f"{KNOWN} (got 'wanda,ace'); separate methods by ;"),
        ("wanda:order=block", f"{KNOWN} (got 'wanda:order=block'); options are in parentheses: wanda(order=block)"),
        ("order=block", f"{KNOWN} (got 'order=block')"),
        # options outside their stage
        ("admm(colour=red)", f"admm has no option colour: {ADMM_OPTIONS}"),
        ("admm(dampign=1)", f"admm has no option dampign: {ADMM_OPTIONS}; did you mean damping?"),
        ("wanda(colour=red)", "wanda has no option colour: it has none"),
        ("mean-update(colour=red)", "mean-update has no option colour: it has none"),
        (
            "wanda(iterations=30)",
            "wanda has no option iterations: iterations is an option of admm and alps, as in admm(iterations=…)",
        ),
        (
            "obs(iterations=3)",
            "obs has no option iterations: iterations is an option of admm and alps, as in admm(iterations=…)",
        ),
        (
            "wanda(damping=1)",
            "wanda has no option damping: damping is an option of admm, alps, obs, quantize and thanos, as in "
            "admm(damping=…)",
        ),
        (
            "balanced(tokens=1000)",
            "balanced has no option tokens: tokens is an option of distill, as in distill(tokens=…)",
        ),
        (
            "published-wanda(exponent=0.5)",
            "published-wanda has no option exponent: exponent is an option of ria, as in ria(exponent=…)",
        ),
        ("wanda(exponent=1)", "wanda has no option exponent: exponent is an option of ria, as in ria(exponent=…)"),
        (
            "balanced(range=0.1)",
            "balanced has no option range: range is an option of allocate, as in allocate(range=…)",
        ),
        (
            "admm(order=block)",
            "admm has no option order: order is an option of collect, as in collect(order=…)",
        ),
        (
            "balanced(colour=red)",
            f"balanced has no option colour: its options are order, batch_tokens, token_norm, "
            f"{ADMM_OPTIONS.removeprefix('its options are ')}",
        ),
        ("admm(sparsity=0.5)", f"admm has no option sparsity: {ADMM_OPTIONS}"),
        ("admm(label=x)", f"admm has no option label: {ADMM_OPTIONS}"),
        # values
        ("admm(iterations=many)", "iterations must be a whole number (got 'many')"),
        ("admm(iterations=1.5)", "iterations must be a whole number (got '1.5')"),
        ("admm(iterations=0)", "iterations must be a whole number of at least 1 (got 0)"),
        ("admm(damping=big)", "damping must be a number (got 'big')"),
        ("admm(damping=-0.1)", "damping must be a share of the mean diagonal, 0 or more (got -0.1)"),
        ("obs(damping=nan)", "damping must be a share of the mean diagonal, 0 or more (got nan)"),
        ("balanced(damping=inf)", "damping must be a share of the mean diagonal, 0 or more (got inf)"),
        ("admm(floor=-1)", "floor must be a share of the geometric mean, 0 or more (got -1.0)"),
        ("admm(saliency=loss)", "saliency must be one of magnitude, obs (got 'loss')"),
        ("admm(gram=cos)", "gram must be one of auto, plain, shared, cosine, sketch (got 'cos'); did you mean cosine?"),
        ("swaps(gram=sketch)", "gram must be one of auto, plain, shared, cosine (got 'sketch')"),
        ("obs(gram=sketch)", "gram must be one of auto, plain, shared, cosine (got 'sketch')"),
        ("swaps(max_swaps=0)", "max_swaps must be a whole number of at least 1 (got 0)"),
        ("mean-swaps(rounds=0)", "rounds must be a whole number of at least 1 (got 0)"),
        ("train(epochs=0)", "epochs must be a whole number of at least 1 (got 0)"),
        ("train(learning_rate=0)", "learning_rate must be more than 0 (got 0.0)"),
        ("train(step_tokens=0)", "step_tokens must be a whole number of at least 1 (got 0)"),
        ("train(held_out=1)", "held_out must be a share of at least 0 and less than 1 (got 1.0)"),
        ("distill(learning_rate=nan)", "learning_rate must be more than 0 (got nan)"),
        ("distill(tokens=0)", "tokens must be a whole number of at least 1 (got 0)"),
        (f"distill(tokens={2**63})", f"tokens must be below 2^63 (got {2**63})"),
        ("quantize(bits=5)", "bits must be one of 8, 4, 3 (got 5)"),
        ("quantize(bits=4.0)", "bits must be a whole number (got '4.0')"),
        ("quantize(group=100)", "group must be a multiple of 64 (got 100)"),
        ("quantize(group=0)", "group must be a multiple of 64 (got 0)"),
        ("quantize(gram=sketch)", "gram must be one of auto, plain, shared, cosine (got 'sketch')"),
        ("quantize(damping=-1)", "damping must be a share of the mean diagonal, 0 or more (got -1.0)"),
        (
            "admm(gram=cosine) + quantize(gram=plain)",
            "gram must be the same for all stages of the method (got cosine for admm and plain for quantize)",
        ),
        (
            "balanced(gram=plain) + quantize",
            "gram must be the same for all stages of the method (got plain for admm and cosine for quantize)",
        ),
        (
            "balanced(gram=cosine) + quantize(bits=8)",
            "gram must be the same for all stages of the method (got cosine for admm and shared for quantize)",
        ),
        (
            "better + quantize",
            "method admm + distill(tokens=20480) + quantize must have its stages in the order in which they run; write "
            "admm + quantize + distill(tokens=20480)",
        ),
        (
            "quantize + admm",
            "method quantize + admm must have its stages in the order in which they run; write admm + quantize",
        ),
        ("ria(exponent=inf)", "exponent must be a finite number (got inf)"),
        ("collect(order=random)", "order must be one of sequential, block (got 'random')"),
        ("collect(batch_tokens=0)", "batch_tokens must be a whole number of at least 1 (got 0)"),
        ("ace + collect(token_norm=x)", "token_norm must be one of exact, sketch (got 'x')"),
        ("allocate(by=even)", "allocate has no option by: its options are range"),
        ("allocate(range=0)", "range must be a difference in sparsity between 0 and 1 (got 0.0)"),
        ("allocate(range=1)", "range must be a difference in sparsity between 0 and 1 (got 1.0)"),
        # stages that do not fit together
        ("wanda + ria", f"{ONE_OF_A_KIND} (got wanda and ria); leave out one"),
        ("admm + obs", f"{ONE_OF_A_KIND} (got admm and obs); leave out one"),
        ("swaps + mean-swaps", f"{ONE_OF_A_KIND} (got swaps and mean-swaps); leave out one"),
        ("balanced + admm", f"{ONE_OF_A_KIND} (got admm and admm); leave out one"),
        ("best + distill", f"{ONE_OF_A_KIND} (got distill and distill); leave out one"),
        ("collect + collect(order=block)", f"{ONE_OF_A_KIND} (got collect and collect); leave out one"),
        ("collect + collect", f"{ONE_OF_A_KIND} (got collect and collect); leave out one"),
        ("allocate + allocate + admm", f"{ONE_OF_A_KIND} (got allocate and allocate); leave out one"),
        (
            "distill + admm",
            "method distill + admm must have its stages in the order in which they run; write admm + distill",
        ),
        (
            "admm + wanda",
            "method admm + wanda must have its stages in the order in which they run; write wanda + admm",
        ),
        (
            "admm + collect(order=block)",
            "method admm + collect(order=block) must have its stages in the order in which they run; write "
            "collect(order=block) + admm",
        ),
        (
            "admm + published-wanda",
            "method admm + collect(order=block) + wanda must have its stages in the order in which they run; write "
            "collect(order=block) + wanda + admm",
        ),
        (
            "admm + collect",
            "method admm + collect must have its stages in the order in which they run; write collect + admm",
        ),
        # options that no stage of the method reads
        (
            "wanda + admm(saliency=magnitude)",
            "saliency says how admm chooses the mask, but wanda does; leave out one of them",
        ),
        (
            "swaps(max_swaps=7) + admm(saliency=magnitude)",
            "saliency says how admm chooses the mask, but swaps(max_swaps=7) does; leave out one of them",
        ),
        (
            "swaps + admm(gram=sketch)",
            "gram must be the same for all stages of the method (got shared for swaps and sketch for admm)",
        ),
        (
            "admm(gram=sketch) + quantize",
            "gram must be the same for all stages of the method (got sketch for admm and cosine for quantize)",
        ),
        (
            "fast(gram=sketch) + quantize",
            "gram must be the same for all stages of the method (got sketch for admm and cosine for quantize)",
        ),
        (
            "swaps(gram=plain) + obs",
            "gram must be the same for all stages of the method (got plain for swaps and shared for obs)",
        ),
        (
            "collect(token_norm=exact) + wanda",
            "token_norm is for methods whose scores weight tokens by their output norm (got "
            "collect(token_norm=exact) + wanda); leave it out",
        ),
    ],
)
def test_bad_texts_are_named(text, message):
    with pytest.raises(InputError) as caught:
        parse(text)
    assert str(caught.value) == message


def test_a_preset_reads_what_quantize_reads():
    method = parse("fast + quantize")
    assert method.solve == Admm(damping=1.0, iterations=10, relaxation=1.0)
    assert parse(str(method)) == method


@pytest.mark.parametrize(
    "text",
    [
        "max_swaps=30",
        "swaps(iterations=3)",
        "wanda(gram=plain)",
        "train(tokens=5)",
        "mean-swaps(gram=cosine)",
        "fast(epochs=3)",
    ],
)
def test_no_option_is_ignored(text):
    with pytest.raises(InputError):
        parse(text)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (5, "5"),
        ([Admm(), "distill"], r"\[Admm.*"),
        ({"admm": 1}, r"\{'admm': 1\}"),
        (Admm, r"<class.*"),
    ],
    ids=str,
)
def test_what_is_no_method(given, found):
    with pytest.raises(
        InputError, match=rf'^method must be a text like "balanced", or a list of stages \(got {found}\)$'
    ):
        PruneConfig(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Score("wonda"),
            f"metric must be one of {', '.join(METRICS)}, or a callable (got 'wonda'); did you mean wanda?",
        ),
        (lambda: Score(["wanda"]), f"metric must be one of {', '.join(METRICS)}, or a callable (got ['wanda'])"),
        (lambda: Score("wanda", 0.25), "exponent is an option of ria alone (got wanda); leave it out"),
        (lambda: Admm(iterations=True), "iterations must be a whole number of at least 1 (got True)"),
        (lambda: Admm(iterations="30"), "iterations must be a whole number of at least 1 (got 30)"),
        (lambda: Admm(gram=None), "gram must be one of auto, plain, shared, cosine, sketch (got None)"),
        (lambda: Train(epochs=1.0), "epochs must be a whole number of at least 1 (got 1.0)"),
        (
            lambda: method_of([Distill(), Admm()]),
            "method distill + admm must have its stages in the order in which they run; write admm + distill",
        ),
        (
            lambda: method_of(len),
            f'method must be a text like "balanced", or a list of stages (got {len}); a score of '
            "your own is the stage Score(function)",
        ),
        (lambda: method_of(Admm), f'method must be a text like "balanced", or a list of stages (got {Admm})'),
        (lambda: method_of([]), 'method must be a text like "balanced", or a list of stages (got [])'),
        (lambda: Method((Collect(), Collect(), Admm())), f"{ONE_OF_A_KIND} (got collect and collect); leave out one"),
    ],
)
def test_bad_stages_are_named(make, message):
    with pytest.raises(InputError) as caught:
        make()
    assert str(caught.value) == message


def test_a_metric_of_the_user_has_its_own_name():
    def cubed(weight, stats):
        return weight.abs() ** 3

    method = method_of([Score(cubed), Swaps()])
    assert str(method) == method.label == "cubed + swaps"
    assert method.score is not None
