"""The tables of `interpretation.sqlite`, and the key of a set.

A *set* is the result of one stage for one layer by one protocol, with one explainer and one simulator.
"""

import contextlib
import sqlite3
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.errors import CrateError
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.store.identities import (
    JudgeName,
    SimulatorName,
    parse_explainer,
    parse_simulator,
)

REMAKE = "Hint: move interpretation.sqlite away and run: cratelm interpret RUN"
"""What to do about a damaged store."""

Stage = str
"""`explain`, `simulate`, `score`, `firing`, or the name of a scorer (`scorers/registry.py`)."""


class _Tables(dict[Stage, str]):
    def __missing__(self, stage: Stage) -> str:
        return "answers"  # of every scorer in the registry


MADE: Mapping[Stage, str] = _Tables(
    explain="explanations", simulate="simulations", score="scores", firing="firing"
)  # fmt: skip
"""Stage -> its table; all scorers of the registry share one."""

KEY_COLUMNS = "mode, tap, layer, protocol, explainer, simulator, control, sample"
"""The columns of a set's key: the fields of `SetKey`, in their order."""
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"""CREATE TABLE sets (
        id INTEGER PRIMARY KEY, mode TEXT NOT NULL, tap TEXT NOT NULL, layer INTEGER NOT NULL, protocol TEXT NOT NULL,
        explainer TEXT NOT NULL, simulator TEXT NOT NULL, control TEXT NOT NULL, sample INTEGER NOT NULL,
        UNIQUE ({KEY_COLUMNS}))""",
    # Written last: marks the set as whole, with the identity of its records.
    """CREATE TABLE stages (
        set_id INTEGER NOT NULL, stage TEXT NOT NULL, records TEXT NOT NULL, origin TEXT NOT NULL,
        PRIMARY KEY (set_id, stage))""",
    """CREATE TABLE explanations (
        id INTEGER PRIMARY KEY, set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, text TEXT NOT NULL,
        tokens BLOB, means BLOB, UNIQUE (set_id, neuron))""",
    # `source`: the neuron whose explanation was simulated; another neuron in a control.
    """CREATE TABLE simulations (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, source INTEGER NOT NULL, activations BLOB NOT NULL,
        PRIMARY KEY (set_id, neuron))""",
    """CREATE TABLE scores (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, correlation REAL, reason TEXT NOT NULL, r_squared REAL,
        absolute_deviation REAL, spearman REAL, auroc REAL, tokens INTEGER NOT NULL, excerpts INTEGER NOT NULL,
        sums BLOB NOT NULL,
        PRIMARY KEY (set_id, neuron))""",
    """CREATE TABLE failures (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, stage TEXT NOT NULL, message TEXT NOT NULL,
        PRIMARY KEY (set_id, neuron, stage))""",
    # Consistency and distinctiveness, for each kind of excerpts (`firing/measures.py`).
    FIRING := """CREATE TABLE IF NOT EXISTS firing (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, excerpts TEXT NOT NULL, consistency REAL, strength REAL,
        distinctiveness REAL, distinctiveness_mass REAL, firing REAL, relevant REAL, tokens INTEGER NOT NULL,
        PRIMARY KEY (set_id, neuron, excerpts)) WITHOUT ROWID""",
    # Results of the scorers of the registry (`Judged.row`), as JSON.
    ANSWERS := """CREATE TABLE IF NOT EXISTS answers (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, scorer TEXT NOT NULL, detail TEXT NOT NULL,
        PRIMARY KEY (set_id, neuron, scorer))""",
    # Records, settings and all neurons of a set, written before its first row.
    BEGUN := """CREATE TABLE IF NOT EXISTS begun (
        set_id INTEGER NOT NULL, stage TEXT NOT NULL, records TEXT NOT NULL, settings TEXT NOT NULL,
        neurons BLOB NOT NULL, PRIMARY KEY (set_id, stage))""",
    # The chosen neurons of a set, unexplainable ones included; no row if all neurons were chosen.
    CHOSEN := """CREATE TABLE IF NOT EXISTS chosen (set_id INTEGER PRIMARY KEY, neurons BLOB NOT NULL)""",
    # Every answer of a language model, by a hash of the model and of the call. Never contains an API key.
    CALLS := """CREATE TABLE IF NOT EXISTS calls (
        hash TEXT PRIMARY KEY, model TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, new_tokens INTEGER NOT NULL,
        date TEXT NOT NULL, reply BLOB NOT NULL)""",
    # The index holds no second copy of the text; the triggers keep it in step with the table.
    "CREATE VIRTUAL TABLE explanation_search USING fts5 (text, content='explanations', content_rowid='id')",
    """CREATE TRIGGER explanation_added AFTER INSERT ON explanations BEGIN
        INSERT INTO explanation_search (rowid, text) VALUES (new.id, new.text); END""",
    """CREATE TRIGGER explanation_removed AFTER DELETE ON explanations BEGIN
        INSERT INTO explanation_search (explanation_search, rowid, text) VALUES ('delete', old.id, old.text); END""",
)


def upgrade(connection: sqlite3.Connection) -> None:
    """Add missing tables and columns to a store of an earlier version; its scores are recomputed from simulations."""
    if not _lacking(connection):
        return
    connection.execute("BEGIN IMMEDIATE")
    lacking = _lacking(connection)  # another process may have upgraded it meanwhile
    for name in lacking & {"spearman", "auroc"}:
        connection.execute(f"ALTER TABLE scores ADD COLUMN {name} REAL")
        connection.execute("DELETE FROM stages WHERE stage = 'score'")
    for statement in (FIRING, ANSWERS, BEGUN, CHOSEN, CALLS):
        connection.execute(statement)


def _lacking(connection: sqlite3.Connection) -> set[str]:
    columns = {row[1] for row in connection.execute("PRAGMA table_info(scores)")}
    tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    return {"spearman", "auroc", "firing", "answers", "begun", "chosen", "calls"} - columns - tables


@dataclass(frozen=True, kw_only=True, slots=True)
class SetKey:
    """Key of a set. The fields have the order of the columns of the table `sets`."""

    mode: Mode = "fixed"
    tap: str = "neurons"
    layer: int
    protocol: str
    explainer: str = EXPLAINER
    """Who explains: `lookup`, or the name of a language model."""
    simulator: str = ""
    """Who simulates: empty for lookup, or the method and the name of a language model."""
    control: str = ""
    """Empty, or the control: `shuffled` or `constant`."""
    sample: int = 0
    """Number of the explanation if each neuron has several (`--samples`)."""

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> "SetKey":
        """The set of a row of the table `sets`."""
        fields = dict(zip(cls.__slots__, row, strict=True))
        if not all(isinstance(value, int if name in ("layer", "sample") else str) for name, value in fields.items()):
            raise CrateError(f"a set of the store must have texts and whole numbers, got {row}. {REMAKE}")
        return cls(**fields)

    @property
    def explained(self) -> "SetKey":
        """The set of explanations that this set is made from."""
        return replace(self, control="", simulator="")

    @property
    def simulated_by(self) -> SimulatorName | JudgeName | None:
        """Which model simulated or judged; None for simulation by lookup."""
        return parse_simulator(self.simulator)

    @property
    def by_lookup(self) -> bool:
        """Whether the set involves no language model, so that it depends on the records alone."""
        return (self.explainer, self.simulator) == (EXPLAINER, "")

    @property
    def judge(self) -> str:
        """Name of the model that judged; empty for a set of simulations."""
        judge = self.simulated_by
        return judge.model if isinstance(judge, JudgeName) else ""

    @property
    def of_tap(self) -> str:
        """For messages, after the layer: the tap, unless it is the model's own neurons."""
        return "" if self.tap == "neurons" else f" of {self.tap}"

    @property
    def what(self) -> str:
        """For messages: which set this is."""
        return f"{self.control} {self.protocol}".strip()

    def command(self, verb: str, run: Path) -> str:
        """The command that makes this set."""
        options = f" --protocol {self.protocol}" + (" --mode compat" if self.mode == "compat" else "")
        options += f" --tap {self.tap}" if self.tap != "neurons" else ""
        options += asking(self.explainer) if self.explainer != EXPLAINER else ""
        return f"cratelm {verb} {run}{options}" + (f" --controls {self.control}" if self.control else "")


def asking(explainer: str) -> str:
    """The command-line options that select an explainer of this name."""
    name = parse_explainer(explainer)
    rounding = {"ceil": " --rounding up", "floor": " --rounding down", None: ""}[name.rounding]
    prompt = "" if name.prompt == "table" else f" --explainer-prompt {name.prompt}"
    outputs = " --explain-from outputs" if name.source == "outputs" else ""
    negatives = " --hard-negatives" if name.hard_negatives else ""
    best = f" --best-of {name.best_of} --best-by {name.best_by}" if name.best_of > 1 else ""
    return f" --llm URL --model {name.model}{prompt}{rounding}{outputs}{negatives}{best}"


@contextlib.contextmanager
def reading_rows() -> Iterator[None]:
    """Convert the errors of rows that have other types than cratelm writes to a `CrateError`."""
    try:
        yield
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CrateError(f"the store has a malformed row ({' '.join(str(error).split())[:80]}). {REMAKE}") from error


def packed(values: np.ndarray, dtype: str) -> bytes:
    """An array as a compressed blob. The fastest level: simulations are mostly 0, which any level makes small."""
    return zlib.compress(np.ascontiguousarray(values, dtype=dtype).tobytes(), 1)


def unpacked(blob: bytes | None, dtype: str) -> np.ndarray:
    """The array of a blob; empty for NULL, as for an explanation without a table."""
    try:
        return np.frombuffer(zlib.decompress(blob) if blob is not None else b"", dtype=dtype)
    except (zlib.error, ValueError, TypeError) as error:
        raise CrateError(f"the store has damaged arrays ({error}). {REMAKE}") from None
