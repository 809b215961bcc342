"""A language model in this process: its prompt logprobs and answers against one text at a time without a cache."""

import asyncio
import itertools
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

from cratelm import local_llm
from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError, Message, Prompt, PromptLogprobs, Sampling
from cratelm.local_llm import LocalLLM, name_of
from cratelm.shared_prefix.reader import TextToRead

PREFIX = "the storm came over the ridge before supper, and by morning there was hail in the grass.\n" * 4
RESTS = (" a\tunknown\n the\tunknown\n", " rain\t10\n snow\t3\n\n wind\tunknown\n", "х é\t9\n", " of\t0")
SLIDING: dict[str, Any] = {"sliding_window": 24}


def logprobs_of(llm: LocalLLM, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
    async def ask() -> list[Sequence[PromptLogprobs]]:
        return await asyncio.gather(*(llm.prompt_logprobs([prompt], top=top) for prompt in prompts))

    return [logprobs for answer in asyncio.run(ask()) for logprobs in answer]


def expected_at(llm: LocalLLM, prompt: Prompt) -> dict[int, tuple[float, dict[str, float]]]:
    """Offset in the rest -> log-probability of the token there and of 15 candidates, computed one token at a time."""
    encoding = llm.tokenizer.backend_tokenizer.encode(prompt.prefix + prompt.rest, add_special_tokens=False)
    strings, ends, expected = token_strings(llm.tokenizer.backend_tokenizer), [0], {}
    for i, token in enumerate(encoding.ids):
        if ends[-1] >= len(prompt.prefix) and i:
            with torch.no_grad():
                logits = llm.reader.model(input_ids=torch.tensor([encoding.ids[:i]]), use_cache=False).logits[0, -1]
            logprobs = torch.log_softmax(logits.double(), dim=0)
            texts: dict[str, float] = {}
            for index in logprobs.argsort(descending=True)[:15].tolist():
                texts[strings[index]] = float(np.logaddexp(texts.get(strings[index], -np.inf), float(logprobs[index])))
            expected[ends[-1] - len(prompt.prefix)] = (float(logprobs[token]), texts)
        ends.append(encoding.offsets[i][1])
    return expected


def check(llm: LocalLLM, prompts: Sequence[Prompt], tolerance: float) -> None:
    """Compare every field of the prompt logprobs with `expected_at`."""
    for prompt, echo in zip(prompts, logprobs_of(llm, prompts), strict=True):
        assert "".join(echo.tokens) == prompt.rest
        expected = expected_at(llm, prompt)
        begins = np.cumsum([0, *map(len, echo.tokens)]).tolist()
        assert set(echo.candidates) == {at for at in expected if prompt.at is None or at in prompt.at}
        for at, candidates in echo.candidates.items():
            token = max(i for i, begin in enumerate(begins[:-1]) if begin == at)
            assert echo.logprobs[token] == pytest.approx(expected[at][0], abs=tolerance)
            assert candidates == pytest.approx(expected[at][1], abs=tolerance)


def prompts_of(rng: np.random.Generator) -> list[Prompt]:
    """Prompts of two neurons that share a beginning, with rests of several lengths; some ask for every token."""
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


FAMILIES_TRIED: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in (*FAMILIES, "gemma2")] + [
    ("mistral", SLIDING)
]


@pytest.mark.parametrize(
    ("family", "changes"), FAMILIES_TRIED, ids=[f"{a}{'-sliding' * bool(b)}" for a, b in FAMILIES_TRIED]
)
def test_every_family_has_the_same_logprobs_with_a_shared_prefix(
    rng: np.random.Generator, family: str, changes: dict[str, Any]
) -> None:
    llm = make_llm(rng, family=family, tokens_at_once=60, **changes)
    assert llm.reader.shares
    prompts = prompts_of(rng)[::3]
    check(llm, prompts, 1e-6 if family == "gemma2" else 1e-9)  # gemma2 normalises in float32
    assert llm.reader.prefixes


def test_prompts_can_have_no_prefix_and_no_wanted_offsets(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    check(
        llm,
        [Prompt(prefix="", rest="the rain\t10\n"), Prompt(prefix="a", rest="b\t1"), Prompt(prefix="", rest="a")],
        1e-9,
    )
    (nothing,) = logprobs_of(llm, [Prompt(prefix=PREFIX, rest="the", at=())])
    assert (nothing.tokens, dict(nothing.candidates)) == (("the",), {})
    assert np.isnan(nothing.logprobs).all()


def test_an_offset_inside_a_token_has_no_candidates(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    (echo,) = logprobs_of(llm, [Prompt(prefix=PREFIX, rest=" the\t10\n", at=(5, 6))])
    assert "10" in echo.tokens
    assert list(echo.candidates) == [5]


def test_common_beginnings_are_computed_once(rng: np.random.Generator) -> None:
    """A call computes each distinct beginning of its prompts once, and later calls reuse the cached ones."""
    llm = make_llm(rng)
    explanations = ["this neuron fires on words for rain\n", "this neuron fires on numbers before a unit\n"]
    excerpts = [f"{i}\tunknown\n the\tunknown\n" * 3 for i in range(8)]
    prompts = [Prompt(prefix=PREFIX + explanation, rest=rest, at=(rest.index("\t") + 1,))
               for explanation in explanations for rest in excerpts]  # fmt: skip
    texts = [llm._tokenizer.tokenize(prompt).row.tokens for prompt in prompts]
    distinct = len({text[: i + 1] for text in texts for i in range(len(text))})
    logprobs_of(llm, prompts)
    assert llm.reader.tokens_computed == distinct < 0.3 * sum(map(len, texts))
    before, beginning = llm.reader.tokens_computed, len(llm._tokenizer.start) + llm.count(PREFIX)
    logprobs_of(llm, prompts[:8])
    assert llm.reader.tokens_computed - before <= sum(len(text) - beginning for text in texts[:8])


def test_a_batch_has_no_more_tokens_than_its_limit(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(rng, tokens_at_once=64)
    widths: list[int] = []
    forward = llm.reader.model.forward

    def record(**options: Any) -> Any:
        widths.append(options["input_ids"].shape[1])
        return forward(**options)

    monkeypatch.setattr(llm.reader.model, "forward", record)
    logprobs_of(llm, [Prompt(prefix=PREFIX, rest=f"{i} the\t10\n", at=(2,)) for i in range(40)])
    prefix, *batches = widths
    assert prefix > 64
    assert 32 <= max(batches) <= 64
    assert sum(batches) < 5 * 40


def test_texts_that_branch_anywhere_have_the_logits_of_whole_texts(rng: np.random.Generator) -> None:
    """Random texts over two tokens: many begin alike, some are the beginning of another, some are equal."""
    llm = make_llm(rng, family="gemma2", sliding_window=4)
    texts = [tuple(rng.integers(2, size=rng.integers(1, 12)).tolist()) for _ in range(30)]
    rows = [TextToRead(tokens=text, shared=0, at=tuple(range(1, len(text)))) for text in texts]
    for text, reading in zip(texts, llm.reader.read(rows, top=3), strict=True):
        with torch.no_grad():
            logprobs = torch.log_softmax(llm.reader.model(input_ids=torch.tensor([text])).logits[0], dim=-1)
        expected = [float(logprobs[i - 1, text[i]]) for i in range(1, len(text))]
        assert reading.logprobs.tolist() == pytest.approx(expected, abs=1e-6)
    assert llm.reader.shares
    assert llm.reader.tokens_computed == len({text[: i + 1] for text in texts for i in range(len(text))})


def test_prompts_of_a_model_without_a_shareable_cache_are_computed_whole(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """CRATE has a different cache; its directory opens like any other and its logprobs are correct."""
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
        return await asyncio.gather(*(llm.chat(messages, how) for messages, how in zip(chats, sampling, strict=True)))

    return asyncio.run(ask())


def chats_of(count: int) -> list[list[Message]]:
    return [[Message("system", PREFIX), Message("user", "the rain\t10\n" * (i + 1))] for i in range(count)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_answers_generated_together_equal_answers_generated_alone(rng: np.random.Generator, family: str) -> None:
    """Compare with the `generate` of transformers, without a cache, one prompt at a time."""
    llm = make_llm(rng, family=family, **SLIDING if family == "mistral" else {})
    replies = chat(llm, chats_of(5), [Sampling(max_tokens=n) for n in (9, 4, 12, 1, 7)])
    # The end-of-text token of the model ends an answer, and so does that of the tokenizer; here they differ.
    ends = sorted({llm.tokenizer.eos_token_id, llm.reader.model.generation_config.eos_token_id} - {None})
    for messages, reply, budget in zip(chats_of(5), replies, (9, 4, 12, 1, 7), strict=True):
        text = llm.tokenizer.apply_chat_template(
            [{"role": m.role, "content": m.text} for m in messages], tokenize=False, add_generation_prompt=True
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


def test_a_sampled_answer_depends_only_on_its_seed(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    drawn = [Sampling(max_tokens=8, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2, 1)]
    together = chat(llm, [*[chats_of(1)[0]] * 3, *chats_of(3)], [*drawn, *[Sampling(max_tokens=5)] * 3])
    alone = chat(llm, chats_of(1), drawn[:1])
    assert together[0].text == together[2].text == alone[0].text
    assert together[0].text != together[1].text


def test_answers_do_not_depend_on_a_shared_cache_or_on_the_generation_settings_of_the_checkpoint(
    rng: np.random.Generator,
) -> None:
    """A repetition penalty of the checkpoint is ignored; without a shareable cache, chats are answered one by one."""
    llm = make_llm(rng)
    how = [Sampling(max_tokens=n, temperature=t, seed=n) for n, t in ((6, 0.0), (9, 1.0), (3, 0.0))]
    shared = chat(llm, chats_of(3), how)
    llm.reader.model.generation_config.repetition_penalty = 50.0
    other = LocalLLM(llm.reader.model, llm.tokenizer, name="small")
    other.reader.shares = False
    assert chat(other, chats_of(3), how) == shared


def test_sampling_follows_temperature_and_top_p(rng: np.random.Generator) -> None:
    from cratelm.shared_prefix.generation import Sampler

    logits = torch.from_numpy(rng.normal(0, 2, 12))
    shares = torch.softmax(logits / 0.7, dim=0)
    draw = Sampler(Sampling(max_tokens=1, temperature=0.7, seed=3))
    counts = np.bincount([draw.next(logits) for _ in range(4000)], minlength=12) / 4000
    assert np.abs(counts - shares.numpy()).max() < 0.05
    best = int(shares.argmax())
    only = Sampler(Sampling(max_tokens=1, temperature=0.7, top_p=float(shares[best]) * 0.99))
    assert {only.next(logits) for _ in range(50)} == {best}


def test_without_system_turns_in_a_template_their_text_goes_before_the_first_turn(rng: np.random.Generator) -> None:
    llm = make_llm(rng)
    turns, each = [Message("system", " Say S. "), Message("user", "U")], "[{{ m['role'] }}] {{ m['content'] | trim }} "
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for template, text in (
        (f"{refuses}{{% for m in messages %}}{each}{{% endfor %}}", "[user] Say S. \n\nU "),
        (f"{{% for m in messages if m['role'] != 'system' %}}{each}{{% endfor %}}", "[user] Say S. \n\nU "),
        (f"{{% for m in messages %}}{each}{{% endfor %}}", "[system] Say S. [user] U "),
    ):
        llm.tokenizer.chat_template = template
        assert llm._templated(turns) == asyncio.run(llm.rendered(turns)) == text
    llm.tokenizer.chat_template = "{{ raise_exception('no chats') }}"
    with pytest.raises(LLMError, match="rejects this chat: no chats"):
        llm._templated(turns)


def test_unsupported_requests_raise_one_line(rng: np.random.Generator, tmp_path: Path) -> None:
    llm = make_llm(rng, chat=False, max_position_embeddings=128)
    with pytest.raises(LLMError, match=r"^small must have a chat template to answer chats, got none"):
        chat(llm, chats_of(1), [Sampling(max_tokens=1)])
    with pytest.raises(
        LLMError, match=r"^a prompt for small must have at most 128 tokens, got \d+\. Hint: use a model"
    ):
        logprobs_of(llm, [Prompt(prefix=PREFIX * 3, rest="a")])
    with pytest.raises(
        CrateError, match=r"nothing must be a causal language model with a tokenizer, got: .*Hint: give a model"
    ):
        LocalLLM.open(tmp_path / "nothing", device="cpu")


def test_an_error_in_a_batch_reaches_every_request_in_it_and_no_other(
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
    assert [type(error) for error in failed] == [ZeroDivisionError] * 3
    assert worked[0].tokens == ("b",)


def test_the_identity_of_a_directory_follows_its_weights(rng: np.random.Generator, tmp_path: Path) -> None:
    llm = make_llm(rng, dtype=torch.float32)
    for name in ("one", "two"):
        save(llm.reader.model, tmp_path / name)
        llm.tokenizer.save_pretrained(tmp_path / name)
    first, second = (LocalLLM.open(tmp_path / name, device="cpu") for name in ("one", "two"))
    assert [name_of(path) for path in ("a/b/", "runs/crate/model", "model", "owner/name")] == [
        "b",
        "crate",
        "model",
        "name",
    ]
    assert (first.name, first.context, first.identity) == ("one", 4096, second.identity)
    with torch.no_grad():
        second.reader.model.lm_head.weight[3, 4] += 1e-3
    del second.identity
    assert first.identity != second.identity


def test_a_cpu_that_multiplies_bfloat16_fast_reads_weights_stored_so_without_converting_them(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in ("bfloat16", "float32"):
        llm = make_llm(rng, dtype=getattr(torch, dtype))
        save(llm.reader.model, tmp_path / dtype)
        llm.tokenizer.save_pretrained(tmp_path / dtype)
    expected = {("bfloat16", True): torch.bfloat16}  # every other pair is read as float32
    for stored, fast in itertools.product(("bfloat16", "float32"), (True, False)):
        monkeypatch.setattr(local_llm, "fast_bfloat16", lambda fast=fast: fast)
        opened = LocalLLM.open(tmp_path / stored, device="cpu")
        assert opened.reader.dtype == expected.get((stored, fast), torch.float32)
    assert LocalLLM.open(tmp_path / "float32", device="cpu", dtype="bfloat16").reader.dtype == torch.bfloat16
