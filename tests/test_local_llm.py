"""A model in the process: its echoes and answers against one text, and one token, at a time without a cache."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")

import torch
from fakes.language_models import KINDS, Kind, make_fast_tokenizer, make_llm
from fixtures.hugging_face import FAMILIES, save
from fixtures.tiny import random_model, tiny_config

from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError, Message, Prompt, PromptLogprobs, Sampling
from cratelm.local_llm import LocalLLM, name_of

PREFIX = "the storm came over the ridge before supper, and by morning there was hail in the grass.\n" * 4
RESTS = (" a\tunknown\n the\tunknown\n", " rain\t10\n snow\t3\n\n wind\tunknown\n", "х é\t9\n", " of\t0")
SLIDING: dict[str, Any] = {"sliding_window": 24}


def echoes(llm: LocalLLM, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
    async def ask() -> list[Sequence[PromptLogprobs]]:
        return await asyncio.gather(*(llm.prompt_logprobs([prompt], top=top) for prompt in prompts))

    return [echo for one in asyncio.run(ask()) for echo in one]


def expected_at(llm: LocalLLM, prompt: Prompt) -> dict[int, tuple[float, dict[str, float]]]:
    """Offset in the rest -> log-probability of the token there and of 15 candidates, computed one token at a time."""
    encoding = llm.tokenizer.backend_tokenizer.encode(prompt.prefix + prompt.rest, add_special_tokens=False)
    strings, ends, found = token_strings(llm.tokenizer.backend_tokenizer), [0], {}
    for i, token in enumerate(encoding.ids):
        if ends[-1] >= len(prompt.prefix) and i:
            with torch.no_grad():
                logits = llm.reader.model(input_ids=torch.tensor([encoding.ids[:i]]), use_cache=False).logits[0, -1]
            logprobs = torch.log_softmax(logits.double(), dim=0)
            texts: dict[str, float] = {}
            for index in logprobs.argsort(descending=True)[:15].tolist():
                texts[strings[index]] = float(np.logaddexp(texts.get(strings[index], -np.inf), float(logprobs[index])))
            found[ends[-1] - len(prompt.prefix)] = (float(logprobs[token]), texts)
        ends.append(encoding.offsets[i][1])
    return found


def check(llm: LocalLLM, prompts: Sequence[Prompt], tolerance: float) -> None:
    """Everything that an echo says, against `expected_at`."""
    for prompt, echo in zip(prompts, echoes(llm, prompts), strict=True):
        assert "".join(echo.tokens) == prompt.rest
        expected = expected_at(llm, prompt)
        begins = np.cumsum([0, *map(len, echo.tokens)]).tolist()
        assert set(echo.candidates) == {at for at in expected if prompt.at is None or at in prompt.at}
        for at, candidates in echo.candidates.items():
            token = max(i for i, begin in enumerate(begins[:-1]) if begin == at)
            assert echo.logprobs[token] == pytest.approx(expected[at][0], abs=tolerance)
            assert candidates == pytest.approx(expected[at][1], abs=tolerance)


def prompts_of(rng: np.random.Generator) -> list[Prompt]:
    """Two families that share a beginning, rests of all lengths, all tokens and some."""
    prompts = []
    for who in ("words for rain", "numbers before a unit"):
        for rest in (*RESTS, "".join(rng.choice(RESTS, 3))):
            at = tuple(i + 1 for i, letter in enumerate(rest) if letter == "\t") if rng.random() < 0.5 else None
            prompts.append(Prompt(prefix=f"{PREFIX}this neuron fires on {who}\n", rest=rest, at=at))
    return prompts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_prompt_logprobs_equal_one_token_at_a_time(rng: np.random.Generator, kind: Kind, dtype: torch.dtype) -> None:
    llm = make_llm(rng, kind=kind, dtype=dtype)
    assert llm.reader.shares
    check(llm, prompts_of(rng), 1e-9 if dtype == torch.float64 else 1e-5)


FAMILIES_TRIED: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in FAMILIES] + [("mistral", SLIDING)]


@pytest.mark.parametrize(
    ("family", "changes"), FAMILIES_TRIED, ids=[f"{a}{'-sliding' * bool(b)}" for a, b in FAMILIES_TRIED]
)
def test_every_family_gives_the_same_with_a_shared_prefix(
    rng: np.random.Generator, family: str, changes: dict[str, Any]
) -> None:
    llm = make_llm(rng, family=family, tokens_at_once=60, **changes)
    assert llm.reader.shares
    prompts = prompts_of(rng)[::3]
    check(llm, prompts, 1e-9)
    assert any(len(one.tokens) for one in llm.reader.prefixes.values())


def test_prompts_may_have_no_prefix_and_need_not_be_asked_for_anything(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    check(
        llm,
        [Prompt(prefix="", rest="the rain\t10\n"), Prompt(prefix="a", rest="b\t1"), Prompt(prefix="", rest="a")],
        1e-9,
    )
    (nothing,) = echoes(llm, [Prompt(prefix=PREFIX, rest="the", at=())])
    assert (nothing.tokens, dict(nothing.candidates)) == (("the",), {})
    assert np.isnan(nothing.logprobs).all()


def test_an_offset_inside_a_token_has_no_candidates(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    (echo,) = echoes(llm, [Prompt(prefix=PREFIX, rest=" the\t10\n", at=(5, 6))])
    assert "10" in echo.tokens
    assert list(echo.candidates) == [5]


def test_what_prompts_have_in_common_is_computed_once(rng: np.random.Generator) -> None:
    """The tokens computed for an excerpt are those after the prefix that it shares, and no more."""
    llm = make_llm(rng)
    size = llm.count
    said = ["this neuron fires on words for rain\n", "this neuron fires on numbers before a unit\n"]
    excerpts = [f"{i}\tunknown\n the\tunknown\n" * 3 for i in range(8)]
    prompts = [Prompt(prefix=PREFIX + one, rest=rest, at=(rest.index("\t") + 1,)) for one in said for rest in excerpts]
    start = len(llm._tokens.start)
    wholes = [size(PREFIX + one) for one in said]
    ids = [llm.tokenizer.backend_tokenizer.encode(PREFIX + one, add_special_tokens=False).ids for one in said]
    together = next(i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b)
    echoes(llm, prompts)
    once = start + together + sum(whole - together for whole in wholes)
    assert llm.reader.tokens_computed == once + 2 * sum(map(size, excerpts))
    before = llm.reader.tokens_computed
    echoes(llm, prompts[:8])
    assert llm.reader.tokens_computed - before == sum(map(size, excerpts))


def test_batches_are_filled_by_length(rng: np.random.Generator) -> None:
    llm = make_llm(rng, tokens_at_once=64)
    lengths = rng.permutation([1, 1, 1, 1, 14, 14, 14, 14])
    prompts = [Prompt(prefix=PREFIX, rest=" the\t10\n" * int(n), at=(5,)) for n in lengths]
    echoes(llm, prompts)
    own = llm.reader.columns_computed - llm.count(PREFIX) - len(llm._tokens.start)
    assert own <= 1.3 * sum(llm.count(prompt.rest) for prompt in prompts)


def test_a_model_whose_cache_cannot_be_shared_is_computed_whole(rng: np.random.Generator, tmp_path: Path) -> None:
    """CRATE's cache is its own; its directory opens as any other's, and echoes and answers are right."""
    from cratelm.model.weights import save_model

    tokenizer = make_fast_tokenizer("ten")
    model = random_model(tiny_config("crate", vocab_size=len(tokenizer), context_length=512), rng)
    save_model(model, tmp_path / "crate", tokenizer.backend_tokenizer)
    llm = LocalLLM.open(tmp_path / "crate", device="cpu", dtype="float64")
    assert not llm.reader.shares
    assert llm.context == 512
    check(llm, prompts_of(rng)[:4], 1e-9)


def chat(llm: LocalLLM, chats: Sequence[Sequence[Message]], sampling: Sequence[Sampling]) -> list[Any]:
    async def ask() -> list[Any]:
        return await asyncio.gather(*(llm.chat(one, how) for one, how in zip(chats, sampling, strict=True)))

    return asyncio.run(ask())


def chats_of(count: int) -> list[list[Message]]:
    return [[Message("system", PREFIX), Message("user", "the rain\t10\n" * (i + 1))] for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_answers_written_together_are_those_written_alone(rng: np.random.Generator, family: str) -> None:
    """Against transformers' own generation without a cache, one prompt at a time."""
    llm = make_llm(rng, family=family, **SLIDING if family == "mistral" else {})
    replies = chat(llm, chats_of(5), [Sampling(max_tokens=n) for n in (9, 4, 12, 1, 7)])
    # An answer ends with the model's own end of text as with the tokenizer's, which here are two tokens.
    ends = sorted({llm.tokenizer.eos_token_id, llm.reader.model.generation_config.eos_token_id} - {None})
    for one, reply, budget in zip(chats_of(5), replies, (9, 4, 12, 1, 7), strict=True):
        text = llm.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.text} for m in one], tokenize=False, add_generation_prompt=True
        )
        tokens = torch.tensor([llm.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids])
        written = llm.reader.model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=budget, do_sample=False, use_cache=False,
            eos_token_id=ends, pad_token_id=0,
        )[0, tokens.shape[1] :]  # fmt: skip
        stopped = bool(set(ends) & set(written.tolist()))
        assert reply.text == llm.tokenizer.decode(written, skip_special_tokens=True)
        assert reply.finish == ("stop" if stopped else "length")
        assert (reply.prompt_tokens, reply.new_tokens) == (tokens.shape[1], len(written) - stopped)
    assert llm.reader.tokens_computed < 0.6 * sum(reply.prompt_tokens + reply.new_tokens for reply in replies)


def test_a_drawn_answer_depends_on_its_seed_alone(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    drawn = [Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    together = chat(llm, [*[chats_of(1)[0]] * 3, *chats_of(3)], [*drawn, *[Sampling(max_tokens=5)] * 3])
    alone = chat(llm, chats_of(1), drawn[:1])
    assert together[0].text == together[2].text == alone[0].text
    assert together[0].text != together[1].text


def test_drawing_follows_temperature_and_top_p(rng: np.random.Generator) -> None:
    from cratelm.shared_prefix.generation import _Draw

    logits = torch.from_numpy(rng.normal(0, 2, 12))
    shares = torch.softmax(logits / 0.7, dim=0)
    draw = _Draw(Sampling(max_tokens=1, temperature=0.7, seed=3))
    counts = np.bincount([draw.next(logits) for _ in range(4000)], minlength=12) / 4000
    assert np.abs(counts - shares.numpy()).max() < 0.05
    best = int(shares.argmax())
    only = _Draw(Sampling(max_tokens=1, temperature=0.7, top_p=float(shares[best]) * 0.99))
    assert {only.next(logits) for _ in range(50)} == {best}


def test_a_template_without_a_system_turn_gets_it_before_the_first(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    turns, each = [Message("system", " Say S. "), Message("user", "U")], "[{{ m['role'] }}] {{ m['content'] | trim }} "
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for template, text in (
        (f"{refuses}{{% for m in messages %}}{each}{{% endfor %}}", "[user] Say S. \n\nU "),
        (f"{{% for m in messages if m['role'] != 'system' %}}{each}{{% endfor %}}", "[user] Say S. \n\nU "),
        (f"{{% for m in messages %}}{each}{{% endfor %}}", "[system] Say S. [user] U "),
    ):
        llm.tokenizer.chat_template = template
        assert llm._templated(turns) == text
    llm.tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    with pytest.raises(LLMError, match="refuses this chat .no chats"):
        llm._templated(turns)


def test_what_cannot_be_done_is_said_in_one_line(rng: np.random.Generator, tmp_path: Path) -> None:
    llm = make_llm(rng, chat=False, max_position_embeddings=128)
    with pytest.raises(LLMError, match=r"^small has no chat template, so it cannot be asked. Use an instruction-tuned"):
        chat(llm, chats_of(1), [Sampling(max_tokens=1)])
    with pytest.raises(LLMError, match=r"^small reads at most 128 tokens, and this prompt has \d+\. Use a model"):
        echoes(llm, [Prompt(prefix=PREFIX * 3, rest="a")])
    with pytest.raises(CrateError, match=r"nothing is no causal language model with a tokenizer \(.*\)\. Give a model"):
        LocalLLM.open(tmp_path / "nothing", device="cpu")


def test_an_error_in_one_batch_reaches_everyone_who_waits_and_nobody_else(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_llm(rng)

    async def ask() -> list[Any]:
        real = llm.reader.read
        monkeypatch.setattr(llm.reader, "read", lambda *_, **__: 1 / 0)
        failed = await asyncio.gather(
            *(llm.prompt_logprobs([Prompt(prefix="a", rest="b")]) for _ in range(3)), return_exceptions=True
        )
        monkeypatch.setattr(llm.reader, "read", real)
        return [*failed, await llm.prompt_logprobs([Prompt(prefix="a", rest="b")])]

    *failed, worked = asyncio.run(ask())
    assert [type(one) for one in failed] == [ZeroDivisionError] * 3
    assert worked[0].tokens == ("b",)


def test_a_directory_opens_and_its_identity_is_that_of_its_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    llm = make_llm(rng, dtype=torch.float32)
    for name in ("one", "two"):
        save(llm.reader.model, tmp_path / name)
        llm.tokenizer.save_pretrained(tmp_path / name)
    one, two = (LocalLLM.open(tmp_path / name, device="cpu") for name in ("one", "two"))
    assert [name_of(path) for path in ("a/b/", "runs/crate/model", "model", "owner/name")] == [
        "b",
        "crate",
        "model",
        "name",
    ]
    assert (one.name, one.context, one.identity) == ("one", 4096, two.identity)
    with torch.no_grad():
        two.reader.model.lm_head.weight[3, 4] += 1e-3
    del two.identity
    assert one.identity != two.identity
