"""Checkpoints: all processes write them during training; the newest and the best are kept.

`checkpoints/step_N/` has torch's distributed format, which loads on any number of processes, and `checkpoint.json`: the
step, the configuration, the held-out loss if it was measured, and size and CRC-32 of every file. A checkpoint is
written to `checkpoints/.step_N.tmp`, on a file system that all processes share, and renamed when it is complete.
"""

import errno
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils._pytree import tree_map_only

from cratelm.distributed import ALONE, World
from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.rundir import differing_fields, read_json, write_json
from cratelm.runtime import console
from cratelm.training.checkpoint_reader import load_state
from cratelm.training.config import settled
from cratelm.training.optimizer import Optimizers

DESCRIPTION = "checkpoint.json"
DAMAGED = "damaged_"
"""Prefix of the name of an unreadable checkpoint."""


class Checkpoints:
    """The checkpoints of a run. As a context manager, it waits at the end until the last one is written."""

    def __init__(
        self, run: Path, *, configuration: Mapping[str, Any], keep_last: int = 2, world: World = ALONE
    ) -> None:
        """`configuration` is saved in every checkpoint; a checkpoint with another configuration is refused."""
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a normal case
        self.run, self.folder, self.world = run, run / "checkpoints", world
        self.configuration, self.keep_last = configuration, keep_last
        self._made: Future[None] | None = None
        self._name = ""

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.finish()
        elif self._made is not None:  # report the first error
            self._made.exception()

    def save(
        self, model: LanguageModel, optimizers: Optimizers, step: int, *, held_out_loss: float | None = None
    ) -> None:
        """Start writing a checkpoint and return; first wait until the previous one is written."""
        self.finish()
        self._name = _name(step)
        temporary = self.folder / f".{self._name}.tmp"
        self.world.decide(lambda: _sweep(self.folder))
        description = {"step": step, "held_out_loss": held_out_loss, **self.configuration}
        state = _snapshot(model, optimizers)
        writing = dcp.async_save(state, checkpoint_id=temporary, process_group=self.world.disks)
        assert isinstance(writing, Future)
        made = self._made = Future[None]()
        writing.add_done_callback(lambda written: self._complete(written, made, temporary, description))

    def finish(self) -> None:
        """Wait until the last checkpoint is written. Raises CrateError if that failed, such as on a full disk."""
        if self._made is None:
            return
        made, self._made = self._made, None
        failures = [failure for failure in self.world.gather(_failure(made)) if failure]
        if not failures:
            return
        self.world.decide(lambda: _sweep(self.folder))
        where = last_checkpoint(self.run)
        if any(full for full, _ in failures):
            raise CrateError(
                f"no space left while writing {self.folder / self._name}; {where}. Free some and run the same command "
                "again"
            )
        raise CrateError(f"{self.folder / self._name} could not be written ({failures[0][1]}); {where}")

    def _complete(
        self, written: Future[Any], made: Future[None], temporary: Path, description: Mapping[str, Any]
    ) -> None:
        """Finish a written checkpoint, in the writer's thread: process 0 describes and renames it."""
        try:
            written.result()
            if self.world.leads:
                write_json(temporary / DESCRIPTION, {**description, "files": _sums(temporary)})
                final = temporary.with_name(temporary.name.removeprefix(".").removesuffix(".tmp"))
                _put(temporary, final)
                self._prune()
        except BaseException as error:  # raised again by `finish` in the main thread
            made.set_exception(error)
        else:
            made.set_result(None)

    def _prune(self) -> None:
        """Keep the newest and the best."""
        _sweep(self.folder)
        folders = checkpoints(self.run)
        best = best_checkpoint(self.run)
        for old in folders[: -self.keep_last]:
            if old != best:
                aside = old.with_name(f".{old.name}.old.tmp")  # killed here, no part of it counts as a checkpoint
                old.rename(aside)
                shutil.rmtree(aside)
        for damaged in self.folder.glob(f"{DAMAGED}*"):  # training has gone past it again
            if damaged.name.removeprefix(DAMAGED) <= folders[-1].name:
                shutil.rmtree(damaged)

    def holds(self, step: int) -> bool:
        """Whether this step has a checkpoint; first wait for one being written. All processes must call this."""
        self.finish()
        return self.world.decide(lambda: (self.folder / _name(step)).exists())

    def read_best(self, build: Callable[[], LanguageModel]) -> LanguageModel | None:
        """The model of the best readable checkpoint, in one process; None if it is the newest or none is readable.

        An unreadable checkpoint is reported, and the next best is tried.
        """
        ranked = _ranked(self.run)
        for folder in ranked:
            if folder == checkpoints(self.run)[-1]:
                return None
            problem = self._problem(folder)
            if problem is None:
                model = build()
                problem = _reading(lambda folder=folder, model=model: read_weights(folder, model))  # type: ignore[misc]
            if problem is None:
                return model
            console.print(f"the best checkpoint, {folder}, is not readable ({problem}); trying the next", markup=False)
        return None

    def resume(self, build: Callable[[], tuple[LanguageModel, Optimizers]]) -> tuple[LanguageModel, Optimizers, int]:
        """Model, optimizers and step of the newest readable checkpoint; freshly built if there is none.

        An unreadable checkpoint is renamed to `damaged_step_N`, so that it does not count as the newest or the best of
        later checkpoints.
        """
        model, optimizers = build()
        partly_loaded = False
        for folder in reversed(self.world.decide(lambda: checkpoints(self.run))):
            problem = self.world.decide(lambda folder=folder: self._problem(folder))  # type: ignore[misc]
            if problem is None:
                partly_loaded = True
                problem = next(filter(None, self.world.gather(_load(folder, model, optimizers))), None)
            if problem is None:
                self.world.decide(self._prune)  # a killed process may not have
                return model, optimizers, int(folder.name.removeprefix("step_"))
            renamed = folder.with_name(f"{DAMAGED}{folder.name}")
            console.print(
                f"checkpoint {folder} is not readable ({problem}), renamed to {renamed.name}; trying the one before",
                markup=False,
            )
            self.world.decide(lambda folder=folder, renamed=renamed: _put(folder, renamed))  # type: ignore[misc]
        if partly_loaded:  # a failed load may have changed some tensors
            model, optimizers = build()
        return model, optimizers, 0

    def _problem(self, folder: Path) -> str | None:
        """Why a checkpoint is unreadable, or None. Raises CrateError if it has another configuration."""
        if not (folder / DESCRIPTION).exists():
            return None if (folder / ".metadata").exists() else "it has no metadata"
        try:
            description = read_json(folder / DESCRIPTION, made_by="cratelm train")
        except CrateError as error:
            return str(error)
        try:
            self._check_configuration(folder, description)
            files = [(name, size, crc) for name, (size, crc) in description["files"].items()]
        except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
            return f"{DESCRIPTION} lacks or misspells a field ({error})"
        for name, size, crc in files:
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} must have {size} bytes, got {file.stat().st_size}"
            if _crc(file) != crc:
                return f"{name} was changed after it was written"
        return None

    def _check_configuration(self, folder: Path, description: Mapping[str, Any]) -> None:
        model = differing_fields(description["model"], self.configuration["model"])
        training = differing_fields(settled(description["training"]), settled(self.configuration["training"]))
        if model or training:
            raise CrateError(
                f"checkpoint {folder} has another configuration ({', '.join(filter(None, (model, training)))}). "
                "Use another --out, or remove it"
            )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_*"))


def last_checkpoint(run: Path) -> str:
    """A phrase about the newest checkpoint, for error messages."""
    folders = checkpoints(run)
    return f"the last checkpoint is {folders[-1]}" if folders else "there is no checkpoint yet"


def best_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss, the newest of equals; None if no checkpoint has one."""
    return next(iter(_ranked(run)), None)


def _ranked(run: Path) -> list[Path]:
    """The checkpoints with a held-out loss, lowest loss first, newest first among equals."""
    losses: list[tuple[float, Path]] = []
    for folder in checkpoints(run):
        try:
            loss = read_json(folder / DESCRIPTION, made_by="cratelm train").get("held_out_loss")
        except CrateError:
            continue
        if loss is not None:
            losses.append((loss, folder))
    return [folder for _, folder in sorted(reversed(losses), key=lambda pair: pair[0])]


def read_weights(folder: Path, model: LanguageModel) -> None:
    """Load only the weights of a checkpoint, in one process."""
    state = {"model": model.state_dict()}
    load_state(state, folder, alone=True)
    model.load_state_dict(state["model"])


def _snapshot(model: LanguageModel, optimizers: Optimizers) -> dict[str, Any]:
    """Weights and moments; copied on the CPU, where the next step would change them during the writing."""
    weights, moments = get_state_dict(model, optimizers)
    state = {"model": weights, "optimizer": moments}
    if model.device.type == "cpu":
        return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), state)
    return state


def _load(folder: Path, model: LanguageModel, optimizers: Optimizers) -> str | None:
    """Load model and optimizers from a checkpoint; return the reason if that fails."""
    weights, moments = get_state_dict(model, optimizers)
    problem = _reading(lambda: load_state({"model": weights, "optimizer": moments}, folder))
    if problem is None:
        set_state_dict(model, optimizers, model_state_dict=weights, optim_state_dict=moments)
    return problem


def _reading(read: Callable[[], None]) -> str | None:
    """Call `read`; return the reason if it fails."""
    try:
        read()
    except (CrateError, dcp.api.CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        reason = str(error).strip().splitlines()
        return reason[-1][:80] if reason else type(error).__name__
    return None


def _name(step: int) -> str:
    return f"step_{step:07d}"


def _put(folder: Path, final: Path) -> None:
    """Rename a folder, replacing a folder of that name; at every moment one of the two is complete."""
    replaced = final.with_name(f".{final.name}.old.tmp")
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove incomplete checkpoints of killed processes."""
    for stale in folder.glob(".*step_*.tmp"):
        shutil.rmtree(stale, ignore_errors=True)


def _failure(made: Future[None]) -> tuple[bool, str] | None:
    """Why a checkpoint failed: whether the disk was full, and the message of the innermost error, which torch wraps."""
    error = made.exception()
    if error is None:
        return None
    causes: list[BaseException] = [error, *(pair[0] for pair in getattr(error, "failures", {}).values())]
    for cause in causes:
        causes += [deeper for deeper in (cause.__cause__, cause.__context__) if deeper and deeper not in causes]
    codes = (errno.ENOSPC, errno.EDQUOT)
    full = any(
        getattr(cause, "errno", None) in codes or any(os.strerror(code) in str(cause) for code in codes)
        for cause in causes
    )
    words = str(causes[-1]).strip().splitlines()
    return full, words[-1][:120] if words else type(error).__name__


def _sums(folder: Path) -> dict[str, tuple[int, int]]:
    files = [file for file in sorted(folder.iterdir()) if file.name != DESCRIPTION]
    return {file.name: (file.stat().st_size, _crc(file)) for file in files}


def _crc(file: Path) -> int:
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc
