"""CRATE in TransformerLens: after `import cratelm.lens`, `TransformerBridge.boot_transformers` opens CRATE directories.

GPT-2 directories are stock GPT-2 models, which TransformerLens opens without this module.

| TransformerLens                   | CRATE                                                  |
|-----------------------------------|--------------------------------------------------------|
| `blocks.N.hook_resid_pre`         | the input of the block                                 |
| `blocks.N.hook_attn_out`          | MSSA(LN(x))                                            |
| `blocks.N.hook_resid_mid`         | z = x + MSSA(LN(x))                                    |
| `blocks.N.mlp.hook_in`            | LN(z), the input of ISTA                                 |
| `blocks.N.mlp.hook_post`          | the code: the neurons                                  |
| `blocks.N.hook_mlp_out`, `hook_resid_post` | D a, the output of the block: no residual |
"""

from typing import Any

from torch import nn

import cratelm.huggingface  # noqa: F401  (registers the model with transformers)
from cratelm.errors import CrateError

try:
    from transformer_lens.factories.architecture_adapter_factory import (
        SUPPORTED_ARCHITECTURES,
        ArchitectureAdapterFactory,
    )
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components import (
        BlockBridge,
        EmbeddingBridge,
        LinearBridge,
        NormalizationBridge,
        UnembeddingBridge,
    )
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
except ImportError:
    raise CrateError("cratelm.lens needs TransformerLens. Hint: pip install 'cratelm[lens]'") from None


class Block(BlockBridge):
    """A block of a `LanguageModel`: one tensor in, one tensor out."""

    hook_aliases = {
        "hook_resid_pre": "hook_in",
        "hook_attn_out": "attn.hook_out",
        "hook_resid_mid": "ln2.hook_in",
        "hook_mlp_out": "mlp.hook_out",
        "hook_resid_post": "hook_out",
    }

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Return the tensor if the bridge returns a tuple."""
        output = super().forward(*inputs, **options)
        return output[0] if isinstance(output, tuple) else output


class Coder(GeneralizedComponent):
    """The ISTA block, or the MLP of a GPT-2 variant, which contains the neurons."""

    hook_aliases = {"hook_post": "neurons.hook_out"}


class CrateAdapter(ArchitectureAdapter):
    """Map the parts of a `CrateForCausalLM` to those of TransformerLens.

    Weights are not folded or centred: that assumes a residual stream to which every layer adds, and the output of a
    CRATE block replaces it.
    """

    supports_fold_ln = False
    supports_center_writing_weights = False
    supports_compatibility_mode = False
    supports_kv_cache = False

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        for name, value in {
            "normalization_type": "LN", "positional_embedding_type": "standard", "final_rms": False,
            "gated_mlp": False, "attn_only": False, "eps": 1e-5,
        }.items():  # fmt: skip
            setattr(self.cfg, name, value)
        self.weight_processing_conversions: dict[str, Any] = {}

    def prepare_model(self, hf_model: Any) -> None:
        """Map the parts of this model; their names depend on architecture and variant."""
        super().prepare_model(hf_model)
        block = hf_model.model.blocks[0]
        coder, neurons = block.neurons.split(".")
        (attention,) = {name for name, _ in block.named_children()} - {"norm_1", "norm_2", coder}
        self.component_mapping = {
            "embed": EmbeddingBridge(name="model.embedding"),
            "blocks": Block(
                name="model.blocks",
                submodules={
                    "ln1": NormalizationBridge(name="norm_1", config=self.cfg),
                    "attn": GeneralizedComponent(name=attention, submodules=_linear_maps(block, attention)),
                    "ln2": NormalizationBridge(name="norm_2", config=self.cfg),
                    "mlp": Coder(
                        name=coder,
                        submodules={"neurons": GeneralizedComponent(name=neurons), **_linear_maps(block, coder)},
                    ),
                },
            ),
            "ln_final": NormalizationBridge(name="model.norm", config=self.cfg),
            "unembed": UnembeddingBridge(name="lm_head"),
        }


def _linear_maps(block: nn.Module, part: str) -> dict[str, LinearBridge]:
    """The linear maps of a part of a block, by name."""
    children = block.get_submodule(part).named_children()
    return {name: LinearBridge(name=name) for name, child in children if isinstance(child, nn.Linear)}


ArchitectureAdapterFactory.register_adapter("CrateForCausalLM", CrateAdapter)
SUPPORTED_ARCHITECTURES["CrateForCausalLM"] = CrateAdapter  # `boot_transformers` looks here only
