"""Pre-training: one loop for CRATE and GPT-2, on one process or many, resumable at any moment.

The batch of a step is a function of seed and step, and nothing else is random. So a run that was killed and resumed has
the same losses as an uninterrupted one, on any number of processes.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from tokenizers import Tokenizer

from cratelm.data.special_tokens import find_end
from cratelm.data.tokenizer import load_tokenizer
from cratelm.data.tokens import TokenDirectory
from cratelm.distributed import ALONE, World
from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import save_model
from cratelm.rundir import claim, differing_fields, read_json
from cratelm.runtime import ProgressBar
from cratelm.training.batches import Batches
from cratelm.training.checkpoints import Checkpoints
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.evaluate import StoppedError, held_out_loss
from cratelm.training.learner import Learner, autocast, shard
from cratelm.training.log import Log
from cratelm.training.loss_monitor import LossMonitor
from cratelm.training.opening import check_run, open_run, training_identity, write_run
from cratelm.training.optimizer import Optimizers, build_optimizers

Measurement = Callable[[LanguageModel, int], Mapping[str, float]]
"""A measurement of the model during training: (model, step) to named numbers."""


def train(
    config: TrainConfig,
    model_config: ModelConfig,
    data: TokenDirectory,
    run: Path,
    *,
    device: torch.device,
    bar: ProgressBar,
    stop: Callable[[], bool] = lambda: False,
    stop_evaluation: Callable[[], bool] = lambda: False,
    measurements: Mapping[str, Measurement] | None = None,
    execution: Execution | None = None,
    world: World = ALONE,
) -> LanguageModel:
    """Train a model into a run directory, or resume the training there; return the model on `device`.

    `stop` is asked before each step; once true, a checkpoint is written and KeyboardInterrupt raised.
    `stop_evaluation` does the same during an evaluation, with which the run then resumes. `measurements` are called
    every `measure_every` steps on process 0, and their numbers logged as `NAME/NUMBER`. In a `world` of several
    processes each calls this with the same arguments; process 0 writes, and gets the whole model back.

    Raises CrateError if the run directory has another configuration or is in use, if data, model and processes do not
    match, if the disk is full, or if the loss or the gradient is not finite (the last checkpoint is from before that).
    """
    execution = execution or Execution()
    rows = config.rows_of(world.rank, world.size)
    world.decide(lambda: check_run(run, config, model_config, data))
    with contextlib.ExitStack() as stack:
        world.decide(lambda: stack.enter_context(claim(run)))
        tokenizer = data.tokenizer()
        world.decide(lambda: open_run(run, config, model_config, data))
        configuration = {"model": model_config.as_dict(), "training": training_identity(config, data)}
        saved = Checkpoints(run, configuration=configuration, keep_last=config.keep_last, world=world)

        def build() -> tuple[LanguageModel, Optimizers]:
            model = LanguageModel(model_config).initialise(config.seed).to(device)
            model.recompute_codes(execution.recompute)
            if execution.parallel == "fsdp" and world.size > 1:
                shard(model, world, device)
            return model, build_optimizers(model, config)

        model, optimizers, first = saved.resume(build)
        learner = Learner(config, model, optimizers, world, execution)
        bar.advance(first * config.batch_tokens)
        if first < config.steps or not world.decide(lambda: (run / "model").exists()):
            tokens = data.tokens("train")
            with (
                Batches(
                    config,
                    tokens,
                    rows,
                    first=first,
                    device=device,
                    ahead=execution.prefetch,
                    vocab_size=data.vocab_size,
                ) as batches,
                Log(run, execution.track, first=first, writes=world.leads, config=configuration["training"]) as log,
                saved,
            ):
                _loop(config, learner, batches, data, first, log, saved, measurements or {}, bar, stop, stop_evaluation)
            world.decide(lambda: None)  # each waits here for the last checkpoint's name
        whole = learner.whole_model()
        if whole is not None:
            _write_models(run, whole, tokenizer, data.end_of_text, saved)
        return whole if whole is not None else model


def _loop(
    config: TrainConfig,
    learner: Learner,
    batches: Batches,
    data: TokenDirectory,
    first: int,
    log: Log,
    saved: Checkpoints,
    measurements: Mapping[str, Measurement],
    bar: ProgressBar,
    stop: Callable[[], bool],
    stop_evaluation: Callable[[], bool],
) -> None:
    """Steps `first` to the last: step, log, evaluate, measure, checkpoint."""
    world, monitor = learner.world, LossMonitor(config, saved, batches)
    held_out = data.tokens("val")[: config.evaluate_tokens + 1]
    if first == 0:
        log.write({"step": 0, "tokens": 0} | _measure(learner, measurements, 0))
    due = first > 0 and (first == config.steps or first % config.evaluate_every == 0)
    resumed = world.decide(lambda: log.take_unevaluated(first)) if due else None

    def halt(step: int) -> NoReturn:
        if step > first:
            monitor.check()
            if not saved.holds(step):  # the existing one may have its held-out loss
                saved.save(learner.model, learner.optimizers, step)
            saved.finish()
        raise KeyboardInterrupt

    for done in range(first + (resumed is None), config.steps + 1):
        fresh = done > first
        last = done == config.steps
        checkpoint = last or done % config.checkpoint_every == 0
        evaluation = last or done % config.evaluate_every == 0
        measurement = last or done % config.measure_every == 0
        logged = fresh and (checkpoint or done % config.log_every == 0)
        row: dict[str, float | int] = {} if fresh or resumed is None else resumed
        row |= {"step": done, "tokens": done * config.batch_tokens}
        if fresh:
            if world.any(stop()):
                halt(done - 1)
            monitor.add(learner.step(batches, done - 1))
            if logged or evaluation or measurement:  # weights that are not finite are not worth measuring
                loss, norm = monitor.check()
        if logged:
            row |= {"loss": loss, "gradient_norm": norm, "learning_rate": config.learning_rate_at(done - 1)}
            row["tokens_per_second"] = log.steps_per_second(done) * config.batch_tokens
        resume_clock = log.pause()
        if evaluation:
            try:
                with autocast(learner.device):
                    measured = held_out_loss(
                        learner.model, held_out, batch=config.micro_batch, world=world, stop=stop_evaluation
                    )
            except StoppedError:  # the run resumes with this evaluation
                log.write(row)
                halt(done)
            row["held_out_loss"] = monitor.held_out(measured, done)
        if measurement:
            row |= _measure(learner, measurements, done)
        log.write(row)
        if checkpoint:
            saved.save(learner.model, learner.optimizers, done, held_out_loss=row.get("held_out_loss"))
        resume_clock()
        bar.advance(config.batch_tokens * fresh, f"loss {row['loss']:.3f}" if "loss" in row else "")


def _measure(learner: Learner, measurements: Mapping[str, Measurement], step: int) -> dict[str, float]:
    """The numbers of all measurements, on process 0; the others continue to their next synchronisation."""
    if not measurements:
        return {}
    whole = learner.whole_model()
    if whole is None:
        return {}
    whole.eval()
    with torch.no_grad():
        numbers = {
            f"{name}/{number}": float(value)
            for name, measure in measurements.items()
            for number, value in measure(whole, step).items()
        }
    whole.train()
    return numbers


def _write_models(run: Path, model: LanguageModel, tokenizer: Tokenizer, end: int, saved: Checkpoints) -> None:
    """Write the final model to `model/`, and to `model-best/` an earlier checkpoint with a lower held-out loss."""
    if not (run / "model").exists():
        save_model(model, run / "model", tokenizer, end=end)
    if not (run / "model-best").exists():
        best = saved.read_best(lambda: LanguageModel(model.config))
        if best is not None:
            save_model(best, run / "model-best", tokenizer, end=end)


def write_control(of: Path, run: Path) -> None:
    """Write the control of a trained run: the same model before its first step, in a separate run directory."""
    trained = read_json(of / "run.json", made_by=f"cratelm train --out {of}")
    if trained["control"] is not None or trained["training"] is None:
        raise CrateError(f"{of} is not a trained model (control: {trained['control']}). Give the run that was trained")
    if not (of / "model" / "tokenizer.json").exists():
        raise CrateError(f"the training of {of} is not finished (no model/ there). Run: cratelm train --out {of}")
    model_config, name = ModelConfig(**trained["model"]), of.resolve().name
    with claim(run):
        if (run / "run.json").exists():
            described = read_json(run / "run.json", made_by=f"cratelm train --control-of {of} --out {run}")
            requested = model_config.as_dict() | {"control": "random-init", "of": name}
            recorded = {key: described.get(key) for key in ("control", "of")} | described.get("model", {})
            if different := differing_fields(recorded, requested):
                raise CrateError(f"{run} is another run ({different}). Use another --out, or remove it")
        else:
            write_run(run, model_config, training=None, control="random-init", of=name)
        if not (run / "model").exists():
            model = LanguageModel(model_config).initialise(trained["training"]["seed"])
            tokenizer = load_tokenizer(of / "model")
            save_model(model, run / "model", tokenizer, end=find_end(tokenizer, of / "model"))
