"""The tables of `interpretation.sqlite`, and what tells one set in them from another.

A *set* is what one stage makes of one layer by one protocol, with one explainer and one simulator.
"""

import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cratelm.activations.records import Mode
from cratelm.interpretation.lookup.tables import EXPLAINER
from cratelm.interpretation.store.identities import (
    JudgeName,
    SimulatorName,
    parse_explainer,
    parse_simulator,
)

Stage = str
"""`explain`, `simulate`, `score`, `firing`, or the name of a scorer (`scorers/registry.py`)."""


class _Tables(dict[Stage, str]):
    def __missing__(self, stage: Stage) -> str:
        return "answers"  # of every scorer in the registry


MADE: Mapping[Stage, str] = _Tables(
    explain="explanations", simulate="simulations", score="scores", firing="firing"
)  # fmt: skip
"""Stage -> the table it fills; all scorers of the registry share one."""

KEY_COLUMNS = "mode, tap, layer, protocol, explainer, simulator, control, sample"
"""The columns that tell sets apart: the fields of `SetKey`, in their order."""
SCHEMA = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"""CREATE TABLE sets (
        id INTEGER PRIMARY KEY, mode TEXT NOT NULL, tap TEXT NOT NULL, layer INTEGER NOT NULL, protocol TEXT NOT NULL,
        explainer TEXT NOT NULL, simulator TEXT NOT NULL, control TEXT NOT NULL, sample INTEGER NOT NULL,
        UNIQUE ({KEY_COLUMNS}))""",
    # A stage's row is written last: it says that the set's rows are whole, and of which records they are.
    """CREATE TABLE stages (
        set_id INTEGER NOT NULL, stage TEXT NOT NULL, records TEXT NOT NULL, origin TEXT NOT NULL,
        PRIMARY KEY (set_id, stage))""",
    """CREATE TABLE explanations (
        id INTEGER PRIMARY KEY, set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, text TEXT NOT NULL,
        tokens BLOB, means BLOB, UNIQUE (set_id, neuron))""",
    # A control has no explanations of its own: `source` says whose explanation was simulated.
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
    # How a neuron fires on what its simulation predicts, on each kind of excerpts apart (`firing.py`).
    FIRING := """CREATE TABLE IF NOT EXISTS firing (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, excerpts TEXT NOT NULL, consistency REAL, strength REAL,
        distinctiveness REAL, distinctiveness_mass REAL, firing REAL, relevant REAL, tokens INTEGER NOT NULL,
        PRIMARY KEY (set_id, neuron, excerpts)) WITHOUT ROWID""",
    # What a language model made of a neuron for the scorers that read its answers, as JSON.
    ANSWERS := """CREATE TABLE IF NOT EXISTS answers (
        set_id INTEGER NOT NULL, neuron INTEGER NOT NULL, scorer TEXT NOT NULL, detail TEXT NOT NULL,
        PRIMARY KEY (set_id, neuron, scorer))""",
    # A set that grows neuron by neuron: which records and settings its rows are of, and which neurons it is to hold.
    BEGUN := """CREATE TABLE IF NOT EXISTS begun (
        set_id INTEGER NOT NULL, stage TEXT NOT NULL, records TEXT NOT NULL, settings TEXT NOT NULL,
        neurons BLOB NOT NULL, PRIMARY KEY (set_id, stage))""",
    # Which neurons of its layer a set is about, where not all: those too that cannot be explained.
    CHOSEN := """CREATE TABLE IF NOT EXISTS chosen (set_id INTEGER PRIMARY KEY, neurons BLOB NOT NULL)""",
    # Every answer of a language model, by a hash of the model and of what it was asked. Nothing here names a key.
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
    """Give a store of an earlier version the tables and columns it lacks; its scores are then to be made again.

    That costs nothing but time: scores come from simulations, which stay.
    """
    if not _lacking(connection):
        return
    connection.execute("BEGIN IMMEDIATE")
    lacking = _lacking(connection)  # another process may have been quicker
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
    """Which set: of one layer, by one protocol. The field order is that of the table `sets`."""

    mode: Mode = "fixed"
    tap: str = "neurons"
    layer: int
    protocol: str
    explainer: str = EXPLAINER
    """Who explains: `lookup`, or the name of a language model."""
    simulator: str = ""
    """Who simulates, where that is not the explainer: the method and the name of a language model."""
    control: str = ""
    """Empty, or how the explanations were falsified on purpose: `shuffled`."""
    sample: int = 0
    """Number of the explanation where an explainer that uses chance made several of each neuron."""

    @classmethod
    def of_row(cls, columns: Sequence[Any]) -> "SetKey":
        """Read the columns `KEY_COLUMNS`."""
        return cls(**dict(zip(cls.__slots__, columns, strict=True)))

    @property
    def explained(self) -> "SetKey":
        """The set that holds the explanations this one uses."""
        return replace(self, control="", simulator="")

    @property
    def simulated_by(self) -> SimulatorName | JudgeName | None:
        """Who simulated or judged; None for simulation by lookup."""
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
    return f" --llm URL --model {name.model}{rounding}"


def packed(values: np.ndarray, dtype: str) -> bytes:
    """An array as a compressed blob. The fastest level: simulations are mostly 0, which any level makes small."""
    return zlib.compress(np.ascontiguousarray(values, dtype=dtype).tobytes(), 1)


def unpacked(blob: bytes | None, dtype: str) -> np.ndarray:
    """The array of a blob; none of a NULL, as where an explanation is no table."""
    return np.frombuffer(zlib.decompress(blob) if blob is not None else b"", dtype=dtype)
