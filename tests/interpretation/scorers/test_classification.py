"""Detection, fuzzing and intruder, answered by made-up models: what is asked, to the letter, and what is made of it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Answer, Judge, Reader, answers, by_truth, pieces_of
from fixtures.synthetic import CONSTANT, DEAD, make_run

from cratelm import CrateError, read_records
from cratelm.activations.records import Excerpt, NeuronId
from cratelm.interpretation.llm import LLM, LLMError, Prompt, Sampling
from cratelm.interpretation.scorers.classification import Questions, detection, fuzzing, intruder
from cratelm.interpretation.scorers.results import UNREADABLE, Judged
from cratelm.interpretation.scorers.windows import TOO_FEW, Contrast, contrast, plain, strong

QUESTIONS = Questions(seed=1)
REFUSAL = "I'm sorry, but I can't help with that."


def exact(positives: list[list[float]], negatives: int) -> tuple[Contrast, list[bytes]]:
    """Windows of tokens that are all different: token `i` is written ` wi`."""
    width = len(positives[0])
    numbers = iter(range(width * (len(positives) + negatives)))

    def window(activations: list[float]) -> Excerpt:
        tokens = [next(numbers) for _ in range(width)]
        values = np.array(activations, dtype=np.float32)
        return Excerpt(tokens=np.array(tokens), activations=values, position=tokens[0], document=0)

    neuron = NeuronId(tap="neurons", layer=0, index=0)
    made = Contrast(
        neuron=neuron, positives=tuple(map(window, positives)), active=len(positives), silent=negatives,
        negatives=tuple(window([0.0] * width) for _ in range(negatives)),
    )  # fmt: skip
    return made, [f" w{i}".encode() for i in range(width * (len(positives) + negatives))]


@pytest.fixture
def windows(rng: np.random.Generator) -> Contrast:
    activations = np.sort(rng.uniform(1, 9, size=(20, 1)), axis=0)[::-1] * (rng.random((20, 8)) < 0.5)
    activations[:, 3] = 10 - np.arange(20) / 3
    return exact(activations.tolist(), 20)[0]


@pytest.fixture
def pieces() -> list[bytes]:
    return [f" w{i}".encode() for i in range(40 * 8)]


def texts_of(windows: Contrast, pieces: Sequence[bytes]) -> dict[str, int]:
    """The right answer for each text."""
    both = ((1, windows.positives), (0, windows.negatives))
    return {plain(window, pieces): truth for truth, group in both for window in group}


def detect(windows: Contrast, pieces: Sequence[bytes], answer: Answer, questions: Questions = QUESTIONS) -> Judged:
    return asyncio.run(detection("some words", windows, pieces, Judge(answer), questions))


def test_a_judge_that_is_always_right_or_always_wrong(windows: Contrast, pieces: Sequence[bytes]) -> None:
    truth = texts_of(windows, pieces)
    right, wrong = (detect(windows, pieces, by_truth(truth, lie=lie)) for lie in (False, True))
    assert right.numbers() == {"balanced_accuracy": 1, "precision": 1, "recall": 1, "f1": 1}
    assert wrong.numbers() == {"balanced_accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert right.failed == wrong.failed == 0
    assert (right.active, right.silent) == (windows.active, windows.silent)
    assert sorted(right.position) == sorted(w.position for w in (*windows.positives, *windows.negatives))


def test_saying_yes_to_everything_is_worth_nothing(windows: Contrast, pieces: Sequence[bytes]) -> None:
    found = detect(windows, pieces, lambda pieces, _: answers([1] * len(pieces))).numbers()
    positives, negatives = len(windows.positives), len(windows.negatives)
    assert found["balanced_accuracy"] == 0.5
    assert found["precision"] == positives / (positives + negatives)


def test_every_window_is_asked_about_once_and_kinds_are_mixed(windows: Contrast, pieces: Sequence[bytes]) -> None:
    judge = Judge(lambda pieces, _: answers([0] * len(pieces)))
    found = asyncio.run(detection("some words", windows, pieces, judge, QUESTIONS))
    asked = [pieces_of(chat[-1].text) for chat in judge.chats]
    assert max(map(len, asked)) == QUESTIONS.per_prompt
    assert max(map(len, asked)) - min(map(len, asked)) <= 1
    shown = [piece for pieces in asked for piece in pieces]
    assert sorted(shown) == sorted(plain(w, pieces) for w in (*windows.positives, *windows.negatives))
    assert found.truth != tuple(sorted(found.truth, reverse=True))
    assert tuple(texts_of(windows, pieces)[piece] for piece in shown) == found.truth
    assert len({tuple(map(str, chat[:-1])) for chat in judge.chats}) == 1, "all prompts begin alike"


NONSENSE = {
    "refusal": lambda _: REFUSAL,
    "nothing": lambda _: "",
    "wrong length": lambda n: answers([1] * (n + 1)),
    "no list": lambda _: '{"answers": 1}',
    "other numbers": lambda n: answers([2] * n),
    "words": lambda n: json.dumps({"answers": ["yes"] * n}),
    "true and false": lambda n: json.dumps({"answers": [True] * n}),
    "another name": lambda n: json.dumps({"labels": [1] * n}),
    "two answers": lambda n: answers([1] * n) + " or " + answers([0] * n),
    "cut off": lambda n: answers([1] * n)[:-2],
    "nested": lambda n: json.dumps({"answers": [1] * n, "why": {"a": 1}}),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_an_answer_of_another_form_is_a_failure_with_its_text(
    kind: str, windows: Contrast, pieces: Sequence[bytes]
) -> None:
    """Every second prompt is answered well: those items count, the others are failures, none is gone."""
    truth, turn = texts_of(windows, pieces), iter(range(1000))

    def answer(pieces: list[str], _: Sampling) -> str:
        return NONSENSE[kind](len(pieces)) if next(turn) % 2 else answers([truth[piece] for piece in pieces])

    found = detect(windows, pieces, answer)
    assert found.numbers()["balanced_accuracy"] == 1
    assert 0 < found.failed < len(found.truth)
    assert found.failed + sum(one is not None for one in found.answer) == len(found.truth)
    for failure in found.failures:
        assert failure.said == NONSENSE[kind](len(failure.items))
        assert all(found.answer[item] is None for item in failure.items)
    with pytest.raises(LLMError, match="none of 8 answers could be parsed"):
        detect(windows, pieces, lambda pieces, _: NONSENSE[kind](len(pieces)))


def test_prose_thoughts_and_fences_around_an_answer_are_passed_over(windows: Contrast, pieces: Sequence[bytes]) -> None:
    truth = texts_of(windows, pieces)
    around = '<think>maybe {"answers": [0]}?</think> Here you are:\n```json\n%s\n```\nAnything else?'
    found = detect(windows, pieces, lambda pieces, _: around % answers([truth[piece] for piece in pieces]))
    assert (found.numbers()["f1"], found.failed) == (1, 0)


def test_too_few_readable_answers_are_a_reason_and_no_number(windows: Contrast, pieces: Sequence[bytes]) -> None:
    turn = iter(range(1000))
    found = detect(windows, pieces, lambda pieces, _: answers([1] * len(pieces)) if next(turn) == 0 else REFUSAL)
    assert (found.reason, found.numbers()) == (UNREADABLE, {})
    assert found.failures[0].said == REFUSAL


def test_a_server_that_gives_up_is_a_failure_too(windows: Contrast, pieces: Sequence[bytes]) -> None:
    turn = iter(range(1000))

    def answer(pieces: list[str], _: Sampling) -> str:
        if next(turn) == 2:
            raise LLMError("the server answered 500 four times")
        return answers([1] * len(pieces))

    (failure,) = detect(windows, pieces, answer).failures
    assert failure.said == "the server answered 500 four times"


@pytest.mark.parametrize("index", [DEAD, CONSTANT])
def test_a_neuron_without_enough_windows_is_counted_without_a_call(
    index: int, tmp_path: Path, rng: np.random.Generator, pieces: Sequence[bytes]
) -> None:
    records = read_records(make_run(tmp_path / "run", rng, layers=1), 0)
    none, judge = contrast(records[index], QUESTIONS), Judge(lambda *_: REFUSAL)
    for asked in (
        detection("x", none, pieces, judge, QUESTIONS), fuzzing("x", none, pieces, judge, QUESTIONS),
        intruder(none, pieces, judge, QUESTIONS),
    ):  # fmt: skip
        found = asyncio.run(asked)
        assert (found.reason, found.active, found.silent) == (TOO_FEW, none.active, none.silent)
        assert found.numbers() == {}
    assert judge.chats == []


def test_a_row_of_the_store_comes_back(windows: Contrast, pieces: Sequence[bytes]) -> None:
    turn = iter(range(1000))
    found = detect(windows, pieces, lambda pieces, _: answers([1] * len(pieces)) if next(turn) % 3 else REFUSAL)
    row = json.loads(json.dumps(found.row()))
    assert Judged.of_row(row) == found
    assert Judged.of_row(row | {"of a later version": 1}) == found


def test_fuzzing_marks_strong_tokens_right_and_as_many_anywhere_wrong() -> None:
    windows, pieces = exact([[9, 0, 2.6, 4], [0, 5, 1, 0], [3, 0, 0, 0]], 3)
    right = {" <<w0>> w1 w2 <<w3>>", " w4 <<w5>> w6 w7", " <<w8>> w9 w10 w11"}
    questions = Questions(width=4, least=3, positives=3, negatives=3)
    judge = Judge(lambda pieces, _: answers([int(piece in right) for piece in pieces]))
    found = asyncio.run(fuzzing("some words", windows, pieces, judge, questions))
    assert found.numbers()["balanced_accuracy"] == 1
    shown = [piece for chat in judge.chats for piece in pieces_of(chat[-1].text)]
    wrong = [piece for piece in shown if piece not in right]
    assert len(wrong) == 3
    for piece in wrong:  # 4 marks in 3 windows: 2 in each, rounded up; neighbours share a pair of signs
        marked = piece.replace("<<", "").replace(">>", "")
        assert marked in {" w12 w13 w14 w15", " w16 w17 w18 w19", " w20 w21 w22 w23"}
        inside = " ".join(part.split(">>")[0] for part in piece.split("<<")[1:])
        assert len(inside.split()) == 2


def test_fuzzing_of_the_active_kind_marks_weak_tokens_of_the_same_windows() -> None:
    windows, pieces = exact([[9, 0, 2.6, 4], [0, 5, 1, 0], [3, 0, 0, 0], [1, 1, 1, 1]], 0)
    questions = Questions(width=4, least=3, positives=4, negatives=3)
    judge = Judge(lambda pieces, _: answers([0] * len(pieces)))
    found = asyncio.run(fuzzing("some words", windows, pieces, judge, questions, active=True))
    assert sorted(found.truth) == [0, 0, 0, 1, 1, 1, 1]  # the window without a weak token has no wrong marks
    shown = [piece for chat in judge.chats for piece in pieces_of(chat[-1].text)]
    for truth, piece in zip(found.truth, shown, strict=True):
        marked = {token for part in piece.split("<<")[1:] for token in part.split(">>")[0].split()}
        window = windows.positives[int(piece.replace("<<", "").split()[0].removesuffix(">>")[1:]) // 4]
        strongest = {f"w{token}" for token in window.tokens[strong(window)]}
        assert marked == strongest if truth else marked.isdisjoint(strongest)
        assert truth or len(marked) == min(2, (~strong(window)).sum())


def test_code_that_holds_the_signs_is_marked_with_others(windows: Contrast, pieces: Sequence[bytes]) -> None:
    judge = Judge(lambda pieces, _: answers([1] * len(pieces)))
    code = [piece if i % 7 else b"<<" for i, piece in enumerate(pieces)]
    asyncio.run(fuzzing("some words", windows, code, judge, QUESTIONS))
    system, *_, question = judge.chats[0]
    assert "between [[ and ]]" in system.text
    assert "[[" in question.text
    assert "{open}" not in "".join(message.text for message in judge.chats[0])


def test_a_judge_that_finds_every_intruder_or_guesses(windows: Contrast, pieces: Sequence[bytes]) -> None:
    silent = {plain(w, pieces) for w in windows.negatives}

    def find(pieces: list[str], _: Sampling) -> str:
        bare = [piece.replace("<<", "").replace(">>", "") for piece in pieces]
        return json.dumps({"intruder": 1 + next(i for i, piece in enumerate(bare) if piece in silent)})

    found = asyncio.run(intruder(windows, pieces, Judge(find), QUESTIONS))
    numbers = found.numbers()
    assert (numbers["accuracy"], numbers["high"], numbers["chance"]) == (1, 1, 0.2)
    assert len(found.truth) == len(windows.negatives)
    assert 0.8 < numbers["low"] < 0.9  # 20 of 20: Wilson's lower end is 1 / (1 + 1.96^2 / 20)
    first = asyncio.run(intruder(windows, pieces, Judge(lambda *_: '{"intruder": 1}'), QUESTIONS))
    assert first.numbers()["accuracy"] == np.mean([seat == 1 for seat in found.truth])
    assert set(found.truth) == {1, 2, 3, 4, 5}
    judge = Judge(lambda *_: '{"intruder": 6}')
    with pytest.raises(LLMError, match="intruder"):
        asyncio.run(intruder(windows, pieces, judge, QUESTIONS))
    assert all(len(pieces_of(chat[-1].text)) == 5 for chat in judge.chats)


def test_the_company_of_an_intruder_is_of_one_strength_and_the_strengths_take_turns() -> None:
    windows, pieces = exact([[10.0 - i, 0, 0, 0] for i in range(8)], 6)
    judge = Judge(lambda *_: '{"intruder": 1}')
    questions = Questions(width=4, options=3, strengths=4, least=2)
    asyncio.run(intruder(windows, pieces, judge, questions))
    first_tokens = [
        sorted(int(piece.split()[0].strip("<>w")) // 4 for piece in pieces_of(chat[-1].text)) for chat in judge.chats
    ]
    assert [own[:2] for own in first_tokens] == [[0, 1], [2, 3], [4, 5], [6, 7], [0, 1], [2, 3]]
    assert sorted(own[2] for own in first_tokens) == list(range(8, 14))


def test_the_whole_text_of_a_question() -> None:
    windows, pieces = exact([[0, 5, 1, 0]], 1)
    judge = Judge(lambda pieces, _: answers([1] * len(pieces)))
    questions = Questions(width=4, least=1, positives=1, negatives=1)
    asyncio.run(detection("braces {pieces} of code", windows, pieces, judge, questions))
    (chat,) = judge.chats
    assert [message.role for message in chat] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert chat[0].text.startswith("You check a description of a pattern in text against short pieces of text.")
    assert chat[2].text == '{"answers": [1, 0, 1]}'
    assert chat[-1].text in (
        "Pattern: braces {pieces} of code\n\nPieces:\n1.  w0 w1 w2 w3\n2.  w4 w5 w6 w7",
        "Pattern: braces {pieces} of code\n\nPieces:\n1.  w4 w5 w6 w7\n2.  w0 w1 w2 w3",
    )


def test_the_schema_asks_for_exactly_what_is_read(windows: Contrast, pieces: Sequence[bytes]) -> None:
    schemas = []

    def answer(pieces: list[str], sampling: Sampling) -> str:
        schemas.append((len(pieces), sampling.schema))
        return answers([1] * len(pieces))

    detect(windows, pieces, answer)
    for count, schema in schemas:
        assert schema is not None
        numbers = schema["properties"]["answers"]  # type: ignore[index]
        assert (numbers["minItems"], numbers["maxItems"], numbers["items"]["enum"]) == (count, count, [0, 1])


def probabilities(windows: Contrast, pieces: Sequence[bytes], llm: LLM) -> Judged:
    questions = replace(QUESTIONS, answers="probabilities")
    return asyncio.run(detection("some words", windows, pieces, llm, questions))


def test_probabilities_rank_the_windows_and_a_half_decides(windows: Contrast, pieces: Sequence[bytes]) -> None:
    truth = texts_of(windows, pieces)

    def candidates(prompt: Prompt) -> dict[str, float]:
        piece = prompt.rest.split("\nShows the pattern")[0]
        return {"1": np.log(0.02 if truth[piece] else 0.01), "0": np.log(0.03), " 1": np.log(0.9)}

    reader = Reader(lambda _: -1.0, candidates=candidates)
    numbers = probabilities(windows, pieces, reader).numbers()
    assert numbers["auc"] == 1  # the order is right
    assert numbers["balanced_accuracy"] == 0.5  # but nothing reaches a half
    assert len({prompt.prefix for prompt in reader.prompts}) == 1
    assert all(prompt.rest.endswith("(0):\t0") and prompt.at == (len(prompt.rest) - 1,) for prompt in reader.prompts)
    found = probabilities(windows, pieces, reader)
    assert {round(one, 9) for one in found.score if one is not None} == {0.4, 0.25}


def test_a_place_where_no_number_is_expected_is_a_failure_with_what_was(
    windows: Contrast, pieces: Sequence[bytes]
) -> None:
    turn = iter(range(1000))
    reader = Reader(lambda _: -1.0, candidates=lambda _: {"1": -1.0} if next(turn) else {"The": -0.1, "A": -2.0})
    found = probabilities(windows, pieces, reader)
    (failure,) = found.failures
    assert failure.said == "neither 0 nor 1 is among the candidates: The, A"
    assert found.score.count(None) == found.answer.count(None) == 1
    assert {one for one in found.score if one is not None} == {1.0}
    with pytest.raises(LLMError, match="neither 0 nor 1"):
        probabilities(windows, pieces, Reader(lambda _: -1.0, candidates=lambda _: {}))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(CrateError, match="options at least 2"):
        Questions(options=1)
    with pytest.raises(CrateError, match="at least 5"):
        Questions(positives=2)
