"""Explanations from the tokens that a neuron promotes: what the prompt lists, and what is stored."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.scripted import ScriptedLLM
from fixtures.synthetic import make_run
from interpretation.scorers.test_promoted import effects, write_directions
from interpretation.stages.test_language_model_stages import KEY, strings, task

from cratelm import CrateError
from cratelm.activations.direction_files import directions_file
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.prompts.output_explainer import output_explanation
from cratelm.interpretation.scorers.promoted import promoting_directions
from cratelm.interpretation.store.database import Store

OUTPUTS = replace(KEY, layer=0, explainer="scripted+outputs")


def explain(run: Path, llm: ScriptedLLM) -> dict[int, str]:
    explainer = LLMExplainer(
        llm=llm, settings=explainer_settings("fixed", source="outputs"), strings=strings(run),
        directions=lambda layer: promoting_directions(run, "neurons", layer),
    )  # fmt: skip
    asyncio.run(explainer.explain(task(run, OUTPUTS)))
    return Store.open(run).texts(OUTPUTS)


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


def test_the_prompt_lists_the_promoted_tokens_strongest_first_and_no_text(run: Path, rng: np.random.Generator) -> None:
    names = strings(run)
    logits = effects(rng, 12, len(names))
    write_directions(run, logits)
    llm = ScriptedLLM(lambda *_: "The neuron fires on text before names of months.")
    texts = explain(run, llm)
    assert set(texts.values()) == {"text before names of months"}
    assert len(llm.asked) == len(texts) > 0
    prompts = [messages[-1].text for messages, _ in llm.asked]
    for neuron in texts:
        listed = ", ".join(f'"{names[token]}"' for token in np.argsort(-logits[neuron])[:20])
        assert any(listed in prompt for prompt in prompts)
    assert all("<start>" not in prompt for prompt in prompts)


def test_what_is_stored_always_says_that_the_text_is_before_them(run: Path, rng: np.random.Generator) -> None:
    write_directions(run, effects(rng, 12, len(strings(run))))
    assert set(explain(run, ScriptedLLM(lambda *_: "names of months.")).values()) == {"text before names of months"}
    assert output_explanation("Text before x") == "Text before x"


def test_other_directions_make_the_set_again(run: Path, rng: np.random.Generator) -> None:
    logits, counts = effects(rng, 12, len(strings(run))), []
    for model_hash in ("m", "m", "another"):
        write_directions(run, logits, model_hash)
        llm = ScriptedLLM(lambda *_: "names.")
        explain(run, llm)
        counts.append(len(llm.asked))
    assert counts[0] == counts[2] > counts[1] == 0
    directions_file(run, 0).unlink()
    with pytest.raises(CrateError, match="Run: cratelm directions"):
        explain(run, ScriptedLLM())


def test_texts_and_outputs_exclude_each_other() -> None:
    with pytest.raises(CrateError, match="--explain-from outputs shows no text"):
        explainer_settings("fixed", source="outputs", hard_negatives=True)
    assert str(explainer_settings("fixed", source="outputs").name("m")) == "m+outputs"
    assert "source" not in explainer_settings("fixed").cache_settings(ScriptedLLM(), 0)
