"""Hard negatives: where a neuron is silent and its neighbours are not, against a brute force over the records."""

import asyncio
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.scripted import ScriptedLLM
from fixtures.synthetic import make_run
from interpretation.stages.test_language_model_stages import KEY, strings, task

from cratelm import CrateError
from cratelm.activations.records import LayerRecords
from cratelm.interpretation.explainers.hard_negatives import (
    SHOWN,
    WIDTH,
    hard_negatives,
    hardness,
    nearest,
    token_strengths,
)
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.prompts.escaping import running_text
from cratelm.interpretation.prompts.explainer import ExplainerPrompt
from cratelm.interpretation.scorers.windows import silent_windows
from cratelm.interpretation.store.database import Store

NEGATIVES = replace(KEY, explainer="scripted+hard-negatives")


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


def with_neighbours(records: LayerRecords, near: list[list[int]]) -> LayerRecords:
    return replace(records, tables={**records.tables, "similar_neuron": np.array(near)})


def ring(records: LayerRecords) -> LayerRecords:
    count = records.num_neurons
    return with_neighbours(records, [[(i + 1) % count, (i + 2) % count, -1] for i in range(count)])


def test_the_neuron_is_silent_and_a_neighbour_fires_on_a_token(run: Path) -> None:
    records = ring(task(run).records)
    made = 0
    for neuron in range(records.num_neurons):
        windows, record = hard_negatives(records, neuron), records[neuron]
        made += len(windows)
        assert len(windows) <= SHOWN
        assert len({window.document for window in windows}) == len(windows), "one window of each document"
        known = [e for (_, split, _), es in record.excerpts.items() if split == "explain" for e in es]
        for window in windows:
            assert len(window.tokens) == WIDTH
            assert window.activations.max() <= 0
            assert any(
                e.position <= window.position and window.position + WIDTH <= e.position + len(e.tokens) for e in known
            ), "silence is recorded, not guessed"
        neighbours = [other for other in nearest(records, neuron) if other not in (neuron, -1)]
        fires = set()
        for other in neighbours:
            for (width, split, _), excerpts in records[other].excerpts.items():
                if split == "explain" and width == 64:
                    for excerpt in excerpts:
                        fires |= set(excerpt.tokens[excerpt.activations > 0].tolist())
        assert all(set(window.tokens.tolist()) & fires for window in windows)
    assert made > 0


def test_the_hardest_windows_come_first_and_no_harder_one_is_left_out(run: Path) -> None:
    records = ring(task(run).records)
    for neuron in range(3, records.num_neurons):
        neighbours = [token_strengths(records, other) for other in nearest(records, neuron)]
        shown = hard_negatives(records, neuron)
        shares = [hardness(window, neighbours) for window in shown]
        assert shares == sorted(shares, reverse=True)
        documents = {window.document for window in shown}
        others = [w for w in silent_windows(records[neuron], WIDTH) if w.document not in documents]
        if len(shown) == SHOWN:
            assert max((hardness(window, neighbours) for window in others), default=0) <= shares[-1]


def test_the_strength_of_a_token_is_its_mean_with_one_silent_occurrence_more(run: Path) -> None:
    records = task(run).records
    sums, counts = dict[int, float](), dict[int, int]()
    for (width, split, _), excerpts in records[5].excerpts.items():
        for excerpt in excerpts if (width, split) == (64, "explain") else ():
            for token, value in zip(excerpt.tokens.tolist(), excerpt.activations.tolist(), strict=True):
                sums[token], counts[token] = sums.get(token, 0) + max(value, 0), counts.get(token, 0) + 1
    means = {token: total / (counts[token] + 1) for token, total in sums.items() if total > 0}
    brute = {token: mean / max(means.values()) for token, mean in means.items()}
    assert token_strengths(records, 5) == pytest.approx(brute)


def test_records_without_neighbours_are_refused(run: Path) -> None:
    records = task(run).records
    tables = {name: table for name, table in records.tables.items() if "neuron" not in name}
    with pytest.raises(CrateError, match=r"--hard-negatives needs records with the nearest neurons.*cratelm collect"):
        hard_negatives(replace(records, tables=tables), 3)
    with pytest.raises(CrateError, match="--hard-negatives needs --mode fixed"):
        explainer_settings("compat", hard_negatives=True)


def explainer(run: Path, llm: ScriptedLLM, **settings: Any) -> LLMExplainer:
    return LLMExplainer(llm=llm, settings=explainer_settings("fixed", **settings), strings=strings(run))


def test_the_prompt_has_them_before_its_request_and_is_otherwise_the_same(run: Path) -> None:
    one, llm = task(run), ScriptedLLM()
    records = ring(one.records)
    asked = list(range(3, records.num_neurons))
    plain = dict(explainer(run, llm).prompts(records, one.protocol, asked))
    marked = dict(explainer(run, llm, hard_negatives=True).prompts(records, one.protocol, asked))
    texts, different = strings(run), 0
    for neuron in asked:
        before, after = plain[neuron], marked[neuron]
        assert isinstance(before, ExplainerPrompt)
        assert isinstance(after, ExplainerPrompt)
        shown = [running_text([texts[t] for t in window.tokens.tolist()]) for window in hard_negatives(records, neuron)]
        last = after.messages[-1].text
        assert re.findall(r"^- (.*)$", last, re.MULTILINE) == shown
        assert last.endswith(before.messages[-1].text.rpartition("\n\n")[2]), "the request is last"
        assert after.messages[:-1] == before.messages[:-1]
        assert after.tokens == before.tokens + llm.count(last) - llm.count(before.messages[-1].text)
        different += last != before.messages[-1].text
    assert different > 0


def test_they_are_a_separate_set(run: Path) -> None:
    settings = explainer_settings("fixed", hard_negatives=True)
    assert str(settings.name("m")) == "m+hard-negatives"
    assert settings.cache_settings(ScriptedLLM(), 0)["hard_negatives"] is True
    assert "negatives" not in explainer_settings("fixed").cache_settings(ScriptedLLM(), 0)
    llm, one = ScriptedLLM(), task(run, NEGATIVES)
    asyncio.run(explainer(run, llm, hard_negatives=True).explain(replace(one, records=ring(one.records))))
    assert Store.open(run).texts(NEGATIVES)
    assert not Store.open(run).is_done(KEY, "explain")
    assert any("\n- " in messages[-1].text for messages, _ in llm.asked)


def test_a_block_that_does_not_fit_leaves_out_few_shot_examples(run: Path) -> None:
    one = task(run)
    records, asked = ring(one.records), list(range(3, 12))

    def dropped(**settings: Any) -> list[int]:
        llm = ScriptedLLM(context=1100)
        prompts = explainer(run, llm, **settings).prompts(records, one.protocol, asked)
        fitting = [prompt for _, prompt in prompts if isinstance(prompt, ExplainerPrompt)]
        assert all(prompt.tokens + 100 <= 1100 for prompt in fitting)
        return [prompt.dropped for prompt in fitting]

    assert sum(dropped(hard_negatives=True)) >= sum(dropped())
