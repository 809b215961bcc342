"""Parse the answer of an explainer: its first sentence, without labels, quotes and reasoning.

An empty answer or a refusal raises `LLMError` with its text; it is never an explanation.
"""

import re

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLMError, Reply
from cratelm.interpretation.prompts.explainer import explanation_prefix
from cratelm.interpretation.reasoning import without_reasoning
from cratelm.runtime import printable

CUT_OFF = " …"
"""Appended to an explanation that was cut off at `max_tokens`."""
_SHOWN = 200
"""Characters of an unusable answer that an error quotes."""

_REFUSALS = re.compile(
    r"(well,? |unfortunately,? |sorry,? (but )?)?"
    r"(sorry\W*$|i('| a)m (very |so |really )?sorry|i apologi[sz]e|as an? (ai|(large )?language model|assistant)\b"
    r"|(i|we)( can(not|['’]?t)| can not| could ?n[o'’]t| won['’]t| will not|(['’]| a)m (not able|unable))\b"
    r"|it( is|['’]s) (impossible|not possible|unclear|not clear|hard|difficult) (to|what|which|why)\b"
    r"|there (is|are) (no|not enough|insufficient|too little) (clear |discernible |obvious )?"
    r"(information|pattern|data|evidence|context)"
    r"|(cannot|can['’]t|could not) (be )?(determined?|explain(ed)?|identif(y|ied)|assist|say)"
    r"|unable to (determine|explain|identify|assist|say)"
    r"|(insufficient|not enough) (information|data|evidence|context)|no (clear|discernible|obvious) pattern)",
    re.IGNORECASE,
)
"""How a refusal begins. Matched only at the beginning: an explanation may be about such words."""
_LABEL = re.compile(r"^(answer|explanation)( of( the behaviou?r of)? neuron \d+)?\s*:\s*", re.IGNORECASE)
_OPENING = re.compile(
    r"^((this|the|that) neuron|neuron \d+|it)( seems to| appears to| mainly| mostly| primarily)?"
    r" (fires?|activates?|responds?|reacts?|is (activated|active)) (on|for|to|at|when (it )?(sees?|reads?)|by) ",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bvs)(?<!\bcf)[.!?]['\"”’)*]*(?=\s+[A-Z\"'“(*]|\s*$)")
_AROUND = ' \t\r\n*_`"“”‘’'


def explanation_of(reply: Reply, mode: Mode = "fixed") -> str:
    """The explanation in an answer. Raises `LLMError` with the text of an unusable answer.

    In `compat` mode an answer without its reasoning is taken as it is, as in the released code; an empty one fails.
    """
    text = without_reasoning(reply.text)
    if mode == "compat":
        if not text:
            raise LLMError("empty answer: the model said nothing")
        return text
    if not text:
        reason = f"only reasoning: {quoted(reply.text)}" if reply.text.strip() else "the model said nothing"
        raise LLMError(f"empty answer: {reason}")
    bare = _bare(text)
    if _REFUSALS.match(text) or _REFUSALS.match(bare):
        raise LLMError(f"refused: {quoted(text)}")
    sentence, ended = _first_sentence(bare)
    if not re.search(r"\w", sentence):
        raise LLMError(f"empty answer: {quoted(text)}")
    return sentence + ("" if ended or reply.finish != "length" else CUT_OFF)


def _bare(answer: str) -> str:
    """The answer without a label, a bullet, quotes, and a repetition of the prompt's `this neuron fires on`."""
    before = None
    while answer != before:
        before = answer
        answer = re.sub(r"^([-•]|\d+[.)])\s+", "", answer.strip(_AROUND))
        answer = _LABEL.sub("", answer)
        if answer.lower().startswith(explanation_prefix()):
            answer = answer[len(explanation_prefix()) :].lstrip(" :")
        answer = _OPENING.sub("", answer)
    return answer


def _first_sentence(answer: str) -> tuple[str, bool]:
    """The first sentence without its full stop, and whether it is complete."""
    line, _, more = answer.partition("\n")
    end = _SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    return sentence.strip(_AROUND + ",;"), bool(end or more.strip())


def quoted(text: str) -> str:
    """An unusable answer on one line, truncated to `SHOWN` characters."""
    flat = printable(" ".join(text.split()))
    return f'"{flat[:_SHOWN]}{"…" if len(flat) > _SHOWN else ""}"'
