"""Options of the commands that use a language model, in groups: explainer and neurons, simulator, budget."""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from cratelm.errors import CrateError, check_least
from cratelm.interpretation.scorers.registry import SCORERS, SIMULATION
from cratelm.runtime import DeviceName

OptionGroup = TypeVar("OptionGroup")
Where = Annotated[str, tyro.conf.arg(metavar="URL|DIR", help_behavior_hint="")]
Name = Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")]
Amount = Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="")]
Controls = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME...", help_behavior_hint="")]
Scorers = Annotated[
    tuple[str, ...],
    tyro.conf.arg(metavar="NAME...", help=f"Scorers: {SIMULATION} (the paper's), {', '.join(SCORERS)}."),
]
SimulatorChoice = Literal["auto", "all-at-once", "next-token", "token-by-token", "structured"]
CalibrationName = Literal["none", "linear", "percentile"]


@dataclass(frozen=True, kw_only=True)
class Explaining:
    """The explainer. Left out: lookup, which needs no language model and takes seconds."""

    llm: Where = ""
    """Language model: the URL of a server, such as http://localhost:8000/v1, or a Hugging Face directory or name, or a
    GGUF file."""
    model: Name = ""
    """Name of the model on the server; required if the server has several."""
    explainer: Literal["auto", "lookup", "llm"] = "auto"
    """lookup: a table of tokens. llm: a sentence by --llm. auto: llm if --llm is given."""
    explainer_model: Name = ""
    """Name of the model that explains; by default --model."""
    explainer_prompt: Literal["auto", "table", "compact"] = "auto"
    """table: three few-shot examples, and every token with its activation (3,000 tokens). compact: text with marked
    tokens, and the strongest tokens (300 tokens). auto: table, but compact for a model that copies the examples."""
    neurons: Annotated[str, tyro.conf.arg(metavar="N|I-J,...")] = "300"
    """Neurons of each layer for the language model: all, a number (evenly spaced), or indices such as 0-99,120."""
    neuron_seed: Number = None
    """Draw the neurons at random with this seed, instead of evenly spaced; the same indices for every run."""
    samples: int = 1
    """Explanations per neuron, each scored separately, to measure the variance between samples."""
    best_of: int = 1
    """Explanations to draw for each neuron, at temperature 1, of which --best-by keeps the best. It is chosen on
    excerpts for explaining that no prompt showed, never on those for scoring."""
    best_by: Annotated[str, tyro.conf.arg(metavar="SCORER")] = "detection"
    """Scorer that chooses the best: detection, fuzzing or fuzzing-active ask the chat; rating, quick-detection and
    surprisal cost one request for each explanation and need prompt logprobs."""
    explain_from: Literal["excerpts", "outputs"] = "excerpts"
    """excerpts: text on which the neuron fires. outputs: the tokens that it promotes, which `cratelm directions` lists;
    the explanation says before which tokens the neuron fires."""
    hard_negatives: bool = False
    """Show the explainer also text on which the neuron is silent, although the neurons nearest to it fire on it."""
    temperature: Amount = None
    """Sampling temperature of explanations; by default 0 for one sample, 1 for several samples and in compat mode."""
    seed: int = 0
    """Sampling seed of the first explanation; further samples take the next seeds."""
    rounding: Literal["auto", "up", "down"] = "auto"
    """Rounding of activations to the 0-10 of prompts. up: an activation above 0 becomes at least 1. down: an activation
    below a tenth of the largest becomes 0, as released. auto: up, and down in compat mode. Both kinds of explanations
    are stored."""
    device: DeviceName = "auto"
    """Device of a model that runs in this process."""
    llm_dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of a model that runs in this process. auto: that of the stored weights, but on a CPU float32 unless
    it multiplies bfloat16 faster (AMX, SVE)."""
    llm_tokenizer: Annotated[str, tyro.conf.arg(metavar="DIR", help_behavior_hint="")] = ""
    """Tokenizer of a server's model, to count prompts exactly: tokenizer.json, its directory, a GGUF file, or a name on
    the hub."""
    llm_key: Annotated[str, tyro.conf.arg(metavar="VARIABLE", help_behavior_hint="")] = ""
    """Environment variable with the server's key; by default OPENAI_API_KEY."""
    timeout: float = 300.0
    """Seconds without a byte from the server after which a request is repeated."""
    max_answer_tokens: Number = None
    """Longest answer in tokens, reasoning included; default: 100 for an explanation, 64 for other scorers, and what the
    JSON of the structured simulator needs. Reasoning models need thousands."""
    reasoning_effort: Name = ""
    """Sent to the server as reasoning_effort: none, minimal, low, medium or high, as the model allows."""
    chat_template_kwargs: Annotated[str, tyro.conf.arg(metavar="JSON", help_behavior_hint="")] = ""
    """Sent to the server as chat_template_kwargs, such as '{"enable_thinking": false}' for vLLM."""
    skip_self_test: bool = False
    """Continue even if a model cannot simulate obvious neurons, or explains them by copies of few-shot examples; its
    scores are not meaningful."""
    extra_body: Annotated[str, tyro.conf.arg(metavar="JSON", help_behavior_hint="")] = ""
    """More fields of each chat request, as a JSON object. Stored with the results: do not put a secret here."""

    def __post_init__(self) -> None:
        check_least(self, 1, "samples", "timeout", "max_answer_tokens")
        check_least(self, 0, "neuron_seed", "temperature")
        self.extra  # noqa: B018 (refused here, before anything runs)

    @property
    def extra(self) -> dict[str, Any]:
        """More fields of each chat request."""
        kwargs = _json_object("--chat-template-kwargs", self.chat_template_kwargs)
        effort = {"reasoning_effort": self.reasoning_effort} if self.reasoning_effort else {}
        return (
            effort
            | ({"chat_template_kwargs": kwargs} if kwargs else {})
            | _json_object("--extra-body", self.extra_body)
        )


@dataclass(frozen=True, kw_only=True)
class Simulating:
    """The simulator, which predicts activations from an explanation."""

    simulator: SimulatorChoice = "auto"
    """all-at-once: one prompt per excerpt, read from prompt logprobs. next-token: the same prompt, cut before each
    activation, for servers with candidates of the next token only (llama.cpp). token-by-token: one prompt per token.
    structured: the model answers in JSON. auto: the best that the model supports."""
    simulator_llm: Where = ""
    """Another server or directory for simulation; by default --llm. Base models simulate better than chat models."""
    simulator_model: Name = ""
    """Name of the model that simulates; by default --model."""
    contrast: Literal["auto", "none", "neutral"] = "auto"
    """neutral: subtract what the simulator predicts from an explanation that says nothing, which needs a second reading
    of each excerpt. auto: neutral for a model that passes the self-test better with it, none in compat mode."""
    calibrate: CalibrationName = "none"
    """Fit simulated to real activations on separate excerpts: linear, or percentile."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Budget, prices, and division of the work."""

    dry_run: bool = False
    """Print the estimated calls and tokens, then stop."""
    budget_tokens: Number = None
    """Stop after N tokens, prompts and answers together."""
    budget_price: Amount = None
    """Stop at this price; needs --price-in and --price-out, unless the server lists prices."""
    price_in: float = 0.0
    """Price per million prompt tokens; by default what the server lists (OpenRouter and others, in USD)."""
    price_out: float = 0.0
    """Price per million generated tokens."""
    in_flight: int = 32
    """Number of neurons that are processed concurrently, and most requests in flight; fewer if llama.cpp has fewer
    slots."""
    batch: bool = False
    """Submit chats as a batch (OpenAI's Batch API, about half the price), which is answered within a day. The same
    command again collects the answers and submits what the next stage needs. Give the prices of batches."""
    forget_batches: bool = False
    """Forget batches that were submitted and not collected; their requests are sent, and paid for, again."""
    part: Annotated[str, tyro.conf.arg(metavar="K/N", help_behavior_hint="")] = ""
    """K/N: process only the K-th of N parts of the neurons, into a separate file; run one process per part."""
    merge: bool = False
    """Join the results of all parts, then continue with the same command without --part."""

    def __post_init__(self) -> None:
        check_least(self, 1, "in_flight", "budget_tokens")
        check_least(self, 0, "budget_price", "price_in", "price_out")
        self.share  # noqa: B018 (checks --part before anything runs)

    @property
    def share(self) -> tuple[int, int]:
        """(K, N) of --part; (1, 1) if the work is not divided."""
        if not self.part:
            return (1, 1)
        first, _, last = self.part.partition("/")
        if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
            raise CrateError(f"--part must be K/N, such as 1/4 for the first of four, got {self.part!r}")
        return int(first), int(last)


ExplainingGroup = tyro.conf.OmitArgPrefixes[Explaining]
SimulatingGroup = tyro.conf.OmitArgPrefixes[Simulating]
SpendingGroup = tyro.conf.OmitArgPrefixes[Spending]


def _json_object(flag: str, text: str) -> dict[str, Any]:
    """The JSON object that an option gives; empty without the option."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise CrateError(f"{flag} must be a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise CrateError(f"{flag} must be a JSON object, got {text!r}")
    return value


def group(kind: type[OptionGroup]) -> OptionGroup:
    """A dataclass field for a group of options, with the group's defaults."""
    return field(default_factory=kind)


def asks(explaining: Explaining, simulating: Simulating | None = None) -> bool:
    """Whether the options name a language model."""
    named = explaining.llm or explaining.model or explaining.explainer_model or explaining.explainer == "llm"
    return bool(named or (simulating and (simulating.simulator_llm or simulating.simulator_model)))
