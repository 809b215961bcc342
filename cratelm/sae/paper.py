"""The autoencoder of the paper's released code, as a training class of sae-lens; saved in the `standard` form.

Import it after `library.import_sae_lens`, which explains a missing package.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import StandardSAEConfig, StandardTrainingSAE, StandardTrainingSAEConfig, register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from torch.optim import Optimizer

NAME = "cratelm_paper"
"""The name of the architecture during training."""
ENCODER_SHARE = 0.2
"""Norm of a resampled latent's encoder, as a share of the mean norm of the other encoders."""


@dataclass
class PaperTrainingSAEConfig(StandardTrainingSAEConfig):
    """Settings of the released code; the L1 coefficient is its 8e-5."""

    l1_coefficient: float = 8e-5

    @classmethod
    def architecture(cls) -> str:
        return NAME

    def get_inference_config_class(self) -> type:
        return StandardSAEConfig


class PaperTrainingSAE(StandardTrainingSAE):
    """f = relu((x - b_dec) W_enc + b_enc), x' = f W_dec + b_dec, every row of W_dec of norm 1.

    The loss is the mean over tokens and dimensions of (x' - x)^2 / ||x||_2 (the norm, not its square), and l1 times
    the mean over tokens of sum |f|. A token whose activation is all zero adds nothing to
    the first term and is counted in the metric `zero_inputs`; the released code divides by zero.

    The component of a row's gradient along the row is removed, and rows are normalised before each step and at the end.
    sae-lens clips the gradient to norm 1; the released code does not.
    """

    def __init__(self, cfg: PaperTrainingSAEConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.W_dec.register_hook(self._across)

    def initialize_weights(self) -> None:
        """Kaiming-uniform encoder and decoder, drawn separately; decoder rows of norm 1; biases 0."""
        super().initialize_weights()
        nn.init.kaiming_uniform_(self.W_enc.data)
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Normalise the rows of the decoder."""
        self.W_dec.data /= self.W_dec.data.norm(dim=1, keepdim=True).clamp(min=1e-12)

    def _across(self, gradient: Tensor) -> Tensor:
        rows = self.W_dec.data
        return gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One batch: reconstruction and loss."""
        self.normalise()
        x = step_input.sae_in
        latents, before = self.encode_with_hidden_pre(x)
        out = self.decode(latents)
        error, zero = relative_error(x, out)
        penalty = step_input.coefficients["l1"] * latents.abs().sum(dim=-1).mean()
        return TrainStepOutput(
            sae_in=x, sae_out=out, feature_acts=latents, hidden_pre=before, loss=error + penalty,
            losses={"relative_error": error, "l1_loss": penalty}, metrics={"zero_inputs": zero},
        )  # fmt: skip

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        """Normalise the saved rows, which the last step has changed."""
        super().process_state_dict_for_saving_inference(state_dict)
        rows = state_dict["W_dec"]
        state_dict["W_dec"] = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def relative_error(
    x: Float[Tensor, "batch d_in"], out: Float[Tensor, "batch d_in"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean over all elements of (out - x)^2 / ||x||_2, and the number of tokens with x = 0, which add nothing."""
    norm = x.norm(dim=-1, keepdim=True)
    nonzero = norm > 0
    squares = (out - x) ** 2 / torch.where(nonzero, norm, torch.ones_like(norm))
    return (squares * nonzero).mean(), (~nonzero).sum().to(x.dtype)


@torch.no_grad()
def resample(
    sae: PaperTrainingSAE,
    optimizer: Optimizer,
    dead: Bool[Tensor, " width"],
    inputs: Float[Tensor, "dead d_in"],
) -> None:
    """Restart latents at these inputs, one each: decoder row = the normalised input; encoder = the same times 0.2 of
    the mean norm of the other encoders; bias and Adam's moments 0.
    """
    rows = inputs / inputs.norm(dim=1, keepdim=True).clamp(min=1e-12)
    others = sae.W_enc.data[:, ~dead] if bool((~dead).any()) else sae.W_enc.data
    sae.W_dec.data[dead] = rows.to(sae.W_dec.dtype)
    sae.W_enc.data[:, dead] = (rows * ENCODER_SHARE * others.norm(dim=0).mean()).T.to(sae.W_enc.dtype)
    sae.b_enc.data[dead] = 0
    for weight, which in ((sae.W_dec, dead), (sae.W_enc, (slice(None), dead)), (sae.b_enc, dead)):
        for name in ("exp_avg", "exp_avg_sq"):
            if name in optimizer.state.get(weight, {}):
                optimizer.state[weight][name][which] = 0


if NAME not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(NAME, PaperTrainingSAE, PaperTrainingSAEConfig)
