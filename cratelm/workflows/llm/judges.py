"""The other scorers in the interpreting commands: their models, and the tables of their results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cratelm.errors import CrateError
from cratelm.interpretation.explainers.best_of import BestOf
from cratelm.interpretation.llm import LLM
from cratelm.interpretation.scorers.classification import Questions
from cratelm.interpretation.scorers.registry import SCORERS, SIMULATION, ScorerAggregate, check_llm
from cratelm.interpretation.stages.judge import JudgeContext, aggregate_judged, judged_key, judged_sets
from cratelm.interpretation.store.database import Store
from cratelm.interpretation.store.schema import SetKey
from cratelm.workflows.llm.request import InterpretRequest
from cratelm.workflows.score_table import interval_text, line_of, set_parts, set_words, warning_of_few

FEW = ("too few excerpts",)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """The requested scorers and their models."""

    scorers: tuple[str, ...]
    context: JudgeContext
    """For scorers that need a chat or an encoder."""
    reader: LLM | None
    """For scorers that need prompt logprobs."""

    def context_for(self, scorer: str) -> JudgeContext:
        """The context of one scorer."""
        return replace(self.context, llm=self.reader) if SCORERS[scorer].needs == "prompt-logprobs" else self.context

    def sets(self, explained: Sequence[SetKey], controls: Sequence[str]) -> Iterator[tuple[str, SetKey]]:
        """Every scorer with every set of its results; a scorer that tests no explanations has one set per layer."""
        for scorer in self.scorers:
            name = self.context_for(scorer).name_for(scorer)
            keys = [
                judged_key(replace(key, control=control), scorer, name)
                for key in explained
                for control in ("", *controls)
            ]
            yield from ((scorer, key) for key in dict.fromkeys(keys))


async def find_judges(
    request: InterpretRequest, chat: LLM | None, reader: LLM | None, pieces: Callable[[], Sequence[bytes]]
) -> Judges | None:  # fmt: skip
    """Open the models that the scorers need; None without other scorers. Raises `CrateError` if one is missing."""
    asked = tuple(name for name in request.scorers if name != SIMULATION)
    if not asked:
        return None
    needs = {SCORERS[name].needs: name for name in asked}
    for need, name in needs.items():
        if need != "encoder" and chat is None:
            raise CrateError(f"the scorer {name} asks a language model. Give --llm URL of a server, or a directory")
    if "prompt-logprobs" in needs and reader is not None:
        reading = [name for name in asked if SCORERS[name].needs == "prompt-logprobs"]
        skip = request.explaining.skip_self_test or request.spending.dry_run
        await check_llm(reading, reader, Questions(), skip_self_test=skip)
    opened: Any = None
    if "encoder" in needs:
        from cratelm.encoder import DEFAULT, SentenceEncoder

        opened = SentenceEncoder.open(request.encoder or DEFAULT)
    answer_tokens = request.explaining.max_answer_tokens
    questions = Questions(answer_tokens=answer_tokens) if answer_tokens else Questions()
    context = JudgeContext(pieces=pieces(), questions=questions, llm=chat, encoder=opened)
    return Judges(scorers=asked, context=context, reader=reader)


async def find_best_of(
    request: InterpretRequest, chat: LLM, reader: LLM, pieces: Callable[[], Sequence[bytes]]
) -> BestOf | None:  # fmt: skip
    """The scorer that chooses among explanations, or None. Raises `CrateError` if the model lacks what it needs."""
    settings, answer_tokens = request.settings, request.explaining.max_answer_tokens
    if settings.best_of == 1:
        return None
    questions = Questions(answer_tokens=answer_tokens) if answer_tokens else Questions()
    llm = reader if SCORERS[settings.best_by].needs == "prompt-logprobs" else chat
    skip = request.explaining.skip_self_test or request.spending.dry_run
    await check_llm([settings.best_by], llm, questions, skip_self_test=skip)
    context = JudgeContext(pieces=pieces(), questions=questions, llm=llm)
    return BestOf(scorer=settings.best_by, context=context)


def print_judged(run: Path, wanted: Sequence[tuple[str, SetKey]]) -> None:
    """Print a table for each scorer and kind of set."""
    store = Store.open(run)
    stored = {(scorer, key) for key, scorer in judged_sets(store)}
    kinds: dict[tuple[str, SetKey], list[SetKey]] = {}
    for scorer, key in wanted:
        if (scorer, key) in stored:
            kinds.setdefault((scorer, replace(key, layer=0, protocol="")), []).append(key)
    for (scorer, kind), keys in kinds.items():
        aggregates = [aggregate_judged(store, key, scorer) for key in keys]
        words = [
            f"{run.name}: {scorer} ({SCORERS[scorer].number.replace('_', ' ')}, chance {aggregates[0].chance:.0f} %"
        ]
        print("\n" + "\n".join(set_words([*words, f"asked: {kind.judge}", *set_parts(kind)])))
        print("\n".join(_table(keys, aggregates)))


def _table(keys: Sequence[SetKey], aggregates: Sequence[ScorerAggregate]) -> list[str]:
    lines = [line_of("protocol", "layer", "%", "95 % interval", "judged", "few", "fail", "answers", "unread")]
    before = ""
    for key, aggregate in sorted(
        zip(keys, aggregates, strict=True), key=lambda pair: (pair[0].protocol, pair[0].layer)
    ):
        few = sum(aggregate.undefined.get(reason, 0) for reason in FEW)
        failed = sum(aggregate.undefined.values()) - few
        cells = (
            str(key.layer), "-" if aggregate.mean is None else f"{aggregate.mean:.1f}",
            interval_text(aggregate.interval), f"{aggregate.judged}/{aggregate.total}", str(few),
            str(failed), f"{aggregate.items:,}", f"{aggregate.failed:,}",
        )  # fmt: skip
        name = key.protocol or "(none)"
        lines.append(line_of("" if name == before else name, *cells))
        before = name
    return [*lines, *warning_of_few(aggregate.judged for aggregate in aggregates)]
