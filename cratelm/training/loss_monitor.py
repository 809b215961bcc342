"""Check losses and gradient norms for NaN and inf without a device sync at every step."""

import math

import torch

from cratelm.errors import CrateError
from cratelm.rundir import write_json
from cratelm.training.batches import Batches
from cratelm.training.checkpoints import Checkpoints, last_checkpoint
from cratelm.training.config import TrainConfig
from cratelm.training.learner import StepResult


class LossMonitor:
    """Collects the losses and norms of recent steps on the device until `check` reads them."""

    def __init__(self, config: TrainConfig, saved: Checkpoints, batches: Batches) -> None:
        self.config, self.saved, self.world, self.batches = config, saved, saved.world, batches
        self._recent: list[StepResult] = []
        self._newest = (math.nan, math.nan)
        self._last: StepResult | None = None

    def add(self, result: StepResult) -> None:
        """Add the result of a step."""
        self._recent.append(result)
        self._last = result

    def check(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the newest step.

        Raises CrateError, and leaves the batch's description in `diverged.json`, if either was not finite in any step
        since the last check. All processes must call this at the same steps.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return self._newest
        losses = self.world.mean(torch.stack([result.losses for result in recent]).mean(dim=1)).tolist()
        norms = torch.stack([result.norm for result in recent]).tolist()
        for result, loss, norm in zip(recent, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._record(result, loss, norm)
            self._finite(loss, "loss", result.step + 1)
            self._finite(norm, "norm of the gradient", result.step + 1)
        self._newest = (losses[-1], norms[-1])
        return self._newest

    def held_out(self, loss: float, step: int) -> float:
        """Check the held-out loss after step `step`, which `check` has passed, and return it.

        If it is not finite, the step's loss and gradient were finite but its weights are not; the step is recorded. All
        processes must call this.
        """
        if not math.isfinite(loss) and self._last is not None:
            self._record(self._last, *self._newest)
        return self._finite(loss, "held-out loss", step)

    def _finite(self, value: float, what: str, step: int) -> float:
        """Return the value; raise CrateError if it is not finite, before those weights reach a checkpoint."""
        if math.isfinite(value):
            return value
        self.saved.finish()
        raise CrateError(
            f"the {what} became {value} at step {step} of {self.saved.run}; {last_checkpoint(self.saved.run)}. "
            "Train again with a lower --learning-rate"
        )

    def _record(self, result: StepResult, loss: float, norm: float) -> None:
        """Describe the batch in `diverged.json`, so that the step can be repeated from the last checkpoint."""
        bad = [
            row
            for micro, value in enumerate(result.losses.tolist())
            if not math.isfinite(value)
            for row in self.batches.micro_rows(micro)
        ]
        rows = sorted(row for part in self.world.gather(bad) for row in part)
        batch = {
            "step": result.step + 1, "seed": self.config.seed, "batch": result.step, "rows": self.config.sequences,
            "rows_not_finite": rows, "loss": str(loss), "gradient_norm": str(norm),
            "learning_rate": self.config.learning_rate_at(result.step),
        }  # fmt: skip
        self.world.decide(lambda: write_json(self.saved.run / "diverged.json", batch))
