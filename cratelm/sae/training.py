"""Train an autoencoder with the trainer of sae-lens on the stream of `stream.py`; training can resume at any step.

The batch of a step is a function of (seed, step), the whole state of the trainer is saved, and nothing else is random:
a resumed training goes through the same numbers as one that was not stopped.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from cratelm.checksums import checked_path, verify, write_checksums
from cratelm.errors import CrateError
from cratelm.rundir import (
    append_jsonl,
    atomic_path,
    check_regular,
    differing_fields,
    origin,
    read_json,
    rewind_jsonl,
    write_json,
)
from cratelm.runtime import ProgressBar, console
from cratelm.sae.config import SaeConfig
from cratelm.sae.library import import_sae_lens, quiet, untrained
from cratelm.sae.loading import CONFIG, DESCRIPTION_FILE, WEIGHTS_FILE

CHECKPOINT_SECONDS = 60
"""Seconds between checkpoints: the most that a killed training repeats."""
CHECKPOINT, DAMAGED = "checkpoint", "damaged_checkpoint"

ResamplingInputs = Callable[["Trainer", int, int], Tensor]
"""(trainer, count, step) to `count` activations at which resampled latents start."""

LoggedRow = dict[str, float | int]
"""The logged numbers of a step."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlace:
    """Where the activations come from, and everything apart from the settings that affects the result."""

    tap: str
    layer: int
    path: str
    """The module in the model."""
    d_in: int
    context: int
    """Tokens of a row."""
    identity: Mapping[str, Any]
    """Hashes of model, tokens and tokenizer, split, precision."""
    model_flops_per_token: int
    """Of a forward pass."""


class Trainer:
    """The trainer of sae-lens with the schedules and the resampling of this package."""

    def __init__(self, config: SaeConfig, place: TrainingPlace, tokens: int, *, device: torch.device) -> None:
        self.config, self.place = config, place
        self.steps, self.tokens = config.steps(tokens), tokens
        self.sae = untrained(config, place.d_in, self.steps, device=device)
        from sae_lens import SAETrainer
        from sae_lens.config import LoggingConfig, SAETrainerConfig

        with quiet():
            self.inner = SAETrainer(
                SAETrainerConfig(
                    total_training_samples=self.steps * config.batch_tokens,
                    train_batch_size_samples=config.batch_tokens, lr=config.rate(place.d_in),
                    lr_end=config.rate(place.d_in), device=str(device),
                    dead_feature_window=config.dead_steps(tokens), feature_sampling_window=self.steps + 1,
                    logger=LoggingConfig(log_to_wandb=False),
                ),
                self.sae, iter(()),
            )  # fmt: skip
        self.inner.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.inner.optimizer, lambda step: config.rate_at(step, self.steps)
        )

    @property
    def step(self) -> int:
        """Completed steps."""
        return int(self.inner.n_training_steps)

    def scale(self, sample: Float[Tensor, "batch d_in"]) -> None:
        """Set the factor that scales activations to a mean norm of sqrt(d_in), if the kind has one and it is not set.

        It is folded into the weights at the end.
        """
        scaler = self.inner.activation_scaler
        if self.sae.cfg.normalize_activations == "expected_average_only_in" and scaler.scaling_factor is None:
            norm = float(sample.norm(dim=-1).mean())
            if not norm > 0:
                raise CrateError("the activations at this tap are all zero; there is nothing to train on")
            scaler.scaling_factor = self.place.d_in**0.5 / norm

    def learn(self, batch: Float[Tensor, "batch d_in"], candidates: ResamplingInputs | None = None) -> LoggedRow:
        """One step. Returns the numbers to log every `log_every` steps, else an empty row."""
        rate = self.inner.optimizer.param_groups[0]["lr"]
        output = self.inner.step(batch)
        self.inner.n_training_steps += 1
        row: LoggedRow = {}
        if self.step % self.config.log_every == 0 or self.step == self.steps:
            row = {
                "step": self.step,
                "tokens": self.step * self.config.batch_tokens,
                "loss": float(output.loss.detach()),
            }
            row |= {name: float(value.detach()) for name, value in output.losses.items()}
            row |= {name: float(output.metrics[name]) for name in ("zero_inputs",) if name in output.metrics}
            row |= _quality(output.sae_in, output.sae_out.detach(), output.feature_acts.detach())
            row |= {"dead_share": float(self.inner.dead_neurons.float().mean()), "learning_rate": rate}
        if self.config.entry.resamples:
            row |= self._resample(candidates)
        return row

    def _resample(self, candidates: ResamplingInputs | None) -> LoggedRow:
        """At the configured steps, resample latents that hardly fired; reset the counts where a window begins."""
        config, step = self.config, self.step
        steps = sorted(config.resample_at)
        windows = [max(at - config.resample_window, before) for before, at in zip([0, *steps], steps, strict=False)]
        row: LoggedRow = {}
        if step in config.resample_at and self.inner.n_frac_active_samples and step < self.steps:
            frequency = self.inner.act_freq_scores / self.inner.n_frac_active_samples
            rare = frequency < (1e-6 if step < 25_000 else 1e-7)
            count = int(rare.sum())
            row = {"step": step, "resampled": count}
            if count and candidates is not None:
                from cratelm.sae.paper import resample

                resample(self.sae, self.inner.optimizer, rare, candidates(self, count, step))
        if step in windows or step in config.resample_at:
            self.inner.act_freq_scores = torch.zeros_like(self.inner.act_freq_scores)
            self.inner.n_frac_active_samples = 0
        return row

    def save(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Write a checkpoint with everything that the next step depends on."""
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            state = {name: tensor.contiguous() for name, tensor in self.sae.state_dict().items()}
            save_file(state, temporary / WEIGHTS_FILE)
            self.inner.save_trainer_state(temporary)
            write_json(temporary / "checkpoint.json", {"step": self.step, "settings": dict(settings)})
            write_checksums(temporary)

    def load(self, folder: Path) -> None:
        """Load a checkpoint. Its optimizer state is a pickle, of which only tensors and plain values are accepted."""
        for file in folder.iterdir():
            verify(check_regular(file))
        self.sae.load_state_dict(load_file(folder / WEIGHTS_FILE))
        torch.load(folder / "trainer_state.pt", map_location="cpu", weights_only=True)
        with quiet():
            self.inner.load_trainer_state(folder)

    def finish(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write the trained autoencoder in the format of sae-lens, with decoder rows of norm 1, and sae.json."""
        factor = self.inner.activation_scaler.scaling_factor
        if factor is not None:
            self.sae.fold_activation_norm_scaling_factor(factor)
        if self.config.entry.folds_norms:
            self.sae.fold_W_dec_norm()
        metadata = self.sae.cfg.metadata
        metadata.hook_name, metadata.context_size = self.place.path, self.place.context
        # cfg.json is renamed last: a folder that has it is complete.
        with checked_path(folder / CONFIG) as config, checked_path(folder / WEIGHTS_FILE) as weights:
            self.sae.save_inference_model(weights.parent)
            (weights.parent / CONFIG).replace(config)
            write_json(folder / DESCRIPTION_FILE, description)


def train_sae(
    config: SaeConfig,
    place: TrainingPlace,
    stream_from: Callable[[int], Iterator[Tensor]],
    folder: Path,
    *,
    tokens: int,
    device: torch.device,
    bar: ProgressBar,
    stop: Callable[[], bool] = lambda: False,
    candidates: ResamplingInputs | None = None,
) -> None:
    """Train an autoencoder into a folder, or resume from its checkpoint.

    `stream_from(n)` yields the batches from number n on. `stop` is called before each step; when it returns True, a
    checkpoint is saved and KeyboardInterrupt raised. Raises CrateError if the folder has a training with other
    settings, and if the loss is not finite.
    """
    settings = settings_of(config, place, tokens)
    if is_trained(folder, settings):
        return
    checkpoint = folder / CHECKPOINT
    trainer = _resumed(lambda: Trainer(config, place, tokens, device=device), checkpoint, settings)
    folder.mkdir(parents=True, exist_ok=True)
    rewind_jsonl(folder / "metrics.jsonl", lambda row: 0 < row["step"] <= trainer.step)
    bar.advance(trainer.step * config.batch_tokens)
    stream = stream_from(trainer.step)
    saved = started = time.monotonic()
    first, note = trainer.step, ""
    while trainer.step < trainer.steps:
        if stop() or time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(checkpoint, settings)
            saved = time.monotonic()
        if stop():
            raise KeyboardInterrupt
        batch = next(stream)
        trainer.scale(batch)
        row = trainer.learn(batch, candidates)
        if "loss" in row:
            _check_finite(row, folder)
            note = f"loss {row['loss']:.4g}, L0 {row['l0']:.1f}, FVU {row['fvu']:.3f}"
        if row:
            rate = (trainer.step - first) * config.batch_tokens / max(time.monotonic() - started, 1e-9)
            append_jsonl(folder / "metrics.jsonl", row | {"tokens_per_second": rate})
        bar.advance(config.batch_tokens, note)
    trainer.finish(folder, _description(trainer, settings, folder.name))
    for name in (CHECKPOINT, DAMAGED):
        shutil.rmtree(folder / name, ignore_errors=True)


def _resumed(start: Callable[[], Trainer], checkpoint: Path, settings: Mapping[str, Any]) -> Trainer:
    """The trainer of a checkpoint, or a new trainer; a damaged checkpoint is renamed to `damaged_checkpoint`."""
    trainer = start()
    if not checkpoint.exists():
        return trainer
    try:
        read_json(checkpoint / "checkpoint.json", made_by="cratelm sae train")
    except CrateError as error:
        problem = str(error)
    else:
        _check_settings(checkpoint / "checkpoint.json", settings)
        try:
            trainer.load(checkpoint)
            return trainer
        except Exception as error:  # the libraries raise every kind of error for a damaged file
            problem = " ".join(str(error).split())[:120]
    aside = checkpoint.with_name(DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    checkpoint.rename(aside)
    console.print(f"{checkpoint} is not readable ({problem}), now {aside.name}; starting again", markup=False)
    return start()


def settings_of(config: SaeConfig, place: TrainingPlace, tokens: int) -> dict[str, Any]:
    """Every setting that affects the result."""
    return {
        **asdict(config), "tokens": tokens, "tap": place.tap, "layer": place.layer, "d_in": place.d_in,
        "context": place.context, **place.identity,
    }  # fmt: skip


def is_trained(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder has this autoencoder; one with other settings is refused."""
    if not (folder / CONFIG).exists():
        return False
    _check_settings(folder / DESCRIPTION_FILE, settings)
    return True


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise CrateError if the settings in the file differ."""
    saved = read_json(file, made_by="cratelm sae train").get("settings") or {}
    if different := differing_fields(saved, json.loads(json.dumps(settings))):
        raise CrateError(
            f"{file} has other settings than this command ({different}). Hint: use another --name, or remove "
            f"{file.parent}"
        )


def _description(trainer: Trainer, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The content of sae.json."""
    config, place = trainer.config, trainer.place
    seen = trainer.steps * config.batch_tokens
    return {
        "name": name, "kind": config.kind, "tap": place.tap, "layer": place.layer, "module": place.path,
        "d_in": place.d_in, "width": config.width(place.d_in), "expansion": config.expansion,
        "parameters": sum(weight.numel() for weight in trainer.sae.parameters()), "tokens": seen,
        "training_flops": config.training_flops(place.d_in, seen, place.model_flops_per_token),
        "dead_share": float(trainer.inner.dead_neurons.float().mean()),
        "dead_after": config.dead_steps(trainer.tokens) * config.batch_tokens,
        "scale": trainer.inner.activation_scaler.scaling_factor, "sae_lens": import_sae_lens().__version__,
        "settings": dict(settings), "origin": origin(),
    }  # fmt: skip


@torch.no_grad()
def _quality(x: Float[Tensor, "batch d_in"], out: Float[Tensor, "batch d_in"], latents: Tensor) -> dict[str, float]:
    """L0 and the fraction of variance unexplained (FVU) of a batch."""
    spread = ((x - x.mean(dim=0)) ** 2).sum()
    return {"l0": float((latents > 0).sum(dim=-1).float().mean()), "fvu": float(((x - out) ** 2).sum() / spread)}


def _check_finite(row: LoggedRow, folder: Path) -> None:
    if not math.isfinite(row["loss"]):
        raise CrateError(
            f"the loss must be finite, got {row['loss']} at step {row['step']}. Hint: remove {folder} and train again "
            "with a lower --learning-rate"
        )
