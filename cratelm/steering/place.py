"""The taps of a layer's neurons: where their activations can be changed, and where their joint output can."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.places import find_places, map_directions
from cratelm.activations.taps import INPUT, find_tap
from cratelm.errors import CrateError


@dataclass(frozen=True, kw_only=True, slots=True)
class NeuronPlace:
    """The neurons of one layer."""

    layer: int
    tap: str
    """Tap of their activations."""
    written: str
    """Tap of their joint output."""
    directions: Float[Tensor, "neurons d_model"]
    """Decoder direction of each neuron: what it adds to the output per unit of activation."""

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.directions)


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseCoder:
    """A sparse autoencoder of any library: a dictionary of the activations at one tap of the model."""

    tap: str
    """Path of the module whose output it encodes, or with `:input` that module's input."""
    layer: int
    directions: Float[Tensor, "latents width"]
    """Decoder direction of each latent: what it adds to the reconstruction per unit of activation."""
    encode: Callable[[Float[Tensor, "*tokens width"]], Float[Tensor, "*tokens latents"]]
    """Activations to latents."""
    decode: Callable[[Float[Tensor, "*tokens latents"]], Float[Tensor, "*tokens width"]]
    """Latents to the reconstruction."""


def neuron_places(model: nn.Module) -> Mapping[int, NeuronPlace]:
    """Layer -> its neurons, for a `LanguageModel` or a Hugging Face model whose structure is known."""
    taps = find_places(model, "neurons")
    directions = map_directions(model, taps)
    if directions is None:
        raise CrateError(
            f"the neurons of {type(model).__name__} have no known decoder directions. Use a model with plain MLPs"
        )
    return {
        layer: NeuronPlace(layer=layer, tap=tap, written=_written(tap), directions=directions[layer])
        for layer, tap in taps.items()
    }


def check_coder(model: nn.Module, coder: SparseCoder) -> None:
    """Raise `CrateError` if the model lacks the autoencoder's tap, or if the tap has another width."""
    module = find_tap(model, coder.tap)
    width = coder.directions.shape[1]
    features = getattr(module, "in_features" if coder.tap.endswith(INPUT) else "out_features", None)
    features = next((place.neurons for place in neuron_places(model).values() if place.tap == coder.tap), features)
    if features is not None and features != width:
        raise CrateError(
            f"the sparse autoencoder reads a width of {width}, but {coder.tap} of this model has {features}. "
            "Use one that was trained on this model"
        )


def _written(tap: str) -> str:
    """The tap of the output: the linear map that reads the code, or the module that contains the code."""
    return tap.removesuffix(INPUT) if tap.endswith(INPUT) else tap.rpartition(".")[0]
