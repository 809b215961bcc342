"""Metrics of a training: always metrics.jsonl; TensorBoard, Weights & Biases and Trackio on request.

A training that resumes from a checkpoint first drops the later lines of the killed run, so no step is logged twice.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cratelm.checksums import sha256_of
from cratelm.errors import CrateError
from cratelm.rundir import append_jsonl, read_jsonl, rewind_jsonl
from cratelm.training.config import Tracker

_Row = Mapping[str, float | int]
Settings = Mapping[str, Any]


class Log:
    """Writes a training's metrics to metrics.jsonl and the trackers, in process 0."""

    def __init__(self, run: Path, trackers: tuple[Tracker, ...], *, first: int, writes: bool, config: Settings) -> None:
        """`first` is the step at which training resumes; later lines of metrics.jsonl are dropped."""
        self.run, self.writes = run, writes
        self._sinks: list[tuple[Callable[[_Row], None], Callable[[], None]]] = []
        self._since, self._seen = time.monotonic(), first
        if writes:
            rewind_jsonl(run / "metrics.jsonl", lambda row: 0 < first >= row["step"])
            self._sinks = [SINKS[tracker](run, first, config) for tracker in dict.fromkeys(trackers)]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        for _write, close in self._sinks:
            close()

    def write(self, row: _Row) -> None:
        """Add one line: `step`, `tokens`, and the metrics of the step."""
        if self.writes and len(row) > 2:
            append_jsonl(self.run / "metrics.jsonl", row)
            for write, _close in self._sinks:
                write(row)

    def take_unevaluated(self, step: int) -> dict[str, float | int] | None:
        """Remove and return the line of a step whose evaluation was stopped; None if it has its held-out loss."""
        path = self.run / "metrics.jsonl"
        row: dict[str, float | int] = next((row for row in read_jsonl(path) if row["step"] == step), {"step": step})
        if "held_out_loss" in row:
            return None
        rewind_jsonl(path, lambda other: other["step"] != step)
        return row

    def steps_per_second(self, step: int) -> float:
        """Mean rate since the last call."""
        now = time.monotonic()
        rate = (step - self._seen) / max(now - self._since, 1e-9)
        self._since, self._seen = now, step
        return rate

    def pause(self) -> Callable[[], None]:
        """Stop the clock of `steps_per_second` during other work; call the returned function to restart it."""
        stopped = time.monotonic()

        def restart() -> None:
            self._since += time.monotonic() - stopped

        return restart


def _package(tracker: Tracker, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CrateError(
            f"--track {tracker} needs a package that is not installed ({error}). Run: pip install 'cratelm[track]'"
        ) from None


def _tensorboard(run: Path, first: int, _config: Settings) -> tuple[Callable[[_Row], None], Callable[[], None]]:
    writer = _package("tensorboard", "torch.utils.tensorboard").SummaryWriter(
        str(run / "tensorboard"), purge_step=first + 1 if first else None
    )

    def write(row: _Row) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))

    return write, writer.close


def _wandb(run: Path, _first: int, config: Settings) -> tuple[Callable[[_Row], None], Callable[[], None]]:
    wandb: Any = _package("wandb", "wandb")
    run_id = sha256_of(run / "run.json")[:16]  # a resumed run stays one run in the tracker
    try:
        session = wandb.init(
            project="cratelm", name=run.resolve().name, dir=str(run), config=dict(config), id=run_id, resume="allow"
        )
    except (wandb.Error, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CrateError(
            f"--track wandb could not start ({reason}). Run: wandb login; or set WANDB_MODE=offline and run the same "
            "command again"
        ) from None
    return (lambda row: session.log(dict(row), step=int(row["step"]))), session.finish


def _trackio(run: Path, _first: int, config: Settings) -> tuple[Callable[[_Row], None], Callable[[], None]]:
    trackio: Any = _package("trackio", "trackio")
    session = trackio.init(project="cratelm", name=run.resolve().name, config=dict(config), resume="allow", embed=False)
    return (lambda row: session.log(dict(row), step=int(row["step"]))), session.finish


SINKS: dict[Tracker, Callable[[Path, int, Settings], tuple[Callable[[_Row], None], Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
