"""Best of several explanations: which is kept, on which text it is chosen, and what is asked again."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes.judges import pieces_of
from fakes.scripted import ScriptedLLM, strongest_tokens
from fixtures.synthetic import FIRST_TOKEN_NEURON, make_run
from interpretation.stages.test_judge import pieces
from interpretation.stages.test_language_model_stages import KEY, strings, task

from cratelm import CrateError
from cratelm.interpretation.explainers.best_of import BestOf, check_selection, selecting_scorers
from cratelm.interpretation.explainers.language_model import LLMExplainer, explainer_settings
from cratelm.interpretation.llm import Message, Sampling
from cratelm.interpretation.protocols import draw
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.windows import Contrast, contrast, plain
from cratelm.interpretation.stages.judge import JudgeContext
from cratelm.interpretation.stages.set_task import failures
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import asking

BEST = replace(KEY, explainer="scripted+best-of-4-by-detection")


@pytest.fixture
def run(tmp_path: Path, rng: np.random.Generator) -> Path:
    return make_run(tmp_path / "run", rng)


class Several(ScriptedLLM):
    """Explains as `candidate N` with the sampling seed; judges by a rule on the candidate and the pieces."""

    def __init__(self, run: Path, *, good: int, explain: Any = None) -> None:
        super().__init__(self.reply)
        self.good, self.explain = good, explain or (lambda seed: f" candidate {seed}.")
        self.questions: list[tuple[str, list[str]]] = []
        self.seeds: list[int] = []
        texts = pieces(run)
        self.fires = {plain(window, texts) for windows in held_out(run).values() for window in windows.positives}

    def reply(self, messages: Sequence[Message], sampling: Sampling) -> str:
        question = messages[-1].text
        if not question.startswith("Pattern: "):
            self.seeds.append(sampling.seed)
            return str(self.explain(sampling.seed))
        shown, text = pieces_of(question), question.split("\n")[0].removeprefix("Pattern: ")
        self.questions.append((text, shown))
        right = text == f"candidate {self.good}"
        numbers = ", ".join(str(int((piece in self.fires) == right)) for piece in shown)
        return '{"answers": [' + numbers + "]}"


def explainer(run: Path, llm: ScriptedLLM, count: int = 4) -> LLMExplainer:
    settings = explainer_settings("fixed", best_of=count, best_by="detection")
    context = JudgeContext(pieces=pieces(run), questions=Questions(), llm=llm)
    best = BestOf(scorer="detection", context=context)
    return LLMExplainer(llm=llm, settings=settings, strings=strings(run), best=best)


def explain(run: Path, llm: ScriptedLLM) -> dict[int, str]:
    asyncio.run(explainer(run, llm).explain(task(run, BEST)))
    return Store.open(run).texts(BEST)


@pytest.mark.parametrize("good", [0, 2, 3])
def test_the_candidate_that_separates_the_windows_is_kept(run: Path, good: int) -> None:
    llm = Several(run, good=good)
    texts = explain(run, llm)
    judged = judgeable(run) & set(texts)
    assert len(judged) >= 5
    assert {texts[neuron] for neuron in judged} == {f"candidate {good}"}
    assert {texts[neuron] for neuron in set(texts) - judged} <= {"candidate 0"}, "the first where none has a score"
    assert sorted(llm.seeds) == sorted([0, 1, 2, 3] * len(texts))
    assert not Store.open(run).is_done(KEY, "explain"), "a single explanation is another set"


def judgeable(run: Path) -> set[int]:
    """The neurons with enough windows left to choose by."""
    least = Questions().least
    return {n for n, windows in held_out(run).items() if min(len(windows.positives), len(windows.negatives)) >= least}


@cache
def held_out(run: Path) -> dict[int, Contrast]:
    """The windows of each neuron of documents for explaining that the prompt does not show."""
    made = task(run)
    excerpts = draw(made.records, made.protocol.explain, "explain")
    return {
        neuron: contrast(
            made.records[neuron], Questions(), part="explain", seen={e.document for e in excerpts.of(neuron)}
        )
        for neuron in range(made.records.num_neurons)
    }


def test_the_choice_sees_no_text_of_the_prompt_and_none_for_scoring(run: Path) -> None:
    llm = Several(run, good=1)
    explained, one, texts = explain(run, llm), task(run), pieces(run)
    asked = {piece for _, shown in llm.questions for piece in shown}
    expected, excerpts = set[str](), draw(one.records, one.protocol.explain, "explain")
    for neuron in judgeable(run) & set(explained):
        windows = (*held_out(run)[neuron].positives, *held_out(run)[neuron].negatives)
        expected |= {plain(window, texts) for window in windows}
        recorded = one.records[neuron].excerpts.items()
        scored = {e.document for (_, split, _), group in recorded if split == "score" for e in group}
        shown = {e.document for e in excerpts.of(neuron)}
        assert {window.document for window in windows}.isdisjoint(scored | shown)
    assert asked == expected != set()


def test_equal_candidates_are_not_scored_and_a_failed_one_is_left_out(run: Path) -> None:
    same = Several(run, good=0, explain=lambda _: " the same.")
    assert set(explain(run, same).values()) == {"the same"}
    assert same.questions == []
    Store.open(run).path.unlink()
    partly = Several(run, good=3, explain=lambda seed: "" if seed % 2 else f" candidate {seed}.")
    assert set(explain(run, partly).values()) <= {"candidate 0", "candidate 2"}
    Store.open(run).path.unlink()
    nothing = Several(run, good=3, explain=lambda _: "")
    with pytest.raises(CrateError, match="stopped: the first"):
        explain(run, nothing)


def test_nothing_is_asked_twice_and_another_scorer_is_another_set(run: Path) -> None:
    explain(run, Several(run, good=2))
    again = Several(run, good=0)
    assert set(explain(run, again).values()) <= {"candidate 2", "candidate 0"}
    assert (again.seeds, again.questions, failures(Store.open(run), BEST, "explain")) == ([], [], {})
    plain_settings, best = explainer_settings("fixed"), explainer_settings("fixed", best_of=4, best_by="rating")
    assert str(best.name("m")) == "m+best-of-4-by-rating"
    assert str(plain_settings.name("m")) == "m"
    assert asking("m+best-of-4-by-rating") == " --llm URL --model m --best-of 4 --best-by rating"
    names = {"mode", "temperature", "seed", "max_tokens", "rounding", "sample", "model", "prompts"}
    assert set(plain_settings.cache_settings(ScriptedLLM(), 0)) >= names
    assert not {"best_of", "best_by"} & set(plain_settings.cache_settings(ScriptedLLM(), 0)), "of earlier versions"
    assert explainer(run, again).set_settings(task(run, BEST))["chosen"]["judge"] == "scripted-1"


def test_a_choice_that_cannot_be_made_is_refused() -> None:
    chats, readers = {"detection", "fuzzing", "fuzzing-active"}, {"surprisal", "quick-detection", "rating"}
    assert set(selecting_scorers()) == chats | readers
    with pytest.raises(CrateError, match=r"--best-by must be one of detection, .*, got 'embedding'"):
        check_selection(2, "embedding")
    with pytest.raises(CrateError, match="--best-of must be at least 1, got 0"):
        explainer_settings("fixed", best_of=0)
    with pytest.raises(CrateError, match="same explanation every time"):
        explainer_settings("fixed", best_of=3, temperature=0.0)
    with pytest.raises(CrateError, match="--best-of needs --mode fixed"):
        explainer_settings("compat", best_of=3)
    assert explainer_settings("fixed", best_of=3).temperature == 1.0


def test_a_true_explanation_beats_false_ones(run: Path) -> None:
    """A chat that explains rightly at one seed only, and judges by what the explanation names."""

    class Honest(ScriptedLLM):
        def __init__(self) -> None:
            super().__init__(self.reply)

        def reply(self, messages: Sequence[Message], sampling: Sampling) -> str:
            question = messages[-1].text
            if not question.startswith("Pattern: "):
                true = strongest_tokens(messages, sampling)
                return true if sampling.seed == 2 else " the tokens [never]."
            names = question.split("\n")[0].split("[")[1:]
            tokens = [name.split("]")[0] for name in names]
            numbers = [int(any(token in piece for token in tokens)) for piece in pieces_of(question)]
            return '{"answers": ' + str(numbers) + "}"

    texts = explain(run, Honest())
    chosen = [texts[neuron] for neuron in texts if neuron >= FIRST_TOKEN_NEURON and neuron in judgeable(run)]
    assert len(chosen) >= 5
    # A rule of substrings is right in most windows, not in all.
    assert np.mean(["[never]" not in text for text in chosen]) > 0.6
