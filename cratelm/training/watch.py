"""A watch over the losses: none is looked at before it is needed, none that is not a number goes unseen."""

import math

import torch

from cratelm.errors import CrateError
from cratelm.rundir import write_json
from cratelm.training.batches import Batches
from cratelm.training.checkpoints import Checkpoints, checkpoints
from cratelm.training.config import TrainConfig
from cratelm.training.learner import Taken


class Watch:
    """Holds what recent steps saw on the device, where reading it makes nothing wait, until `check`."""

    def __init__(self, config: TrainConfig, saved: Checkpoints, batches: Batches) -> None:
        self.config, self.saved, self.world, self.batches = config, saved, saved.world, batches
        self._recent: list[Taken] = []
        self._newest = (math.nan, math.nan)
        self._last: Taken | None = None

    def saw(self, taken: Taken) -> None:
        """Take note of a step."""
        self._recent.append(taken)
        self._last = taken

    def check(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the newest step.

        Raises CrateError, and leaves the batch's description in `diverged.json`, if either was not finite in any step
        since the last check. All processes must call this at the same steps.
        """
        recent, self._recent = self._recent, []
        if not recent:
            return self._newest
        losses = self.world.mean(torch.stack([taken.losses for taken in recent]).mean(dim=1)).tolist()
        norms = torch.stack([taken.norm for taken in recent]).tolist()
        for taken, loss, norm in zip(recent, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._record(taken, loss, norm)
            self._finite(loss, "loss", taken.step + 1)
            self._finite(norm, "norm of the gradient", taken.step + 1)
        self._newest = (losses[-1], norms[-1])
        return self._newest

    def held_out(self, loss: float) -> float:
        """The held-out loss after the newest step, which `check` has passed; that step is recorded if it is no number.

        Then its loss and gradient were finite, but not the weights it left. All processes must call this.
        """
        assert self._last is not None
        if not math.isfinite(loss):
            self._record(self._last, *self._newest)
        return self._finite(loss, "held-out loss", self._last.step + 1)

    def _finite(self, value: float, what: str, step: int) -> float:
        """The value; CrateError if it is no number, before a checkpoint is written of what made it so."""
        if math.isfinite(value):
            return value
        self.saved.finish()
        kept = checkpoints(self.saved.run)
        where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise CrateError(
            f"the {what} became {value} at step {step} of {self.saved.run}; {where}. Train anew with a lower "
            "--learning-rate"
        )

    def _record(self, taken: Taken, loss: float, norm: float) -> None:
        """Say in `diverged.json` which batch it was: with it and the last checkpoint, the step can be done again."""
        bad = [
            row
            for micro, value in enumerate(taken.losses.tolist())
            if not math.isfinite(value)
            for row in self.batches.micro_rows(micro)
        ]
        rows = sorted(row for part in self.world.gather(bad) for row in part)
        batch = {
            "step": taken.step + 1, "seed": self.config.seed, "batch": taken.step, "rows": self.config.sequences,
            "rows_not_finite": rows, "loss": str(loss), "gradient_norm": str(norm),
            "learning_rate": self.config.learning_rate_at(taken.step),
        }  # fmt: skip
        self.world.decide(lambda: write_json(self.saved.run / "diverged.json", batch))
