"""A Hugging Face causal language model in this process as an `LLM`: what `interpretation/` asks, without a server.

Coroutines that ask at the same time are answered together: while one batch is computed, in a thread of its own, the
next gathers. What prompts have in common is computed once (`shared_prefix/reader.py`).
"""

import asyncio
import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import without_system
from cratelm.runtime import DeviceName, console, select_device
from cratelm.shared_prefix.generation import Request, generate
from cratelm.shared_prefix.reader import Reader
from cratelm.shared_prefix.tokens import Tokenizer

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Most tokens of one pass; halved when a GPU's memory is too small for them."""
REQUESTS_AT_ONCE = 512
"""Most requests that are worked on before anybody has an answer."""


class LocalLLM:
    """A causal language model of transformers, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, tokens_at_once: int | None = None) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CrateError(f"the tokenizer of {name} has no tokenizer.json. Save it anew with transformers")
        self.name, self.tokenizer = name, tokenizer
        device = next(model.parameters()).device.type
        self.reader = Reader(model, tokens_at_once=tokens_at_once or TOKENS_AT_ONCE.get(device, 2048))
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._tokens = Tokenizer(tokenizer.backend_tokenizer, bos=tokenizer.bos_token_id)
        self._strings = token_strings(tokenizer.backend_tokenizer)
        self._waiting: list[_Asked] = []
        self._worker: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, source: str | Path, *, device: DeviceName = "auto", dtype: DType = "auto") -> "LocalLLM":
        """Load a model directory (also one of cratelm's) or a name on the hub.

        `auto` takes the type of the stored weights, but float32 on a CPU.
        """
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise CrateError("a model in the process needs transformers. Run: pip install 'cratelm[llm]'") from None
        importlib.import_module("cratelm.huggingface")  # CRATE in transformers
        where = select_device(device)
        kind = getattr(torch, dtype) if dtype != "auto" else torch.float32 if where.type == "cpu" else "auto"
        try:
            with _quiet():
                tokenizer = AutoTokenizer.from_pretrained(str(source))
                model = AutoModelForCausalLM.from_pretrained(str(source), dtype=kind)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CrateError(
                f"{source} is no causal language model with a tokenizer ({reason}). "
                "Give a model directory or a name on the Hugging Face hub"
            ) from None
        llm = cls(model.to(where), tokenizer, name=name_of(str(source)))
        if not llm.reader.shares:
            console.print(f"{llm.name}: its cache cannot be shared, so every prompt is computed whole")
        return llm

    @cached_property
    def identity(self) -> str:
        """What tells its weights from others, whatever the directory is called: 16 hexadecimal digits."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, weight in self.reader.model.state_dict().items():
            sums = [one.double().sum().item() for one in (weight, weight[..., ::2].abs())] if weight.dim() else []
            digest.update(repr((name, tuple(weight.shape), str(weight.dtype), sums)).encode())
        return digest.hexdigest()[:16]

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """What the model expected at each wanted token of each prompt's rest."""
        tokenized = [self._tokens.prompt(prompt) for prompt in prompts]
        for one in tokenized:
            self._check_length(len(one.row.tokens), 0)
        rows = [one.row for one in tokenized if one.row.at]
        readings = iter(await self._ask(f"prompt logprobs, {top} candidates", rows, partial(self.reader.read, top=top)))
        return [one.prompt_logprobs(next(readings) if one.row.at else None, self._strings) for one in tokenized]

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. The schema of an answer cannot be enforced here: whoever asks checks what comes."""
        if self.tokenizer.chat_template is None:
            raise LLMError(f"{self.name} has no chat template, so it cannot be asked. Use an instruction-tuned model")
        text = self._templated(messages)
        tokens = tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        self._check_length(len(tokens), sampling.max_tokens)
        request = Request(tokens=tokens, sampling=sampling, ends=self._ends)
        (answer,) = await self._ask("chat", [request], partial(generate, self.reader))
        return Reply(
            text=self.tokenizer.decode(answer.tokens, skip_special_tokens=True), finish=answer.finish,
            prompt_tokens=len(tokens), new_tokens=len(answer.tokens),
        )  # fmt: skip

    def _templated(self, messages: Sequence[Message]) -> str:
        """The chat as the model was trained to read it; where it knows no system turn, that goes before the first.

        Some templates raise where there is one, others leave it out without a word.
        """
        merged = without_system(messages)
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like
            if len(merged) == len(messages):
                raise LLMError(f"the chat template of {self.name} refuses this chat ({error})") from None
            return self._templated(merged)
        left_out = len(merged) < len(messages) and messages[0].text.strip() not in text
        return self._templated(merged) if left_out else text

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = self.reader.model.generation_config.eos_token_id
        several = configured if isinstance(configured, list) else [configured]
        return frozenset(one for one in (*several, self.tokenizer.eos_token_id) if one is not None)

    def _check_length(self, prompt: int, answer: int) -> None:
        if self.context is not None and prompt + answer > self.context:
            raise LLMError(
                f"{self.name} reads at most {self.context} tokens, and this prompt has {prompt}"
                f"{f' before an answer of {answer}' if answer else ''}. Use a model with a longer context"
            )

    async def _ask(self, kind: str, requests: Sequence[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers to requests, worked on together with those of the same kind that others make meanwhile."""
        if not requests:
            return []
        asked = _Asked(kind, list(requests), work, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if self._worker is None or self._worker.done():
            self._waiting = [asked]  # of a loop that was left before its end nobody waits any more
            self._worker = asyncio.create_task(self._work())
        return await asked.answer

    async def _work(self) -> None:
        """Work off what is waiting, all of a kind in one go; in a thread, so that others can queue up meanwhile."""
        await asyncio.sleep(0.001)  # whoever is about to ask, asks
        while self._waiting:
            if not (together := self._next()):
                break
            try:
                answers = await asyncio.to_thread(
                    together[0].work, [one for asked in together for one in asked.requests]
                )
            except torch.cuda.OutOfMemoryError:
                _refuse(together, LLMError(
                    f"the GPU's memory is too small for {self.name} and one of these prompts. "
                    "Use a smaller model, or a server"
                ))  # fmt: skip
            except Exception as error:
                _refuse(together, error)
            else:
                for asked in together:
                    own, answers = answers[: len(asked.requests)], answers[len(asked.requests) :]
                    if not asked.answer.done():
                        asked.answer.set_result(own)

    def _next(self) -> list["_Asked"]:
        """Take those that go together with who waits longest."""
        together, size = list[_Asked](), 0
        for one in list(self._waiting):
            if one.answer.done():  # cancelled
                self._waiting.remove(one)
            elif not together or (one.kind == together[0].kind and size + len(one.requests) <= REQUESTS_AT_ONCE):
                self._waiting.remove(one)
                together.append(one)
                size += len(one.requests)
        return together


def name_of(source: str) -> str:
    """What a model is called: the last part of its path or hub name; of a run's `model`, the run's name."""
    parts = [part for part in source.split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers on the terminal inside the block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What one coroutine asked and waits for."""

    kind: str
    requests: list[Any]
    work: Callable[[list[Any]], list[Any]]
    answer: "asyncio.Future[list[Any]]"


def _refuse(together: Sequence[_Asked], error: Exception) -> None:
    for asked in together:
        if not asked.answer.done():
            asked.answer.set_exception(error)
