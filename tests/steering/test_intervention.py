"""`Intervention` is the only way to say what changes while a model runs."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from fixtures.tiny import random_model, tiny_config

import cratelm
from cratelm.activations.taps import edit
from cratelm.steering.changes import Change
from cratelm.steering.generate import next_logits
from cratelm.steering.intervention import NO_INTERVENTION, Control, Intervention
from cratelm.steering.positions import Positions

PACKAGE = Path(cratelm.__file__).parent
FIELDS = {"changes", "positions", "coders", "keep_error", "control"}
MOST_PARAMETERS = 7


def functions() -> Iterator[tuple[str, list[str]]]:
    """Name and parameters of every function of steering and of the steps around it."""
    for folder in ("steering", "workflows/steering"):
        for file in sorted((PACKAGE / folder).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    parameters = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                    yield f"{file.stem}.{node.name}", [name for name in parameters if name != "self"]


def test_no_steering_function_has_more_than_seven_parameters() -> None:
    names = list(functions())
    assert len(names) > 80
    assert [name for name, parameters in names if len(parameters) > MOST_PARAMETERS] == []


def test_no_function_takes_fields_of_an_intervention_apart_from_each_other() -> None:
    assert {field for field in Intervention.__dataclass_fields__} == FIELDS
    assert [name for name, parameters in functions() if len(FIELDS.intersection(parameters)) > 1] == []
    takers = {name for name, parameters in functions() if "intervention" in parameters}
    assert {
        "steer.steer", "generate.generate", "generate.next_logits", "measure.next_token_effect",
        "measure.steered_effect", "measure.text_loss", "task.continuation",
    } <= takers  # fmt: skip


def test_an_intervention_does_what_a_hand_written_edit_does(rng: np.random.Generator) -> None:
    model = random_model(tiny_config(), rng)
    tokens = torch.from_numpy(rng.integers(272, size=(2, 7)))

    def set_neuron_5(code: torch.Tensor) -> torch.Tensor:
        code = code.clone()
        code[:, :3, 5] = 2.0
        return code

    with torch.no_grad(), edit(model, {model.neuron_taps[0]: set_neuron_5}):
        wanted = model(tokens)[:, -1]
    intervention = Intervention(
        changes=[Change(layer=0, index=5, how="set", value=2.0)], positions=Positions(spans=((0, 2),))
    )
    torch.testing.assert_close(next_logits(model, tokens, intervention), wanted, rtol=1e-5, atol=1e-5)
    assert str(intervention) == "0/5=set:2"


def test_the_baseline_drops_the_changes_and_keeps_a_dropped_error() -> None:
    change = Change(layer=0, index=5, how="silence")
    assert str(NO_INTERVENTION) == "no change"
    assert Intervention(changes=[change]).baseline == NO_INTERVENTION
    dropped = Intervention(changes=[change], keep_error=False, control=Control(kind="opposite"))
    assert dropped.baseline == Intervention(keep_error=False)
