"""Open a simulator for a language model.

    all-at-once       one prompt per excerpt; all activations are read from the prompt logprobs
    next-token        the same prompts, cut before each activation; needs the candidates of the next token
    token-by-token    one prompt per token, read from the prompt logprobs
    structured        one answer per excerpt, as JSON; needs no logprobs

Activations are on the scale of prompts, 0 to 10 (0 to 9 for models that write 10 as two tokens, see `readout.py`).
"""

from typing import get_args

import numpy as np

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.llm import LLM, LLMError, Prompt
from cratelm.interpretation.simulators.all_at_once import UNKNOWN, AllAtOnce
from cratelm.interpretation.simulators.next_token import NextToken, writes_ten_as_a_token
from cratelm.interpretation.simulators.readout import ReadOut
from cratelm.interpretation.simulators.simulation import TextSimulator
from cratelm.interpretation.simulators.structured import Structured
from cratelm.interpretation.simulators.token_by_token import TokenByToken
from cratelm.interpretation.store.identities import SimulationMethod

METHODS: tuple[SimulationMethod, ...] = get_args(SimulationMethod)


async def open_simulator(method: str, llm: LLM, *, mode: Mode = "fixed", answer_tokens: int = 0) -> TextSimulator:
    """Open the simulator of this method; the methods that read logprobs first test how the model tokenizes numbers.

    `answer_tokens` is the smallest limit of a structured answer.
    Raises `LLMError` if the model does not give the log-probabilities that the method needs.
    """
    if method not in METHODS:
        raise CrateError(f"--simulator must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "structured":
        return Structured(llm=llm, mode=mode, answer_tokens=answer_tokens)
    if method == "next-token":
        # The tokens of the prompt are not known; behind a tab, the text is cut between two of them.
        read_out = ReadOut.of(mode, ten_is_one_token=await writes_ten_as_a_token(llm))
        return NextToken(llm=llm, read_out=read_out)
    ten, unknown = await find_notation(llm)
    read_out = ReadOut.of(mode, ten_is_one_token=ten)
    if method == "token-by-token":
        return TokenByToken(llm=llm, read_out=read_out)
    return AllAtOnce(llm=llm, read_out=read_out, unknown=UNKNOWN[0] if mode == "compat" else unknown)


async def find_notation(llm: LLM) -> tuple[bool, str]:
    """Find out whether a model writes 10 as one token, and which placeholder can be read in place of an activation."""
    table = "a\t10\n"
    texts = [table, *(f"a\t{unknown}\n the\t{unknown}\n" for unknown in UNKNOWN)]
    prompts = [Prompt(prefix=table, rest=text, at=_after_tabs(text)) for text in texts]
    ten, *others = await llm.prompt_logprobs(prompts, top=1)
    token_at = dict(zip(np.cumsum([0, *map(len, ten.tokens)]).tolist(), ten.tokens, strict=False))
    readable = [
        unknown
        for unknown, prompt, answer in zip(UNKNOWN, prompts[1:], others, strict=True)
        if set(prompt.at or ()) <= set(answer.candidates)
    ]
    if not readable:
        raise LLMError(
            f"the tokenizer of {llm.name} joins a tab with whatever follows it, so activations cannot be read"
        )
    return token_at.get(2) == "10", readable[0]


def _after_tabs(text: str) -> tuple[int, ...]:
    return tuple(place + 1 for place, letter in enumerate(text) if letter == "\t")
