"""Method specs: the settings that they stand for, and the errors."""

import pytest

from ace_ext import InputError, PruneConfig
from ace_ext.compare.method_spec import METHODS, Method, parse_methods
from ace_ext.pruning.config import all_settings
from ace_ext.pruning.criteria import METRICS
from ace_ext.pruning.presets import PRESETS, PUBLISHED


def test_every_metric_preset_and_published_method_has_a_name():
    assert set(METRICS) | set(PRESETS) | set(PUBLISHED) < set(METHODS)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_by_name_is_the_default_configuration_with_it(name):
    assert Method.parse(name).config(sparsity=0.6) == PruneConfig(metric=name, sparsity=0.6)


def test_published_wanda_works_in_its_authors_order():
    (method,) = parse_methods("published-wanda")
    assert method.config(pattern="2:4") == PruneConfig(metric="wanda", order="block", pattern="2:4")


def test_a_pattern_brings_its_own_groups():
    method = Method.parse("ria:group=matrix")
    assert method.config(sparsity=0.5) == PruneConfig(metric="ria", group="matrix", sparsity=0.5)
    assert method.config(pattern="2:4") == PruneConfig(metric="ria", pattern="2:4")


def test_a_part_with_a_value_belongs_to_the_method_before_it():
    first, second, third = parse_methods("wanda, ria:order=block,ria_exponent=0.25 ,ace")
    assert (first.label, second.label, third.label) == ("wanda", "ria:order=block,ria_exponent=0.25", "ace")
    assert second.config(sparsity=0.5) == PruneConfig(metric="ria", order="block", ria_exponent=0.25)
    assert third.arguments == {"metric": "ace"}


def test_values_get_the_type_of_their_field():
    method = Method.parse("ace:order=none,batch_tokens=128,ria_exponent=1,skip=down_proj")
    assert method.config() == PruneConfig("ace", order=None, batch_tokens=128, ria_exponent=1.0, skip=("down_proj",))
    assert isinstance(method.arguments["ria_exponent"], float)


def test_what_the_method_says_wins_over_what_all_share():
    assert Method.parse("ace:batch_tokens=32").config(batch_tokens=64, skip=("a",)) == PruneConfig(
        "ace", batch_tokens=32, skip=("a",)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "methods must name at least one of magnitude"),
        (" , ", "methods must name at least one of magnitude"),
        ("wonda", "method must be one of magnitude, .* \\(got 'wonda'\\)"),
        ("ace,ace", "methods must each be given once"),
        ("ace:order", "method changes must be key=value .*got 'order' in 'ace:order'"),
        ("ace:colour=red", "key of metric, .*got 'colour=red'"),
        ("ace:sparsity=0.5", "method changes must be key=value"),
        ("ace:order=block,order=block", "gives a field twice"),
        (
            "ace:batch_tokens=many",
            r"batch_tokens must be a whole number \(got 'many' in method 'ace:",
        ),
        ("ria:ria_exponent=big", "ria_exponent must be a number"),
        ("order=block", "method must be one of"),
    ],
)
def test_bad_lists_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        parse_methods(text)


def test_a_bad_value_names_the_method():
    with pytest.raises(InputError, match="method 'ace:order=sideways': order must be one of block, sequential"):
        Method.parse("ace:order=sideways").config()


def test_a_field_that_the_configuration_lacks_is_named():
    method = Method("mine", {"metric": "ace", "colour": "red"})
    assert "colour" not in all_settings()
    with pytest.raises(InputError, match="method 'mine' needs colour, which this PruneConfig does not have"):
        method.config()
