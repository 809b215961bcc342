"""A Hugging Face causal language model in this process as an `LLM`, without a server.

Coroutines that ask at the same time are answered together: while one batch is computed in a thread, the next batch
collects requests. What prompts have in common is computed once (`shared_prefix/reader.py`).
"""

import asyncio
import contextlib
import hashlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from cratelm.data.tokenizer import token_strings
from cratelm.errors import CrateError
from cratelm.gguf_files import is_gguf, model_directory, model_name, quantization
from cratelm.interpretation.llm import InProcess, LLMError, Message, Prompt, PromptLogprobs, Reply, Sampling
from cratelm.interpretation.prompts.explainer import without_system
from cratelm.runtime import DeviceName, console, select_device
from cratelm.shared_prefix.generation import CompletionRequest, complete
from cratelm.shared_prefix.reader import PrefixReader
from cratelm.shared_prefix.tokens import PromptTokenizer

DType = Literal["auto", "float32", "bfloat16", "float16", "float64"]
TOKENS_AT_ONCE = {"cpu": 544, "cuda": 2048, "mps": 2048}
"""Tokens of one forward pass, each of which attends to all others; halved if a GPU runs out of memory."""
REQUESTS_AT_ONCE = 512
"""Requests that are computed before the first of them is answered."""


class LocalLLM(InProcess):
    """A causal language model of transformers, with its tokenizer."""

    def __init__(self, model: Any, tokenizer: Any, *, name: str, tokens_at_once: int | None = None) -> None:
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise CrateError(
                f"the tokenizer of {name} must have a tokenizer.json, got none. Hint: save it again with transformers"
            )
        # The other settings of a checkpoint, such as a repetition penalty, would change the probabilities of an answer.
        model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
        self.name, self.tokenizer = name, tokenizer
        device = next(model.parameters()).device.type
        self.reader = PrefixReader(model, tokens_at_once=tokens_at_once or TOKENS_AT_ONCE.get(device, 544))
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.quantization: str | None = None
        """Quantisation of the GGUF file that the model comes from."""
        self._tokenizer = PromptTokenizer(tokenizer.backend_tokenizer, bos=tokenizer.bos_token_id)
        self._strings = token_strings(tokenizer.backend_tokenizer)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()
        self._batches: dict[str, _Batch] = {}
        """Kind of request -> the batch that still takes requests."""

    @classmethod
    def open(cls, source: str | Path, *, device: DeviceName = "auto", dtype: DType = "auto") -> "LocalLLM":
        """Load a model directory (a run's `model` too), a GGUF file, or a name on the hub.

        The dtype `auto` is that of the stored weights; on a CPU it is float32, unless the weights are stored as
        bfloat16 and the CPU has instructions for its matrix products (`fast_bfloat16`).
        """
        try:
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        except ImportError:
            raise CrateError(
                "a language model in this process needs transformers. Hint: pip install 'cratelm[llm]'"
            ) from None
        importlib.import_module("cratelm.huggingface")  # registers CRATE
        where, name = select_device(device), name_of(str(source))
        source = model_directory(Path(source)) if is_gguf(source) else source
        kind = "auto" if dtype == "auto" else getattr(torch, dtype)
        try:
            with _quiet():
                if kind == "auto" and where.type == "cpu":
                    stored = getattr(AutoConfig.from_pretrained(str(source)).get_text_config(), "dtype", None)
                    kind = torch.bfloat16 if stored == torch.bfloat16 and fast_bfloat16() else torch.float32
                tokenizer = AutoTokenizer.from_pretrained(str(source))
                model = AutoModelForCausalLM.from_pretrained(str(source), dtype=kind)
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:160]
            raise CrateError(
                f"{source} must be a causal language model with a tokenizer, got: {reason}. "
                "Hint: give a model directory or a name on the Hugging Face hub"
            ) from None
        llm = cls(model.to(where), tokenizer, name=name)
        llm.quantization = quantization(Path(source))
        if not llm.reader.shares:
            console.print(
                f"{llm.name} does not support sharing a cache between prompts; every prompt is computed whole (slower)"
            )
        return llm

    @cached_property
    def identity(self) -> str:
        """Hash of tokenizer and weights, independent of the directory's name: 16 hexadecimal digits.

        A model from a GGUF file has its quantisation behind the hash.
        """
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        for name, weight in self.reader.model.state_dict().items():
            parts = (weight, weight[..., ::2].abs()) if weight.dim() else ()
            sums = [part.double().sum().item() for part in parts]
            digest.update(repr((name, tuple(weight.shape), str(weight.dtype), sums)).encode())
        return digest.hexdigest()[:16] + (f" {self.quantization}" if self.quantization else "")

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False))

    async def prompt_logprobs(self, prompts: Sequence[Prompt], *, top: int = 15) -> Sequence[PromptLogprobs]:
        """The model's predictions at each wanted token of each prompt's rest."""
        tokenized = [self._tokenizer.tokenize(prompt) for prompt in prompts]
        for tokens in tokenized:
            self._check_length(len(tokens.row.tokens), 0)
        rows = [tokens.row for tokens in tokenized if tokens.row.at]
        readings = iter(await self._ask(f"prompt logprobs, {top} candidates", rows, partial(self.reader.read, top=top)))
        return [
            tokens.prompt_logprobs(next(readings) if tokens.row.at else None, self._strings) for tokens in tokenized
        ]

    async def chat(self, messages: Sequence[Message], sampling: Sampling) -> Reply:
        """Answer a chat. The schema of an answer is not enforced; the caller checks the answer."""
        if self.tokenizer.chat_template is None:
            raise LLMError(
                f"{self.name} must have a chat template to answer chats, got none. Hint: use an instruction-tuned model"
            )
        text = self._templated(messages)
        tokens = tuple(self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        self._check_length(len(tokens), sampling.max_tokens)
        request = CompletionRequest(tokens=tokens, sampling=sampling, ends=self._ends)
        (answer,) = await self._ask("chat", [request], partial(complete, self.reader))
        return Reply(
            text=self.tokenizer.decode(answer.tokens, skip_special_tokens=True), finish=answer.finish,
            prompt_tokens=len(tokens), new_tokens=len(answer.tokens),
        )  # fmt: skip

    async def rendered(self, messages: Sequence[Message]) -> str | None:
        """The chat in the model's template; None without a template."""
        return None if self.tokenizer.chat_template is None else self._templated(messages)

    def _templated(self, messages: Sequence[Message]) -> str:
        """The chat in the model's template. Without support for system turns, their text goes before the first turn.

        Some of these templates raise at a system turn, others drop it silently.
        """
        merged = without_system(messages)
        turns = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise exceptions of any kind
            if len(merged) == len(messages):
                raise LLMError(f"the chat template of {self.name} rejects this chat: {error}") from None
            return self._templated(merged)
        dropped = len(merged) < len(messages) and messages[0].text.strip() not in text
        return self._templated(merged) if dropped else text

    @cached_property
    def _ends(self) -> frozenset[int]:
        """Tokens that end an answer."""
        configured = self.reader.model.generation_config.eos_token_id
        tokens = [*(configured if isinstance(configured, list) else [configured]), self.tokenizer.eos_token_id]
        return frozenset(token for token in tokens if token is not None)

    def _check_length(self, prompt: int, answer: int) -> None:
        if self.context is not None and prompt + answer > self.context:
            raise LLMError(
                f"a prompt for {self.name} must have at most {self.context} tokens, got {prompt}"
                f"{f' and an answer of {answer}' if answer else ''}. Hint: use a model with a longer context"
            )

    async def _ask(self, kind: str, requests: list[Any], work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Answers to requests, computed together with those of the same kind that other coroutines made meanwhile."""
        if not requests:
            return []
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lock, self._batches = loop, asyncio.Lock(), {}
        batch = self._batches.get(kind)
        if batch is None or len(batch.requests) + len(requests) > REQUESTS_AT_ONCE:
            batch = self._batches[kind] = _Batch()
            batch.task = loop.create_task(self._compute(kind, batch, work))
        first = len(batch.requests)
        batch.requests += requests
        assert batch.task is not None
        answers = await asyncio.shield(batch.task)  # other coroutines wait for the same batch
        return answers[first : first + len(requests)]

    async def _compute(self, kind: str, batch: "_Batch", work: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Compute a batch in a thread once no other is being computed; until then requests can join it."""
        async with self._lock:
            await asyncio.sleep(0.001)  # coroutines that are about to ask can join
            if self._batches.get(kind) is batch:
                del self._batches[kind]
            try:
                return await asyncio.to_thread(work, batch.requests)
            except torch.cuda.OutOfMemoryError:
                raise LLMError(
                    f"{self.name} and one of these prompts do not fit into the GPU's memory. "
                    "Use a smaller model, or a server"
                ) from None


@dataclass(kw_only=True, slots=True, eq=False)
class _Batch:
    """Requests that are computed together."""

    requests: list[Any] = field(default_factory=list)
    task: "asyncio.Task[list[Any]] | None" = None


def fast_bfloat16() -> bool:
    """Whether the CPU has instructions for matrix products of bfloat16: AMX on x86, SVE or SME on ARM.

    Without them bfloat16 is slower than float32.
    """
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(known.get(name, False) for name in ("amx_bf16", "sve_bf16"))


def name_of(source: str) -> str:
    """The name of a model: the last part of its path or hub name; for a run's `model`, the name of the run.

    A GGUF file is named without `.gguf`.
    """
    parts = [part for part in source.split("/") if part]
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else model_name(parts[-1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of transformers inside the block."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
