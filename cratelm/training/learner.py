"""Optimizer steps of a model, on one process or on several that hold copies (DDP) or shares (FSDP2) of it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cratelm.distributed import World
from cratelm.model.language_model import LanguageModel
from cratelm.training.batches import Batches
from cratelm.training.config import Execution, TrainConfig
from cratelm.training.optimizer import Optimizers


class Objective(nn.Module):
    """The loss as a forward pass, which torch can wrap to average gradients and to compile."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats per token, and the penalty that a variant adds."""
        return self.model.objective(inputs, targets)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """Losses and gradient norm of one optimizer step in this process, as tensors on the device."""

    step: int
    losses: Float[Tensor, " micro_batches"]
    """Mean loss of each micro-batch of this process, in nats per token."""
    norm: Float[Tensor, ""]
    """Of the whole gradient, before clipping."""


class Learner:
    """Takes optimizer steps."""

    def __init__(
        self, config: TrainConfig, model: LanguageModel, optimizers: Optimizers, world: World, execution: Execution
    ) -> None:
        self.config, self.model, self.optimizers, self.world = config, model, optimizers, world
        self.device = torch.device(model.device)
        self._objective = _wrap(model, world, execution)

    def step(self, batches: Batches, step: int) -> StepResult:
        """Accumulate the gradient of the batch, clip, update. Processes exchange gradients once, at the end."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.config.learning_rate_at(step)
        share = batches.size / len(batches.rows)
        losses = []
        for micro, (inputs, targets) in enumerate(batches.step(), 1):
            with self._synchronised(micro == batches.per_step):
                with autocast(self.device):
                    loss, added = self._objective(inputs, targets)
                ((loss + added) * share).backward()
            losses.append(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        whole_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        return StepResult(step=step, losses=torch.stack(losses), norm=whole_norm)

    def whole_model(self) -> LanguageModel | None:
        """The whole model, on process 0; a copy if it is sharded. All processes must call this."""
        if isinstance(self.model, FSDPModule):
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_model_state_dict(self.model, options=options)
            if not self.world.leads:
                return None
            copy = LanguageModel(self.model.config)
            copy.load_state_dict(state)
            return copy.to(self.device)
        return self.model if self.world.leads else None

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Exchange gradients only after the last micro-batch of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            yield
        elif isinstance(self._objective, DistributedDataParallel) and not last:
            with self._objective.no_sync():
                yield
        else:
            yield


def shard(model: LanguageModel, world: World, device: torch.device) -> None:
    """Shard the tensors of every block, and all others, over the processes (FSDP2), in place."""
    mesh = init_device_mesh(device.type, (world.size,))
    policy: dict[str, Any] = {}
    if device.type == "cuda":
        policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **policy)
    fully_shard(model, mesh=mesh, **policy)
    for method in ("loss", "objective", "token_losses"):
        register_fsdp_forward_method(model, method)


def _wrap(model: LanguageModel, world: World, execution: Execution) -> nn.Module:
    """The objective, with gradients averaged over the processes and, if requested, compiled."""
    objective: nn.Module = Objective(model)
    if world.size > 1 and not isinstance(model, FSDPModule):
        devices = [model.device] if model.device.type == "cuda" else None
        objective = DistributedDataParallel(objective, device_ids=devices, gradient_as_bucket_view=True)
    wanted = execution.compile if execution.compile is not None else model.device.type == "cuda"
    if wanted and isinstance(model, FSDPModule):
        for block in model.blocks:
            block.compile()
    elif wanted:
        objective.compile()
    return objective


def autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 arithmetic on a GPU, float32 elsewhere."""
    if device.type == "cuda":
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()
