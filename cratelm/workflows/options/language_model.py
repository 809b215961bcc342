"""The options of the commands that can ask a language model, in groups: whom, about which neurons, at what cost."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeVar

import tyro

from cratelm.errors import CrateError
from cratelm.interpretation.scorers.registry import SCORERS, SIMULATION
from cratelm.runtime import DeviceName

T = TypeVar("T")
Where = Annotated[str, tyro.conf.arg(metavar="URL|DIR", help_behavior_hint="")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Controls = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")]
Scorers = Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar="NAME...", help=f"{SIMULATION} is the paper's; {' '.join(SCORERS)}."),
]
Simulator = Literal["auto", "all-at-once", "token-by-token", "structured"]
Calibration = Literal["none", "linear", "percentile"]


@dataclass(frozen=True, kw_only=True)
class Explaining:
    """Who explains. Left out: lookup, which asks nobody, takes seconds and costs nothing."""

    llm: Where = ""
    """Ask this language model: http://localhost:8000/v1 for a server, or a Hugging Face directory or name, run here."""
    model: Name = ""
    """What the server calls the model; needed where it serves several."""
    explainer: Literal["auto", "lookup", "llm"] = "auto"
    """lookup: a table of tokens. llm: a sentence by --llm. auto: llm where one is given."""
    explainer_model: Name = ""
    """The model that explains, where that is not --model."""
    neurons: Annotated[str, tyro.conf.arg(metavar="N|I-J,...")] = "300"
    """Neurons of each layer to ask about: all, a number evenly spaced, or indices as 0-99,120. Lookup takes all."""
    neuron_seed: Number = None
    """Draw that number at random instead, with this seed; evenly spaced or drawn, every model gets the same indices."""
    samples: int = 1
    """Explanations of each neuron, each scored, to see how much chance there is in one."""
    temperature: Amount = None
    """Of the explanations; left out, 0 for one of each neuron, 1 for several and in compat mode."""
    seed: int = 0
    """Of the first explanation; the others count on from it."""
    rounding: Literal["auto", "up", "down"] = "auto"
    """Of activations to the 0-10 of prompts. up: whatever fires is at least 1. down: below a tenth of the strongest it
    is 0, as released. auto: up, and down in compat mode. Explanations made the other way are kept beside these."""
    device: DeviceName = "auto"
    """Where a model in this process computes."""
    llm_tokenizer: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Tokenizer of a server's model, to count prompts exactly: tokenizer.json, its directory, or a name on the hub."""
    llm_key: Annotated[str, tyro.conf.arg(metavar="VARIABLE", help_behavior_hint="")] = ""
    """Environment variable that holds the server's key; left out, OPENAI_API_KEY."""

    def __post_init__(self) -> None:
        least("--samples", self.samples, 1)
        least("--neuron-seed", self.neuron_seed, 0)
        least("--temperature", self.temperature, 0)


@dataclass(frozen=True, kw_only=True)
class Simulating:
    """Who predicts the activations from an explanation."""

    simulator: Simulator = "auto"
    """all-at-once: read an excerpt once. token-by-token: once a token. structured: a chat writes. auto: as it can."""
    simulator_llm: Where = ""
    """Another server or directory that simulates; left out, --llm. A base model does it better than a chat."""
    simulator_model: Name = ""
    """The model that simulates, where that is not --model."""
    read_out_repair: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")] = ()
    """compat only: leave out these flaws of the released read-out (docs/simulators.md), the others staying."""
    calibrate: Calibration = "none"
    """Fit simulated to real activations on excerpts of their own: linear, or percentile."""
    skip_self_test: bool = False
    """Go on with a model that cannot even simulate neurons that everybody knows. Its scores will mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What it may cost, and how the work is divided."""

    dry_run: bool = False
    """Say what would be asked, how many tokens that is, and stop."""
    budget_tokens: Number = None
    """Stop after so many tokens, read and written together."""
    budget_price: Amount = None
    """Stop at this price; needs --price-in and --price-out."""
    price_in: float = 0.0
    """Price of a million tokens read."""
    price_out: float = 0.0
    """Price of a million tokens written."""
    in_flight: int = 32
    """Neurons asked about at once."""
    part: Annotated[str, tyro.conf.arg(metavar="K/N", help_behavior_hint="")] = ""
    """K/N: ask about the K-th of N shares of the neurons, in a file of its own; start one process for each."""
    merge: bool = False
    """Join what the parts made; then the same command goes on without --part."""

    def __post_init__(self) -> None:
        least("--in-flight", self.in_flight, 1)
        least("--budget-tokens", self.budget_tokens, 1)
        for flag, amount in (
            ("--budget-price", self.budget_price), ("--price-in", self.price_in), ("--price-out", self.price_out)
        ):  # fmt: skip
            least(flag, amount, 0)
        if self.budget_price is not None and not (self.price_in or self.price_out):
            raise CrateError("--budget-price needs to know what a token costs. Give --price-in and --price-out")
        self.share  # noqa: B018 (refused here, before anything runs)

    @property
    def share(self) -> tuple[int, int]:
        """Which share, of how many; (1, 1) where the work is not divided."""
        if not self.part:
            return (1, 1)
        first, _, last = self.part.partition("/")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise CrateError(f"--part {self.part!r} is not understood. Write K/N, such as 1/4 for the first of four")
        return int(first), int(last)


Explained = tyro.conf.OmitArgPrefixes[Explaining]
Simulated = tyro.conf.OmitArgPrefixes[Simulating]
Spent = tyro.conf.OmitArgPrefixes[Spending]


def least(flag: str, value: float | int | None, smallest: int) -> None:
    """Refuse a number that is given and is none, or is smaller than this."""
    if value is not None and not smallest <= value < math.inf:
        raise CrateError(f"{flag} {value:g} cannot be. Give a number of at least {smallest}, or leave it out")


def group(kind: type[T]) -> T:
    """A field that holds a group of options with its defaults."""
    return field(default_factory=kind)


def asks(explaining: Explaining, simulating: Simulating | None = None) -> bool:
    """Whether a language model has a part in it."""
    named = explaining.llm or explaining.model or explaining.explainer_model or explaining.explainer == "llm"
    return bool(named or (simulating and (simulating.simulator_llm or simulating.simulator_model)))
