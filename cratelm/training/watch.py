"""A watch over the losses: none is looked at before it is needed, none that is not a number goes unseen."""

import math
from pathlib import Path

import torch

from cratelm.errors import CrateError
from cratelm.rundir import write_json
from cratelm.training.batches import Batches
from cratelm.training.checkpoints import checkpoints
from cratelm.training.config import TrainConfig
from cratelm.training.distributed import World
from cratelm.training.learner import Taken


class Watch:
    """Holds what recent steps saw on the device, where reading it makes nothing wait, until `check`."""

    def __init__(self, config: TrainConfig, run: Path, world: World, batches: Batches) -> None:
        self.config, self.run, self.world, self.batches = config, run, world, batches
        self._recent: list[Taken] = []

    def saw(self, taken: Taken) -> None:
        """Take note of a step."""
        self._recent.append(taken)

    def check(self) -> tuple[float, float]:
        """Mean loss and gradient norm of the newest step.

        Raises CrateError, and leaves the batch's description in `diverged.json`, if either was not finite in any step
        since the last check. All processes must call this at the same steps.
        """
        recent, self._recent = self._recent, []
        losses = self.world.mean(torch.stack([taken.losses for taken in recent]).mean(dim=1)).tolist()
        norms = torch.stack([taken.norm for taken in recent]).tolist()
        for taken, loss, norm in zip(recent, losses, norms, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._stop(taken, loss, norm)
        return losses[-1], norms[-1]

    def _stop(self, taken: Taken, loss: float, norm: float) -> None:
        batches = self.batches
        bad = [row for micro, value in enumerate(taken.losses.tolist()) if not math.isfinite(value)
               for row in batches.micro_rows(micro)]  # fmt: skip
        rows = sorted(row for part in self.world.gather(bad) for row in part)
        what, value = ("loss", loss) if not math.isfinite(loss) else ("gradient norm", norm)
        kept = checkpoints(self.run)
        where = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"

        def record() -> None:
            write_json(
                self.run / "diverged.json",
                {
                    "step": taken.step + 1, "seed": self.config.seed, "batch": taken.step,
                    "rows": self.config.sequences, "rows_not_finite": rows, "loss": str(loss),
                    "gradient_norm": str(norm), "learning_rate": self.config.learning_rate_at(taken.step),
                },
            )  # fmt: skip

        self.world.decide(record)
        raise CrateError(
            f"the {what} became {value} at step {taken.step + 1} of {self.run}; {where}, the batch is described in "
            f"{self.run / 'diverged.json'}. Train anew with a lower --learning-rate"
        )
