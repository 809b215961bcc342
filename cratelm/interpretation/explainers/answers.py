"""What an explainer answered, as an explanation: the first sentence without what stands around it. Or no explanation.

An answer that is empty or refuses is a failure with its text, never an explanation.
"""

import re

from cratelm.activations.records import Mode
from cratelm.interpretation.llm import LLMError, Reply
from cratelm.interpretation.prompts.explainer import explanation_prefix
from cratelm.interpretation.reasoning import without_reasoning
from cratelm.runtime import printable

CUT_OFF = " …"
"""Behind an explanation that ended because the answer might not be longer."""
SHOWN = 200
"""Letters of a failed answer that its failure quotes."""

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
"""How an answer begins that gives none. Only at its beginning: elsewhere an explanation may speak of such words."""
_LABEL = re.compile(r"^(answer|explanation)( of( the behaviou?r of)? neuron \d+)?\s*:\s*", re.IGNORECASE)
_OPENING = re.compile(
    r"^((this|the|that) neuron|neuron \d+|it)( seems to| appears to| mainly| mostly| primarily)?"
    r" (fires?|activates?|responds?|reacts?|is (activated|active)) (on|for|to|at|when (it )?(sees?|reads?)|by) ",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<!\bMr)(?<!\bDr)(?<!\bvs)(?<!\bcf)[.!?]['\"”’)*]*(?=\s+[A-Z\"'“(*]|\s*$)")
_AROUND = ' \t\r\n*_`"“”‘’'


def explanation_of(reply: Reply, mode: Mode = "fixed") -> str:
    """The explanation in an answer. Raises `LLMError` with its text where there is none.

    In `compat` mode an answer without its reasoning is taken as it is, as in the released code; an empty one fails.
    """
    text = without_reasoning(reply.text)
    if mode == "compat":
        if not text:
            raise LLMError("empty answer: the model said nothing")
        return text
    if not text:
        said = f"only reasoning: {quoted(reply.text)}" if reply.text.strip() else "the model said nothing"
        raise LLMError(f"empty answer: {said}")
    bare = _bare(text)
    if _REFUSALS.match(text) or _REFUSALS.match(bare):
        raise LLMError(f"refused: {quoted(text)}")
    found, ended = _first_sentence(bare)
    if not re.search(r"\w", found):
        raise LLMError(f"empty answer: {quoted(text)}")
    return found + ("" if ended or reply.finish != "length" else CUT_OFF)


def _bare(said: str) -> str:
    """An answer without a label, a bullet, quotes, and the repeated beginning of the sentence it was to go on with."""
    before = None
    while said != before:
        before = said
        said = re.sub(r"^([-•]|\d+[.)])\s+", "", said.strip(_AROUND))
        said = _LABEL.sub("", said)
        if said.lower().startswith(explanation_prefix()):
            said = said[len(explanation_prefix()) :].lstrip(" :")
        said = _OPENING.sub("", said)
    return said


def _first_sentence(said: str) -> tuple[str, bool]:
    """The first sentence without its full stop, and whether it has an end."""
    line, _, more = said.partition("\n")
    end = _SENTENCE_END.search(line)
    sentence = line[: end.start()] if end else line
    return sentence.strip(_AROUND + ",;"), bool(end or more.strip())


def quoted(text: str) -> str:
    """A failed answer on one line, cut where it is long."""
    flat = printable(" ".join(text.split()))
    return f'"{flat[:SHOWN]}{"…" if len(flat) > SHOWN else ""}"'
