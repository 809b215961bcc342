"""Windows of text as scorers show them: whole characters, one line where they stand in a list, and to the letter."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes.judges import Judge, Reader, answers
from fixtures.synthetic import make_tokenizer

from cratelm.activations.records import Excerpt, NeuronId
from cratelm.data.tokenizer import token_bytes
from cratelm.interpretation.llm import Prompt, PromptLogprobs
from cratelm.interpretation.prompts.escaping import characters, prompt_strings, running_text, text_of, unescaped
from cratelm.interpretation.scorers.classification import Questions, detection, fuzzing, intruder
from cratelm.interpretation.scorers.embedding import embedding
from cratelm.interpretation.scorers.surprisal import surprisal
from cratelm.interpretation.scorers.windows import Contrast, marked, plain, raw

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TEXTS = ("\thail over café", "der Schnee 雪 fällt\n", "if rain:\n\treturn", "naïve → rain", "a \u200b b <|im_end|> c")
QUESTIONS = Questions(positives=5, negatives=5, least=5)
LONGEST = 40
"""Letters of a made-up text."""


def bytewise(text: str) -> list[bytes]:
    return [bytes([one]) for one in text.encode()]


def window(pieces: Sequence[bytes], fires: Sequence[int] = (), position: int = 0) -> tuple[Excerpt, list[bytes]]:
    activations = np.zeros(len(pieces), dtype=np.float32)
    activations[list(fires)] = 1
    return Excerpt(
        tokens=np.arange(len(pieces)), activations=activations, position=position, document=0
    ), list(pieces)  # fmt: skip


def cut_anywhere(text: str, rng: np.random.Generator) -> list[bytes]:
    """A text's bytes in tokens of random lengths."""
    whole = text.encode()
    ends = sorted(rng.integers(0, len(whole) + 1, size=rng.integers(0, 12)).tolist())
    return [whole[a:b] for a, b in zip([0, *ends], [*ends, len(whole)], strict=True)]


def test_characters_are_whole_however_the_tokens_cut_them(rng: np.random.Generator) -> None:
    for _ in range(50):
        text = "".join(rng.choice(list("ab é雪🙂→\n\t"), size=LONGEST))
        pieces = cut_anywhere(text, rng)
        assert text_of(pieces) == text
        found = characters(pieces)
        assert "".join(one.text for one in found) == text
        ends = np.cumsum([0, *map(len, pieces)])
        at = 0
        for one in found:
            size = len(one.text.encode())
            assert ends[one.first] <= at < at + size <= ends[one.last + 1]
            at += size
        escaped = [piece.decode(errors="backslashreplace") for piece in pieces]
        assert running_text(escaped) == text


def test_what_is_left_of_a_cut_character_is_one_sign_in_a_list_and_nothing_in_running_text() -> None:
    own, pieces = window(bytewise("雪a🙂")[1:-1])
    assert raw(own, pieces) == "a"
    assert plain(own, pieces) == "\ufffda\ufffd"
    assert running_text([r"caf\xc3", r"\xa9 \xc3"]) == r"café \xc3"
    assert unescaped(r"a\n\xc3\u200b\U0001f642") == "a\n\xc3\u200b\U0001f642"


def test_no_mark_stands_inside_a_character() -> None:
    pieces = [b"caf\xc3", b"\xa9", b" ", b" x", b"\n"]
    for fires, shown in (
        ([0], r"<<café>>  x\n"), ([1], r"caf<<é>>  x\n"), ([2, 3], r"café  <<x>>\n"), ([2], r"café<< >> x\n"),
        ([4], r"café  x<<\n>>"), ([0, 4], r"<<café>>  x<<\n>>"),
    ):  # fmt: skip
        own, table = window(pieces, fires)
        assert marked(own, own.activations > 0, table, ("<<", ">>")) == shown


def test_a_marker_of_a_tokenizer_is_none_wherever_its_tokens_end(rng: np.random.Generator) -> None:
    for _ in range(20):
        own, pieces = window(cut_anywhere("a <|im_end|> b", rng))
        assert plain(own, pieces) == raw(own, pieces) == "a <im_end> b"


def contrast_of(texts: Sequence[str]) -> tuple[Contrast, list[bytes]]:
    tokenizer = make_tokenizer(300)
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    def cut(number: int, first: int, fires: bool) -> Excerpt:
        tokens = np.array((ids[number] * 2)[first : first + 8])
        activations = np.array([0, 0, 3, 2, 0, 0, 0, 0] if fires else [0] * 8, dtype=np.float32)
        return Excerpt(tokens=tokens, activations=activations, position=100 * number + first, document=0)

    return Contrast(
        neuron=NeuronId(tap="neurons", layer=0, index=0), active=len(texts), silent=len(texts),
        positives=tuple(cut(i, 1, True) for i in range(len(texts))),
        negatives=tuple(cut(i, 3, False) for i in range(len(texts))),
    ), token_bytes(tokenizer)  # fmt: skip


@pytest.mark.parametrize("kind", ["detection", "fuzzing", "intruder"])
def test_the_whole_chat_is_the_golden_one(kind: str) -> None:
    windows, pieces = contrast_of(TEXTS)
    judge = Judge(lambda own, _: '{"intruder": 1}' if kind == "intruder" else answers([1] * len(own)))
    if kind == "intruder":
        asyncio.run(intruder(windows, pieces, judge, QUESTIONS))
    else:
        ask = detection if kind == "detection" else fuzzing
        asyncio.run(ask("words for the weather", windows, pieces, judge, QUESTIONS))
    text = "\n".join(f"[{message.role}]\n{message.text}\n" for message in judge.chats[0])
    assert text == (GOLDEN / f"scorer_{kind}.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == text.count("\n"), "no window breaks a line"


class Joining(Reader):
    """Joins the first letter of every window with what stands before it."""

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        found = await super().prompt_logprobs(prompts, top=top)
        for one in found:
            one.logprobs[0] = np.nan
        return found


def test_surprisal_and_the_encoder_read_the_text_itself() -> None:
    windows, pieces = contrast_of(TEXTS)
    texts = [raw(one, pieces) for one in (*windows.positives, *windows.negatives)]
    assert any("\n" in text for text in texts)
    assert not any("\\" in text or "\ufffd" in text for text in texts)
    reader = Joining(lambda _: -1.0, candidates=lambda _: {})
    found = asyncio.run(surprisal("words for the weather", windows, pieces, reader, QUESTIONS))
    assert sorted({prompt.rest for prompt in reader.prompts}) == sorted(set(texts))
    assert found.score == (0.0,) * len(texts), "the letter that was joined does not count"
    prompt = next(one for one in reader.prompts if "\n" in one.rest)
    assert f"{prompt.prefix}{prompt.rest}" == (GOLDEN / "scorer_surprisal.txt").read_text(encoding="utf-8")
    read: list[str] = []

    class Encoder:
        name = "keeps"

        def encode(self, texts: Sequence[str]) -> np.ndarray:
            read.extend(texts)
            return np.ones((len(texts), 2))

    embedding("words for the weather", windows, pieces, Encoder(), QUESTIONS)
    assert read[1:] == texts


def test_no_single_token_of_a_vocabulary_reads_other_than_it_is_shown() -> None:
    tokenizer = make_tokenizer(300)
    for piece, shown in zip(token_bytes(tokenizer), prompt_strings(tokenizer), strict=True):
        if b"\\" not in piece and b"<|" not in piece:
            assert unescaped(shown).encode("latin-1" if "\\x" in shown else "utf-8") == piece
