"""The prompt of an explainer that sees what a neuron does, not where it fires: the tokens that it promotes.

After VocabProj of Gur-Arieh et al. (2025), "Enhancing automated interpretability with output-centric feature
descriptions". An explanation is of the form `text before ...`, so that it continues `this neuron fires on`
like every other, and simulators and scorers read it in the same way.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from cratelm.interpretation.llm import Message
from cratelm.interpretation.prompts.explainer import TURN, ExplainerPrompt, PromptTooLong
from cratelm.rundir import read_json

OUTPUTS_FILE = Path(__file__).with_name("output_explainer.json")


@cache
def _words() -> dict[str, str]:
    texts: dict[str, str] = read_json(OUTPUTS_FILE, made_by="pip install --force-reinstall cratelm")["outputs"]
    return texts


def output_prompt(
    tokens: Sequence[str], *, count: Callable[[str], int], context: int | None, max_tokens: int
) -> ExplainerPrompt:  # fmt: skip
    """The chat that asks what promoted tokens have in common. Raises `PromptTooLong` if it does not fit."""
    words = _words()
    listed = ", ".join(f'"{token}"' for token in tokens)
    message = Message("user", "\n\n".join([words["task"].replace("{escapes}", words["escapes"]), listed, words["cue"]]))
    length = count(message.text) + TURN
    if context is not None and length + max_tokens > context:
        raise PromptTooLong(
            f"the explainer's prompt has {length:,} tokens, and with {max_tokens} more for the answer that is too long "
            f"for a context of {context:,}. Use a model with a longer context"
        )
    return ExplainerPrompt(messages=(message,), tokens=length, dropped=0)


def output_explanation(text: str) -> str:
    """The explanation in the form `text before ...`, which a model may leave out."""
    prefix = _words()["prefix"]
    return text if text.lower().startswith(prefix) else prefix + text
