"""CRATE in transformers: after `import cratelm.huggingface`, `AutoModelForCausalLM` opens CRATE directories.

A stock GPT-2 does not need this module. CRATE, and GPT-2 variants, have the `model_type` `crate`: `CrateConfig` has the
fields of a `ModelConfig`, and `CrateForCausalLM.model` is the `LanguageModel` of cratelm, so taps have their usual
names after `model.`.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cratelm.errors import CrateError
from cratelm.hub import upload
from cratelm.model.config import ModelConfig
from cratelm.model.generate import Cache, cache_type
from cratelm.model.language_model import LanguageModel
from cratelm.model.weights import AUTO_MAP, STUB
from cratelm.report.export.model_card import model_card, run_of
from cratelm.rundir import FORMAT_VERSION, atomic_path

try:
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        GenerationMixin,
        PretrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast
except ImportError:
    raise CrateError("cratelm.huggingface needs transformers. Hint: pip install 'cratelm[hf]'") from None

Mask = Int[Tensor, "batch seq"] | Bool[Tensor, "batch seq"]
MODEL_FIELDS = tuple(ModelConfig.__dataclass_fields__)


class CrateConfig(PretrainedConfig):
    """The fields of a `ModelConfig`; the defaults are those of the paper's smallest model."""

    model_type = "crate"
    attribute_map = {
        "hidden_size": "d_model", "num_hidden_layers": "num_layers", "num_attention_heads": "num_heads",
        "max_position_embeddings": "context_length",
    }  # fmt: skip

    def __init__(self, **fields: Any) -> None:
        paper: dict[str, Any] = {
            "arch": "crate", "num_layers": 1, "d_model": 128, "num_heads": 4, "vocab_size": 50304,
        }  # fmt: skip
        plain = {self.attribute_map.get(name, name): value for name, value in fields.items()}
        model = ModelConfig(**paper | {name: value for name, value in plain.items() if name in MODEL_FIELDS})
        ends = {name: fields.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        rest = {name: value for name, value in plain.items() if name not in MODEL_FIELDS}
        super().__init__(**{"use_cache": False, "tie_word_embeddings": True} | rest)
        for name, value in {**model.as_dict(), **ends}.items():
            setattr(self, name, value)
        self.format_version = FORMAT_VERSION
        self.auto_map = dict(AUTO_MAP)

    @property
    def intermediate_size(self) -> int:
        """Neurons per layer."""
        return self.model_config().num_neurons

    def model_config(self) -> ModelConfig:
        """The configuration as a `ModelConfig`."""
        return ModelConfig(**{name: getattr(self, name) for name in MODEL_FIELDS if hasattr(self, name)})

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **options: Any) -> None:
        """Write config.json and the stub that lets tools open the directory with `trust_remote_code`."""
        super().save_pretrained(save_directory, push_to_hub, **options)
        with atomic_path(Path(save_directory) / "modeling_crate.py") as temporary:
            temporary.write_text(STUB)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: transformers would copy this file into every saved directory, which has the stub instead."""


class CratePreTrainedModel(PreTrainedModel):
    """The common part of the classes around a `LanguageModel`."""

    config_class = CrateConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ["CrateBlock", "GPT2Block"]
    _supports_sdpa = True

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.model = LanguageModel(config.model_config())

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, tied to the head."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.model.embedding = value  # type: ignore[assignment]

    def read(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Mask | None, *, wanted: bool
    ) -> tuple[Float[Tensor, "batch seq d_model"], ...]:
        """The input of the head, preceded by the input of each block if `wanted`."""
        padding = _left_padding(attention_mask)
        inputs: list[Tensor] = []
        with _block_inputs(self.model, inputs) if wanted else contextlib.nullcontext():
            features = self.model.features(_rolled(input_ids, padding))
        return tuple(_rolled(state, padding, back=True) for state in (*inputs, features))

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: transformers would copy this file into every saved directory, which has the stub instead."""

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise weights and tables that were not loaded, as `LanguageModel.initialise` does."""
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        needed = {name: x for name, x in tensors.items() if not getattr(x, "_is_hf_initialized", False)}
        if needed:
            fresh = LanguageModel(self.config.model_config()).initialise(int(torch.randint(2**31, ())))
            drawn = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
            for name, tensor in needed.items():
                tensor.copy_(drawn[name])


class CrateModel(CratePreTrainedModel):
    """A `LanguageModel` without its head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Mask | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutput | tuple[Tensor, ...]:
        """`last_hidden_state` is the input of the language model's head, after the final LayerNorm."""
        _check_options(input_ids, attention_mask, options)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = self.read(input_ids, attention_mask, wanted=bool(wanted))
        output = BaseModelOutput(last_hidden_state=states[-1], hidden_states=states if wanted else None)
        return output if return_dict is not False else output.to_tuple()


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """A `LanguageModel` with the interface of transformers; its head is tied to the embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embedding.weight"}

    def __init__(self, config: CrateConfig) -> None:
        super().__init__(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._read: _Read | None = None
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Mask | None = None,
        labels: Int[Tensor, "batch seq"] | None = None,
        logits_to_keep: int | Int[Tensor, " kept"] = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits of the next token; with `labels` (the same tokens, -100 to ignore one) also the loss.

        `attention_mask` may mask tokens at both ends of a row. `hidden_states` are the input of each block and the
        input of the head. Positions are counted from the mask; other `position_ids` are refused.
        """
        _check_options(input_ids, attention_mask, options)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        ends = attention_mask is None or bool(
            attention_mask[:, -1].all()
        )  # no padding there, which a cache cannot hold
        if self._read is not None and ends and not wanted and labels is None and logits_to_keep == 1:
            logits = self.lm_head(self._read.features(self.model, input_ids, attention_mask)[:, -1:])
            output = CausalLMOutputWithPast(logits=logits)
            return output if return_dict is not False else output.to_tuple()
        states = self.read(input_ids, attention_mask, wanted=bool(wanted))
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(states[-1][:, positions])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **options)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=states if wanted else None)
        return output if return_dict is not False else output.to_tuple()

    def generate(self, *inputs: Any, use_cache: bool = True, **options: Any) -> Any:
        """Generate as in transformers, with the cache of cratelm: one tensor per layer for CRATE.

        transformers passes all tokens at each step, so greedy search, sampling and beam search work. If the tokens
        continue those of the last step, only the new ones are read; otherwise (another beam) all are. Assisted
        decoding, which needs a cache of transformers, and a text longer than the context raise CrateError.
        """
        config = options.get("generation_config") or (inputs[1] if len(inputs) > 1 else None) or self.generation_config
        for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
            if options.get(name) or getattr(config, name, None):
                raise CrateError(f"{name} must be left out for CRATE: assisted decoding needs a cache of transformers")
        self._read = _Read() if use_cache else None
        try:
            return super().generate(*inputs, **options | {"use_cache": False})
        finally:
            self._read = None

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
        revision: str | None = None,
        **_: Any,
    ) -> str:
        """Upload model and tokenizer with a model card, which has the results if the model was loaded from a run."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(self.config._name_or_path)
            for file in source.glob("tokenizer*.json") if self.config._name_or_path else ():
                (Path(folder) / file.name).write_bytes(file.read_bytes())
            self.save_pretrained(folder)
            run = run_of(source)
            (Path(folder) / "README.md").write_text(model_card(run or Path(folder), title=repo_id))
            return upload(
                Path(folder), repo_id, private=private, token=token, message=commit_message, create_pr=create_pr,
                revision=revision,
            )  # fmt: skip


class _Read:
    """The tokens of a generation that were read, and their cache."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None
        self.cache: Cache | None = None

    def features(self, model: LanguageModel, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Features of the new tokens; padding is on the left."""
        known = 0 if self.tokens is None else self.tokens.shape[1]
        if self.tokens is None or known >= tokens.shape[1] or not torch.equal(tokens[:, :known], self.tokens):
            known, weight = 0, model.embedding.weight
            dtype = cache_type(weight.device) if torch.is_autocast_enabled(weight.device.type) else weight.dtype
            self.cache = Cache(
                model.config, batch=len(tokens), capacity=model.config.context_length, device=weight.device, dtype=dtype
            )
        self.tokens = tokens
        new = None if mask is None or bool(mask.all()) else mask.bool()[:, known:]
        return model.features(tokens[:, known:], mask=new, cache=self.cache)


def _check_options(tokens: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    """Refuse arguments of transformers that would change the result and are not supported."""
    if options.get("inputs_embeds") is not None or options.get("past_key_values") is not None:
        raise CrateError("CRATE must get input_ids, without inputs_embeds and past_key_values")
    positions = options.get("position_ids")
    if positions is None:
        return
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    expected = real.cumsum(1) - 1
    fits = positions.dim() == 2 and positions.shape[-1] == expected.shape[-1] and len(positions) in (1, len(expected))
    if not fits or not bool(((positions == expected) | ~real).all()):
        raise CrateError(
            "position_ids of a CRATE must match the attention_mask; packed sequences are not supported. Hint: give "
            "each sequence a separate row"
        )


def _left_padding(mask: Mask | None) -> Int[Tensor, " batch"] | None:
    """The number of masked tokens at the beginning of each row; None without any."""
    if mask is None or bool(mask.all()):
        return None
    real = mask.bool()
    if bool((real[:, 1:] & ~real[:, :-1]).sum(1).add(real[:, 0]).gt(1).any()):
        raise CrateError("attention_mask must mask tokens only at the ends of a row, got masked tokens inside")
    return real.int().argmax(1)


def _rolled(
    x: Int[Tensor, "batch seq"] | Float[Tensor, "batch seq d_model"],
    padding: Int[Tensor, " batch"] | None,
    *,
    back: bool = False,
) -> Int[Tensor, "batch seq"] | Float[Tensor, "batch seq d_model"]:
    """Rotate each row left by its padding, or back.

    At the front, tokens have the right positions, and causal attention hides the padding from them.
    """
    if padding is None:
        return x
    positions = torch.arange(x.shape[1], device=x.device)[None]
    index = (positions + (-padding if back else padding)[:, None]) % x.shape[1]
    return x.gather(1, index if x.dim() == 2 else index[..., None].expand_as(x))


@contextlib.contextmanager
def _block_inputs(model: LanguageModel, inputs: list[Tensor]) -> Iterator[None]:
    """Append the input of each block of the model to `inputs` during a forward pass inside the context."""

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        inputs.append(arguments[0])

    with contextlib.ExitStack() as stack:
        for block in model.blocks:
            stack.callback(block.register_forward_pre_hook(keep).remove)
        yield


AutoConfig.register(CrateConfig.model_type, CrateConfig, exist_ok=True)
AutoModel.register(CrateConfig, CrateModel, exist_ok=True)
AutoModelForCausalLM.register(CrateConfig, CrateForCausalLM, exist_ok=True)
