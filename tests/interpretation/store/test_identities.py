"""Names of explainers, simulators and judges: stored as text, used as records."""

import ast
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest

import cratelm
from cratelm.interpretation.prompts.normalisation import Rounding
from cratelm.interpretation.store.identities import (
    ExplainerName,
    ExplanationSource,
    JudgeName,
    PromptForm,
    SimulatorName,
    parse_explainer,
    parse_simulator,
)
from cratelm.interpretation.store.schema import SetKey

MODELS = ("gpt", "org/model:v1+x", "a:b:c", "all-at-once:m", "judge j", "m+linear", "lookup", "with space")
REPAIRS = ((), ("spaced-numbers",), ("fifteen-candidates", "spaced-numbers", "escaped-tokens"))


@pytest.mark.parametrize("model", MODELS)
def test_every_name_survives_rendering_and_parsing(model: str) -> None:
    for method, top, repairs, contrast, calibration in itertools.product(
        ("all-at-once", "next-token", "token-by-token", "structured"), (9, 10), REPAIRS, (None, "minus-neutral"),
        (None, "linear", "percentile"),
    ):  # fmt: skip
        name = SimulatorName(
            method=method, model=model, top=top, repairs=repairs, contrast=contrast, calibration=calibration
        )
        assert parse_simulator(str(name)) == name
        assert SetKey(layer=0, protocol="", simulator=str(name)).simulated_by == name
        assert name.is_plain == (not repairs and calibration is None)
    roundings: tuple[Rounding | None, ...] = (None, *get_args(Rounding))
    bests: tuple[dict[str, Any], ...] = ({}, {"best_of": 4, "best_by": "quick-detection"})
    for rounding, prompt, source, negatives, best in itertools.product(
        roundings, get_args(PromptForm), get_args(ExplanationSource), (False, True), bests
    ):
        explainer = ExplainerName(
            model=model, rounding=rounding, prompt=prompt, source=source, hard_negatives=negatives, **best
        )
        assert parse_explainer(str(explainer)) == explainer
    assert parse_simulator(str(JudgeName(model=model))) == JudgeName(model=model)


@pytest.mark.parametrize(
    "name",
    [
        "all-at-once-0-9+spaced-numbers+linear:MODEL",
        "judge MODEL",
        "by-rule scripted",
        "all-at-once",
        "all-at-once-0-10:m",
        "all-at-once-0-09:m",
        "x:y",
        "+:",
        ":",
        "judge ",
        "m+best-of-1-by-rating",
        "m+best-of-04-by-rating",
        "m+best-of-4-by-",
        "m+best-of-4-by-rating+rounded-up",
        "m+hard-negatives+rounded-up",
    ],
)
def test_every_text_renders_back_to_itself(name: str) -> None:
    assert str(parse_simulator(name)) == name
    assert str(parse_explainer(name)) == name


def test_the_stored_forms_are_those_of_the_first_version() -> None:
    name = parse_simulator("all-at-once-0-9+spaced-numbers+linear:org/m:1")
    assert name == SimulatorName(
        method="all-at-once", model="org/m:1", top=9, repairs=("spaced-numbers",), calibration="linear"
    )
    assert str(ExplainerName(model="m", rounding="ceil")) == "m+rounded-up"
    assert str(ExplainerName(model="m", rounding="ceil", prompt="compact")) == "m+compact+rounded-up"
    assert str(SimulatorName(method="all-at-once", model="m", contrast="minus-neutral", calibration="linear")) == (
        "all-at-once+minus-neutral+linear:m"
    )
    assert parse_explainer("m+rounded-down") == ExplainerName(model="m", rounding="floor")
    assert SetKey(layer=0, protocol="").simulated_by is None
    assert SetKey(layer=0, protocol="", simulator="judge m").judge == "m"
    assert SetKey(layer=0, protocol="", simulator="all-at-once:m").judge == ""


def test_no_other_module_takes_stored_names_apart() -> None:
    """A call such as `key.simulator.removeprefix(...)` or `"+" in key.explainer` outside of the one parser."""
    methods = {"removeprefix", "removesuffix", "partition", "rpartition", "split", "startswith", "endswith"}
    found = []
    for file in Path(cratelm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in methods:
                owner = ast.unparse(node.func.value)
            elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
                owner = ast.unparse(node.comparators[0]) if isinstance(node.left, ast.Constant) else ""
            else:
                continue
            if owner.endswith(("simulator", "explainer", "simulator.name", "explainer.name")):
                found.append(f"{file.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)
