"""Where a layer's neurons can be changed, and where the sum of what they write can be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn

from cratelm.activations.places import decoders, find_places
from cratelm.activations.taps import INPUT, find_tap
from cratelm.errors import CrateError


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """The neurons of one layer."""

    layer: int
    tap: str
    """Where their code is read and changed."""
    written: str
    """The tap of what they write together."""
    directions: Float[Tensor, "neurons d_model"]
    """What each adds there per unit of its activation."""

    @property
    def neurons(self) -> int:
        """How many there are."""
        return len(self.directions)


@runtime_checkable
class SparseCoder(Protocol):
    """What steering needs of a sparse autoencoder: a dictionary over what one tap of the model gives."""

    @property
    def tap(self) -> str: ...

    @property
    def layer(self) -> int: ...

    @property
    def directions(self) -> Float[Tensor, "latents width"]:
        """What each latent adds to the reconstruction per unit of its activation."""

    def encode(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens latents"]: ...

    def decode(self, latents: Float[Tensor, "*tokens latents"]) -> Float[Tensor, "*tokens width"]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Coder:
    """A `SparseCoder` from two functions, for an autoencoder of any library."""

    tap: str
    """Path of the module whose output it codes, or with `:input` what that module reads."""
    layer: int
    directions: Float[Tensor, "latents width"]
    """Rows of its decoder."""
    encoder: Callable[[Tensor], Tensor]
    decoder: Callable[[Tensor], Tensor]

    def encode(self, x: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens latents"]:
        """Latents of what the tap gives."""
        return self.encoder(x)

    def decode(self, latents: Float[Tensor, "*tokens latents"]) -> Float[Tensor, "*tokens width"]:
        """What the latents stand for."""
        return self.decoder(latents)


def neuron_places(model: nn.Module) -> Mapping[int, Place]:
    """Layer -> its neurons, for our models and for Hugging Face ones whose structure is known."""
    taps = find_places(model, "neurons")
    directions = decoders(model, taps)
    if directions is None:
        raise CrateError(f"what the neurons of {type(model).__name__} write is not known. Use a model with plain MLPs")
    return {
        layer: Place(layer=layer, tap=tap, written=_written(tap), directions=directions[layer])
        for layer, tap in taps.items()
    }


def check_coder(model: nn.Module, coder: SparseCoder) -> None:
    """Refuse a sparse autoencoder whose tap the model has not, or does not have in that width where it is known."""
    module = find_tap(model, coder.tap)
    width = coder.directions.shape[1]
    named = "in_features" if coder.tap.endswith(INPUT) else "out_features"
    found = getattr(module, named, None)
    found = next((place.neurons for place in neuron_places(model).values() if place.tap == coder.tap), found)
    if found is not None and found != width:
        raise CrateError(
            f"the sparse autoencoder codes a width of {width}, {coder.tap} of this model gives {found}. "
            "Use one that was trained on this model"
        )


def _written(tap: str) -> str:
    """A linear map that reads the code puts out what it writes; our code lies inside the module that decodes it."""
    return tap.removesuffix(INPUT) if tap.endswith(INPUT) else tap.rpartition(".")[0]
