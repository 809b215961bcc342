"""A circuit: the neurons and positions with the largest effect on a predicted token, and the share they explain.

The measured quantity is m = log p(target | prompt). To ablate a neuron at a position is to set its code there to a
baseline (0, or its mean over text) while everything after it is computed again.

    effect of a node u        m - m(u ablated)                            positive: it raises the target's probability
    its gradient              (a_u - baseline) dm / da_u                  first-order estimate, all nodes in one pass
    edge from u to v          a_v - a_v(u ablated)                        v in the next layer; times v's effect per unit
                                                                          of its code: the effect of u through v
    share kept                (m(all others ablated) - m_none) / (m - m_none)
    share lost                (m - m(these ablated)) / (m - m_none)       m_none: every neuron of every layer ablated
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cratelm.activations.causal_model import causal_model
from cratelm.activations.taps import Edit, capture, edit
from cratelm.runtime import ProgressBar

Method = Literal["ablation", "gradient", "integrated"]
Node = tuple[int, int, int]
"""Layer, position, neuron."""
Codes = dict[int, Float[Tensor, "rows seq neurons"]]


@dataclass(frozen=True, kw_only=True, slots=True)
class CircuitConfig:
    """Settings of a circuit search."""

    nodes: int = 6
    """Neurons of each layer to show."""
    method: Method = "ablation"
    """How nodes are ranked: exact ablation, or a gradient at the code or averaged between baseline and code."""
    candidates: int = 512
    """Most nodes to ablate per layer, those with the largest gradients; 0 for all active ones."""
    integration_steps: int = 16
    """Points between the baseline and the code, for `integrated`."""
    batch: int = 64
    """Ablations per forward pass."""


class PromptSubject:
    """A model, a prompt and a target token, run with changed codes."""

    def __init__(
        self, model: nn.Module, places: Mapping[int, str], prompt: Int[Tensor, " seq"], target: int,
        baselines: Mapping[int, Float[Tensor, " neurons"]] | None = None,
    ) -> None:  # fmt: skip
        """`places` is layer -> tap of its code; without `baselines` an ablated neuron is 0."""
        self.model, self.places, self.prompt, self.target = model, dict(places), prompt, target
        with torch.no_grad():
            self.codes = self._codes(1, {})[0]
            self.baselines = {
                layer: code.new_zeros(code.shape[2]) if baselines is None else baselines[layer].to(code)
                for layer, code in self.codes.items()
            }
            self.full = float(self.measured(1, {})[0])

    def logits(self, rows: int) -> Float[Tensor, "rows vocab"]:
        """Logits after the prompt, for a number of copies of it."""
        return causal_model(self.model).last_logits(self.prompt.expand(rows, -1))

    def measured(self, rows: int, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> Float[Tensor, " rows"]:
        """m of each copy, with the codes of some layers changed."""
        with edit(self.model, self._edits(rows, changes)):
            return self.logits(rows).log_softmax(dim=-1)[:, self.target]

    def _edits(self, rows: int, changes: Mapping[int, Callable[[Tensor], Tensor]]) -> dict[str, Edit]:
        """Changes of codes (rows, seq, neurons) as edits of tap values."""

        def shaped(change: Callable[[Tensor], Tensor]) -> Edit:
            return lambda value: change(_batched(rows, value)).view_as(value)

        return {self.places[layer]: shaped(change) for layer, change in changes.items()}

    def _codes(
        self, rows: int, changes: Mapping[int, Callable[[Tensor], Tensor]]
    ) -> tuple[Codes, Float[Tensor, "rows vocab"]]:
        with edit(self.model, self._edits(rows, changes)), capture(self.model, self.places.values()) as seen:
            logits = self.logits(rows)
        return {layer: _batched(rows, seen[place].detach()) for layer, place in self.places.items()}, logits

    def ablating(self, nodes: Sequence[Node]) -> dict[int, Callable[[Tensor], Tensor]]:
        """Changes that ablate the i-th node in the i-th copy."""
        layers = {layer for layer, _, _ in nodes}
        return {layer: self._ablate(layer, [(i, *node[1:]) for i, node in enumerate(nodes) if node[0] == layer])
                for layer in layers}  # fmt: skip

    def _ablate(self, layer: int, where: Sequence[tuple[int, int, int]]) -> Callable[[Tensor], Tensor]:
        rows, positions, neurons = torch.tensor(where, device=self.prompt.device).T

        def change(code: Tensor) -> Tensor:
            code = code.clone()
            code[rows, positions, neurons] = self.baselines[layer][neurons]
            return code

        return change

    def keeping(self, nodes: Sequence[Node], *, others: bool = False) -> dict[int, Callable[[Tensor], Tensor]]:
        """Changes that ablate all neurons except the nodes; with `others`, only the nodes."""
        changes = {}
        for layer, code in self.codes.items():
            chosen = torch.zeros_like(code[0], dtype=torch.bool)
            for _, position, neuron in (node for node in nodes if node[0] == layer):
                chosen[position, neuron] = True
            changes[layer] = _ablate_others(~chosen if others else chosen, self.baselines[layer])
        return changes


def _batched(rows: int, code: Tensor) -> Float[Tensor, "rows seq neurons"]:
    """A code with a row for each copy, also for OPT, which concatenates all rows."""
    return code.unflatten(0, (rows, -1)) if code.ndim == 2 else code


def _ablate_others(chosen: Tensor, baseline: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda code: torch.where(chosen, code, baseline)


def gradients(subject: PromptSubject, config: CircuitConfig) -> dict[int, Float[Tensor, "seq neurons"]]:
    """(a - baseline) dm/da of every node, at its code or averaged over points between baseline and code."""
    attributed = {}
    points = config.integration_steps if config.method == "integrated" else 1
    along = (torch.arange(points) + 0.5) / points if points > 1 else torch.ones(1)
    for layer, code in subject.codes.items():
        difference = code[0] - subject.baselines[layer]
        start = torch.zeros(points, *code.shape[1:], device=code.device, requires_grad=True)
        scale = along.to(code)[:, None, None]
        moved = (subject.baselines[layer] + scale * difference).detach()
        with torch.enable_grad():
            measured = subject.measured(points, {layer: _plus(moved, start)})
            (gradient,) = torch.autograd.grad(measured.sum(), start)
        attributed[layer] = (difference * gradient.mean(dim=0)).detach()
    return attributed


def _plus(code: Tensor, start: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: code + start


def rank(subject: PromptSubject, config: CircuitConfig, *, bar: ProgressBar) -> dict[Node, float]:
    """The effect of every candidate node by the configured method, strongest first."""
    attributed = gradients(subject, config)
    effects: dict[Node, float] = {}
    for layer, values in attributed.items():
        active = (subject.codes[layer][0] != subject.baselines[layer]).flatten()
        order = values.abs().flatten().argsort(descending=True)
        order = order[active[order]]
        if config.candidates > 0 and config.method == "ablation":
            order = order[: config.candidates]
        width = values.shape[1]
        nodes = [(layer, index // width, index % width) for index in order.tolist()]
        if config.method == "ablation":
            effects |= ablated(subject, nodes, config, bar=bar)
        else:
            effects |= {node: float(values[node[1], node[2]]) for node in nodes}
    return dict(sorted(effects.items(), key=lambda item: -abs(item[1])))


@torch.no_grad()
def ablated(
    subject: PromptSubject, nodes: Sequence[Node], config: CircuitConfig, *, bar: ProgressBar
) -> dict[Node, float]:
    """The exact effect of each node."""
    effects: dict[Node, float] = {}
    for batch in _batches(nodes, config.batch):
        measured = subject.measured(len(batch), subject.ablating(batch))
        effects |= dict(zip(batch, (subject.full - measured).tolist(), strict=True))
        bar.advance(len(batch))
    return effects


def choose(ranked: Mapping[Node, float], config: CircuitConfig) -> list[Node]:
    """The nodes to show: per layer those with the largest absolute effects."""
    chosen: list[Node] = []
    for layer in sorted({node[0] for node in ranked}):
        chosen += [node for node in ranked if node[0] == layer][: config.nodes]
    return chosen


@torch.no_grad()
def edges(subject: PromptSubject, chosen: Mapping[Node, float], config: CircuitConfig) -> list[dict[str, Any]]:
    """Edges from each chosen node to the chosen nodes of the next layer, measured by ablation."""
    result = []
    layers = sorted(subject.codes)
    for layer, following in zip(layers, layers[1:], strict=False):
        sources, readers = ([node for node in chosen if node[0] == number] for number in (layer, following))
        for batch in _batches(sources, config.batch) if readers else ():
            codes, _ = subject._codes(len(batch), subject.ablating(batch))
            for row, source in enumerate(batch):
                for reader in readers:
                    _, position, neuron = reader
                    code = float(subject.codes[following][0, position, neuron])
                    change = code - float(codes[following][row, position, neuron])
                    span = code - float(subject.baselines[following][neuron])
                    if change != 0:
                        effect = change * chosen[reader] / span if span else 0.0
                        result.append({"from": list(source), "to": list(reader), "change": change, "effect": effect})
    return sorted(result, key=lambda edge: -abs(edge["effect"]))


@torch.no_grad()
def explained(subject: PromptSubject, ranked: Sequence[Node], chosen: Sequence[Node]) -> dict[str, Any]:
    """The share of m that the chosen nodes carry, and a curve of the share by number of ranked nodes."""
    none = float(subject.measured(1, subject.keeping([]))[0])
    whole = subject.full - none

    def share(value: float) -> float | None:
        return value / whole if abs(whole) > 1e-6 else None

    with_chosen = float(subject.measured(1, subject.keeping(chosen))[0])
    without = float(subject.measured(1, subject.keeping(chosen, others=True))[0])
    counts = [count for count in (2**power for power in range(20)) if count < len(ranked)] + [len(ranked)]
    curve = []
    for count in counts:
        value = float(subject.measured(1, subject.keeping(ranked[:count]))[0])
        curve.append({"nodes": count, "log_probability": value, "share": share(value - none)})
    return {
        "log_probability": subject.full, "none": none, "kept": with_chosen, "without": without,
        "share_kept": share(with_chosen - none), "share_lost": share(subject.full - without), "curve": curve,
    }  # fmt: skip


def _batches(nodes: Sequence[Node], size: int) -> Iterator[list[Node]]:
    """Nodes of one layer in batches."""
    for first in range(0, len(nodes), size):
        yield list(nodes[first : first + size])
