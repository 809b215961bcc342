"""Pre-training: one loop for CRATE and GPT-2, resumable at any moment.

The batch of a step is a function of (seed, step) alone and nothing else is random, so a run that was killed and started
again goes through the same losses as one that was not.
"""

import contextlib
import math
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from tokenizers import Tokenizer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from cratelm.data.tokens import TokenDirectory, sample_batch
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model
from cratelm.rundir import (
    append_jsonl,
    atomic_path,
    claim,
    differing_fields,
    origin,
    read_json,
    rewind_jsonl,
    write_json,
)
from cratelm.runtime import ProgressBar, console
from cratelm.training.config import TrainConfig
from cratelm.training.evaluate import held_out_loss

_filters = threading.Lock()


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    data: TokenDirectory,
    run: Path,
    *,
    device: torch.device,
    bar: ProgressBar,
    stop: Callable[[], bool] = lambda: False,
) -> LanguageModel:
    """Train a model into a run directory, or go on where an earlier call stopped; return it on `device`.

    `stop` is asked before each step; once true, a checkpoint is written and KeyboardInterrupt raised.

    Raises CrateError if the run directory holds another configuration or is in use, if data and model do not fit,
    or if the loss stops being a number (the last checkpoint is from before that).
    """
    with claim(run):
        tokenizer = data.tokenizer()
        open_run(run, config, model_config, data)
        model = LanguageModel(model_config).initialise(config.seed).to(device)
        optimizer = build_optimizer(model, config)
        first = resume(run, model, optimizer, seed=config.seed)
        bar.advance(first * config.batch_tokens)
        if first < config.steps or not (run / "model").exists():
            rewind_jsonl(run / "metrics.jsonl", lambda row: row["step"] <= first)
            _loop(config, model, optimizer, data, run, first, bar, stop)
            save_model(model, run / "model", tokenizer)
        return model


def _loop(
    config: TrainConfig,
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    data: TokenDirectory,
    run: Path,
    first: int,
    bar: ProgressBar,
    stop: Callable[[], bool],
) -> None:
    """Steps `first` to the last: step, log, evaluate, checkpoint."""
    tokens, held_out = data.tokens("train"), data.tokens("val")[: config.evaluate_tokens + 1]
    started, since = time.monotonic(), first
    for step in range(first, config.steps):
        if stop():
            if step > first:
                save_checkpoint(run, model, optimizer, step)
            raise KeyboardInterrupt
        loss, norm = train_step(config, model, optimizer, tokens, step)
        done = step + 1
        last, checkpoint = done == config.steps, done % config.checkpoint_every == 0 or done == config.steps
        row: dict[str, Any] = {"step": done, "tokens": done * config.batch_tokens}
        if done % config.log_every == 0 or checkpoint:
            row["loss"] = _finite(loss.item(), "loss", run, done)
            row["gradient_norm"] = _finite(norm.item(), "norm of the gradient", run, done)
            row["learning_rate"] = config.learning_rate_at(step)
            row["tokens_per_second"] = (done - since) * config.batch_tokens / (time.monotonic() - started)
            started, since = time.monotonic(), done
        if done % config.evaluate_every == 0 or last:
            loss_there = held_out_loss(model, held_out, batch=config.micro_batch)
            row["held_out_loss"] = _finite(loss_there, "held-out loss", run, done)
        if len(row) > 2:
            append_jsonl(run / "metrics.jsonl", row)
        if checkpoint:
            save_checkpoint(run, model, optimizer, done)
        bar.advance(config.batch_tokens, f"loss {row['loss']:.3f}" if "loss" in row else "")


def train_step(
    config: TrainConfig, model: LanguageModel, optimizer: torch.optim.Optimizer, tokens: np.ndarray, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step: accumulate the batch's gradient, clip, update. Returns mean loss and gradient norm."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    total = torch.zeros((), device=model.device)
    for first in range(0, config.sequences, config.micro_batch):
        rows = range(first, first + config.micro_batch)
        batch = sample_batch(tokens, seed=config.seed, step=step, rows=rows, context=config.context)
        inputs, targets = (torch.from_numpy(part).to(model.device, non_blocking=True) for part in batch)
        with autocast(model.device):
            loss = model.loss(inputs, targets)
        (loss * (config.micro_batch / config.sequences)).backward()
        total += loss.detach() * (config.micro_batch / config.sequences)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, norm


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 arithmetic on a GPU, float32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def build_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices (embeddings and ISTA's atoms included), none on biases and LayerNorms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = model.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)


def open_run(run: Path, config: TrainConfig, model_config: ModelConfig, data: TokenDirectory) -> None:
    """Write `run.json`, or check that the one there describes this very run."""
    if config.context > model_config.context_length:
        raise CrateError(
            f"training sequences of {config.context} tokens are longer than the model's context of "
            f"{model_config.context_length}. Lower --context or raise the model's"
        )
    if data.vocab_size > model_config.vocab_size:
        raise CrateError(
            f"the tokens of {data.path} come from a vocabulary of {data.vocab_size}, the model has "
            f"{model_config.vocab_size} rows. Give --vocab-size {data.vocab_size} or more"
        )
    for split in ("train", "val"):
        if len(data.tokens(split)) <= config.context:
            raise CrateError(
                f"{data.path} has {len(data.tokens(split))} {split} tokens, fewer than one sequence of "
                f"{config.context}. Tokenize more text, or lower --context"
            )
    training = asdict(config) | {"data_hash": data.splits["train"].sha256, "tokenizer_hash": data.tokenizer_hash}
    if (run / "run.json").exists():
        found = read_json(run / "run.json", made_by=f"cratelm train --out {run}")
        there = found.get("model", {}) | (found.get("training") or {})
        different = differing_fields(there, model_config.as_dict() | training)
        if different:
            raise CrateError(f"{run} holds another run ({different}). Use another --out, or remove it")
        return
    write_run(run, model_config, training=training, control=None, of=None)


def write_run(
    run: Path, model_config: ModelConfig, *, training: dict[str, Any] | None, control: str | None, of: str | None
) -> None:
    """Write `run.json`: which model this directory is about, how it came to be, and what it costs."""
    write_json(
        run / "run.json",
        {
            "name": run.resolve().name, "arch": model_config.arch, "control": control, "of": of,
            "model": model_config.as_dict(), "parameters": model_config.num_parameters,
            "flops_per_token": model_config.flops_per_token(), "training": training, "origin": origin(),
        },
    )  # fmt: skip


def write_control(of: Path, run: Path) -> None:
    """Write the control of a trained run: the same model before its first step, in a run directory of its own."""
    trained = read_json(of / "run.json", made_by=f"cratelm train --out {of}")
    if trained["control"] is not None or trained["training"] is None:
        raise CrateError(f"{of} is no trained model (control: {trained['control']}). Name the run that was trained")
    if not (of / "model" / "tokenizer.json").exists():
        raise CrateError(f"the training of {of} is not finished (no model/ there). Run: cratelm train --out {of}")
    model_config, name = ModelConfig(**trained["model"]), of.resolve().name
    with claim(run):
        if (run / "run.json").exists():
            found = read_json(run / "run.json", made_by=f"cratelm train --control-of {of} --out {run}")
            asked = model_config.as_dict() | {"control": "random-init", "of": name}
            there = {key: found.get(key) for key in ("control", "of")} | found.get("model", {})
            if different := differing_fields(there, asked):
                raise CrateError(f"{run} holds another run ({different}). Use another --out, or remove it")
        else:
            write_run(run, model_config, training=None, control="random-init", of=name)
        if not (run / "model").exists():
            model = LanguageModel(model_config).initialise(trained["training"]["seed"])
            save_model(model, run / "model", Tokenizer.from_file(str(of / "model" / "tokenizer.json")))


def save_checkpoint(run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Write `checkpoints/step_N` in torch's distributed format and keep the two newest."""
    folder = run / "checkpoints"
    weights, moments = get_state_dict(model, optimizer)
    with atomic_path(folder / f"step_{step:07d}") as temporary, _one_process():
        dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=temporary, no_dist=True)
    for old in _checkpoints(run)[:-2]:
        shutil.rmtree(old)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Keep torch from warning that it takes this process for the only one: that is what `no_dist=True` says.

    Python's warning filters belong to all threads, and `cratelm demo` trains in two: hence the lock. Torch also wraps
    whatever goes wrong; a full disk and Ctrl-C come out as themselves.
    """
    with _filters, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        try:
            yield
        except dcp.api.CheckpointException as error:
            cause: BaseException | None = next(iter(error.failures.values()))[0]
            while cause is not None and not isinstance(cause, OSError | KeyboardInterrupt):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def resume(run: Path, model: LanguageModel, optimizer: torch.optim.Optimizer, *, seed: int) -> int:
    """Load the newest readable checkpoint; return how many steps it has seen, 0 if there is none.

    A checkpoint that fails half-way has changed the model already; without an older one, it is initialised again.
    """
    for folder in reversed(_checkpoints(run)):
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        try:
            with _one_process():
                dcp.load(state, checkpoint_id=folder, no_dist=True)
        except (dcp.api.CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).strip().splitlines()
            console.print(
                f"checkpoint {folder} is not readable ({reason[-1][:80] if reason else type(error).__name__})",
                markup=False,
            )
            continue
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        return int(folder.name.removeprefix("step_"))
    model.initialise(seed)
    optimizer.state.clear()
    return 0


def _checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step_*"))


def _finite(value: float, what: str, run: Path, step: int) -> float:
    """Refuse a number that shows that training has diverged, before a checkpoint is written of it."""
    if math.isfinite(value):
        return value
    kept = _checkpoints(run)
    where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    raise CrateError(
        f"the {what} became {value} at step {step} of {run}; {where}. Train anew with a lower --learning-rate"
    )
