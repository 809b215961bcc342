"""The prompt of an explainer, assembled from the texts in `explainer.json` and `few_shot.json`.

    system      the task and the format
    user        Neuron 1, its activations, `Explanation of neuron 1: this neuron fires on`
    assistant   ` words for rain ... .`
    ...         two more few-shot examples
    user        Neuron 4: the neuron to explain

Activations are whole numbers from 0 to 10, scaled by the strongest one that the prompt shows of that neuron
(`normalisation.py`). Where fewer than a fifth of them are above 0, the block is repeated without the zeros.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path

from cratelm.activations.records import Excerpt, Mode
from cratelm.interpretation.llm import LLMError, Message
from cratelm.interpretation.prompts.few_shot import FewShotNeuron, FewShotRecord, few_shot_neurons
from cratelm.interpretation.prompts.normalisation import OWN, Rounding, normalised, shown_maximum
from cratelm.rundir import read_json

SPARSE = 0.2
"""Share of activations above 0 below which a block is repeated without its zeros."""
TURN = 8
"""Most tokens that a chat template adds to a turn: its delimiters and the role's name."""
RELEASED_CONTEXT = 4097
"""Context length of the released procedure, for every model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainerPrompt:
    """A chat that asks for one explanation."""

    messages: tuple[Message, ...]
    tokens: int
    """Number of tokens as the model counts them, with `TURN` for each turn."""
    dropped: int
    """Few-shot excerpts that were left out to fit the context."""


class PromptTooLong(LLMError):
    """A prompt does not fit the model's context even without few-shot examples."""


@cache
def _words() -> dict[str, str]:
    texts = read_json(Path(__file__).with_name("explainer.json"), made_by="pip install --force-reinstall cratelm")
    return {name: "\n\n".join(text) if isinstance(text, list) else text for name, text in texts["explainer"].items()}


def explanation_prefix() -> str:
    """What every explanation continues: `this neuron fires on`."""
    return _words()["prefix"]


def shown(
    excerpts: Sequence[Excerpt], strings: Sequence[str], *, rounding: Rounding = OWN["fixed"]
) -> tuple[FewShotRecord, ...]:  # fmt: skip
    """Excerpts as a prompt shows them: text and whole numbers from 0 to 10 relative to the strongest of them all."""
    maximum = shown_maximum([excerpt.activations for excerpt in excerpts])
    return tuple(
        FewShotRecord(
            tokens=tuple(strings[token] for token in excerpt.tokens.tolist()),
            activations=tuple(normalised(excerpt.activations, maximum, rounding=rounding).tolist()), unknown=0,
        )
        for excerpt in excerpts
    )  # fmt: skip


def explainer_prompt(
    records: Sequence[FewShotRecord], *, count: Callable[[str], int], context: int | None, max_tokens: int,
    mode: Mode = "fixed", left_out: int = 0,
) -> ExplainerPrompt:  # fmt: skip
    """The chat that asks what a neuron with these excerpts fires on.

    Few-shot excerpts are left out one at a time, at least `left_out` of them, until prompt and answer fit the context.
    Raises `PromptTooLong` if they do not fit even without few-shot examples.
    """
    if mode == "compat":
        context = min(context or RELEASED_CONTEXT, RELEASED_CONTEXT)
    fewer = enumerate(_fewer_and_fewer(few_shot_neurons()))
    for dropped, examples in islice(fewer, left_out, None):
        messages = _chat(examples, records, escapes=mode == "fixed")
        if mode == "compat":
            messages = without_system(messages, between=" ")
        tokens = sum(count(message.text) + TURN for message in messages)
        if context is None or tokens + max_tokens <= context:
            return ExplainerPrompt(messages=messages, tokens=tokens, dropped=dropped)
    raise PromptTooLong(
        f"the explainer's prompt has {tokens:,} tokens without any example, and with {max_tokens} more for the answer "
        f"that is too long for a context of {context:,}. Use a model with a longer context, or --protocol anthropic, "
        "whose excerpts are short"
    )


def _fewer_and_fewer(neurons: Sequence[FewShotNeuron]) -> Iterator[tuple[FewShotNeuron, ...]]:
    """The few-shot neurons with all their excerpts, then with one excerpt less each time.

    The longest lists are shortened first; a neuron without excerpts is left out.
    """
    left = list(neurons)
    yield tuple(left)
    while left:
        most = max(len(neuron.records) for neuron in left)
        place = max(i for i, neuron in enumerate(left) if len(neuron.records) == most)
        if most > 1:
            left[place] = replace(left[place], records=left[place].records[:-1])
        else:
            del left[place]
        yield tuple(left)


def _chat(
    examples: Sequence[FewShotNeuron], records: Sequence[FewShotRecord], *, escapes: bool
) -> tuple[Message, ...]:  # fmt: skip
    task = _words()["system"].replace("{escapes}", _words()["escapes"] if escapes else "")
    messages = [Message("system", task)]
    for number, neuron in enumerate(examples, 1):
        messages.append(Message("user", _question(number, neuron.records)))
        messages.append(Message("assistant", f" {neuron.explanation}."))
    return (*messages, Message("user", _question(len(examples) + 1, records)))


def _question(number: int, records: Sequence[FewShotRecord]) -> str:
    words = {name: text.replace("{number}", str(number)) for name, text in _words().items()}
    lines = [words["neuron"], words["activations"], *_blocks(records, zeros=True)]
    values = [value for record in records for value in record.activations]
    if any(values) and sum(value > 0 for value in values) < SPARSE * len(values):
        lines += ["", words["without_zeros"], *_blocks(records, zeros=False)]
    return "\n".join([*lines, "", f"{words['cue']} {words['prefix']}"])


def _blocks(records: Sequence[FewShotRecord], *, zeros: bool) -> Iterator[str]:
    for record in records:
        pairs = zip(record.tokens, record.activations, strict=True)
        lines = [f"{token}\t{activation}" for token, activation in pairs if zeros or activation > 0]
        if lines:
            yield from ("<start>", *lines, "<end>")


def without_system(messages: Sequence[Message], *, between: str = "\n\n") -> tuple[Message, ...]:
    """The chat for a model without a system role: the system text begins the first user turn."""
    if len(messages) < 2 or messages[0].role != "system":
        return tuple(messages)
    system, first, *rest = messages
    return (Message(first.role, f"{system.text}{between}{first.text}"), *rest)
