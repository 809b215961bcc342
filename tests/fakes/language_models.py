"""Small language models for the tests of `interpretation/`: tokenizers of three kinds, models of random weights."""

import functools
import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
from fixtures.hugging_face import build
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from cratelm.interpretation.prompts.few_shot import few_shot_neurons

Kind = Literal["ten", "digits", "pieces"]
KINDS: tuple[Kind, ...] = ("ten", "digits", "pieces")
"""`ten` writes 10 as one token, `digits` as two, `pieces` marks spaces as SentencePiece does and splits digits."""
NUMBERS = "\n".join(f"{word}\t{value}\nunknown\t{value}" for word in ("a", "the") for value in range(11))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@functools.cache
def make_tokenizer(kind: Kind) -> Tokenizer:
    """A tokenizer trained on the words of prompts."""
    text = [NUMBERS] * 20 + ["".join(record.tokens) for neuron in few_shot_neurons() for record in neuron.records]
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "pieces", unk_token=None))
    specials = ["<s>", "</s>"]
    if kind == "pieces":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.Split(Regex(r"[\t\n]"), "isolated"),
        ])  # fmt: skip
        tokenizer.decoder = decoders.Sequence([
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
        ])  # fmt: skip
        alphabet: list[str] = []
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "digits":
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
                pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False),
            ])  # fmt: skip
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=specials, initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    return _with_bytes(tokenizer) if kind == "pieces" else tokenizer


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """Add a token for each missing byte, for characters outside the vocabulary."""
    layout = json.loads(tokenizer.to_str())
    vocabulary = layout["model"]["vocab"]
    missing = [byte for byte in range(256) if byte > 127 or chr(byte) not in vocabulary]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + place for place, byte in enumerate(missing)}
    return Tokenizer.from_str(json.dumps(layout))


def make_fast_tokenizer(kind: Kind, *, chat: bool = True) -> Any:
    """The same tokenizer as a transformers object."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra hf)")
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE if chat else None
    return fast


def make_llm(
    rng: np.random.Generator, *, family: str = "llama", kind: Kind = "ten", dtype: torch.dtype = torch.float64,
    chat: bool = True, tokens_at_once: int | None = None, **changes: Any,
) -> Any:  # fmt: skip
    """A `LocalLLM` of random weights."""
    tokenizer = make_fast_tokenizer(kind, chat=chat)
    positions = {"n_positions": 4096} if family == "gpt2" else {"max_position_embeddings": 4096}
    model = build(family, rng, vocab=len(tokenizer), **positions | changes).to(dtype)
    from cratelm.local_llm import LocalLLM

    return LocalLLM(model, tokenizer, name="small", tokens_at_once=tokens_at_once)
