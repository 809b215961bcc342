"""The optimizer: AdamW, or Muon for the matrices inside the blocks with AdamW for the rest."""

from collections.abc import Sequence

import torch
from torch import nn

from cratelm.errors import CrateError
from cratelm.model.language_model import LanguageModel
from cratelm.training.config import TrainConfig

Optimizers = list[torch.optim.Optimizer]


def build_optimizers(model: LanguageModel, config: TrainConfig) -> Optimizers:
    """The optimizers that share the model's parameters; all follow one learning rate."""
    if config.optimizer == "adamw":
        return [build_adamw(list(model.parameters()), config, model.device)]
    if not hasattr(torch.optim, "Muon"):
        raise CrateError(f"torch {torch.__version__} has no Muon, which came with 2.9. Upgrade it, or use adamw")
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    inside = set(map(id, matrices))
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    # Scaled so that an update is about as large as AdamW's, Muon takes AdamW's learning rate and weight decay.
    muon = torch.optim.Muon(
        matrices, lr=config.learning_rate, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, build_adamw(rest, config, model.device)]


def build_adamw(parameters: Sequence[nn.Parameter], config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices (embeddings and ISTA's atoms included), none on biases and LayerNorms."""
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=fused)
