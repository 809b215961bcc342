"""Find the circuit of a prediction: the neurons of each layer with the largest effect on a token, as a graph.

    cratelm circuit runs/crate-2l --prompt "import numpy as" --token " np"
    cratelm circuit runs/gpt2-2l --prompt "for i in range(" --nodes 8 --method integrated

A node is a neuron at a position. Its effect is the change of the token's log probability when its code there is set to
0 (or to its mean, --baseline mean) and all later activations are recomputed; gradients choose which nodes are ablated.
An edge is the effect of a node on a node of the next layer. The circuit is printed with the share of the log
probability that the shown nodes explain, and written to RUN/circuits as .json, .svg and .png.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cratelm.errors import CrateError, check_least
from cratelm.rundir import origin, write_json
from cratelm.runtime import progress_bar
from cratelm.workflows.naming import result_name
from cratelm.workflows.opening import OpenModel, open_model
from cratelm.workflows.options.arguments import Device, RunPath

if TYPE_CHECKING:
    import torch

    from cratelm.whitebox.circuit import CircuitConfig, PromptSubject


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `cratelm circuit`."""

    run: RunPath
    """Run directory: from `cratelm train`, or of a Hugging Face model after `cratelm collect`."""
    prompt: str
    """Text before the token."""
    token: str | None = None
    """Target token, with its leading space if it has one, or its id as #17; by default the most probable one."""
    nodes: int = 6
    """Neurons of each layer to show."""
    method: Literal["ablation", "gradient", "integrated"] = "ablation"
    """Choose nodes by exact ablation, or by a gradient: at the code, or averaged between baseline and code."""
    baseline: Literal["zero", "mean"] = "zero"
    """Value of an ablated neuron; mean is its mean over the text of its records."""
    candidates: int = 512
    """Most nodes to ablate per layer, those with the largest gradients; 0 for all active ones."""
    batch: int = 64
    """Ablations per forward pass."""
    out: Path | None = None
    """Folder for graph and numbers; RUN/circuits by default."""
    device: Device = "auto"


def run(options: Options) -> None:
    """Find the circuit, write it, draw it, print it."""
    from cratelm.report.figures.circuit import circuit_figure, circuit_lines
    from cratelm.report.figures.form import write_figures
    from cratelm.whitebox.circuit import CircuitConfig, rank

    check_least(options, 1, "nodes", "batch")
    check_least(options, 0, "candidates")
    opened = open_model(options.run, options.device, expected="run")
    subject = _subject(opened, options)
    config = CircuitConfig(
        nodes=options.nodes, method=options.method, candidates=options.candidates, batch=options.batch
    )
    with progress_bar(f"circuit {options.run.name}", total=_work(subject, config), unit="nodes") as bar:
        ranked = rank(subject, config, bar=bar)
    circuit = {
        "prompt": options.prompt, "method": options.method, "baseline": options.baseline,
        "candidates": options.candidates, "model_hash": opened.model_hash,
        **_described(opened, subject, ranked, config), "origin": origin(),
    }  # fmt: skip
    out = options.out or options.run / "circuits"
    name = _name(options, circuit["target"])
    write_json(out / f"{name}.json", circuit)
    write_figures({name: circuit_figure(circuit, options.run.name)}, out)
    columns = shutil.get_terminal_size().columns
    for line in circuit_lines(circuit):
        print(line if len(line) <= columns else f"{line[: columns - 1]}…")
    print(f"\n{out / name}.svg")


def _subject(opened: OpenModel, options: Options) -> "PromptSubject":
    import torch

    from cratelm.whitebox.circuit import PromptSubject

    causal = opened.causal
    prompt, places = torch.tensor(opened.prompt(options.prompt), device=causal.device), causal.places()
    target = -1 if options.token is None else opened.one_token(options.token)
    baselines = _means(options.run, places) if options.baseline == "mean" else None
    subject = PromptSubject(opened.model, places, prompt, max(target, 0), baselines)
    if target < 0:
        with torch.no_grad():
            subject = PromptSubject(opened.model, places, prompt, int(subject.logits(1)[0].argmax()), baselines)
    if not math.isfinite(subject.full):
        raise CrateError(
            f"the log probability after the prompt is {subject.full}, so shares of it are undefined. "
            "Use another prompt or model"
        )
    return subject


def _means(run: Path, places: Mapping[int, str]) -> "dict[int, torch.Tensor]":
    import torch

    from cratelm.activations.records import read_records

    return {layer: torch.from_numpy(read_records(run, layer).statistics["mean"].copy()) for layer in places}


def _work(subject: "PromptSubject", config: "CircuitConfig") -> int:
    """Largest number of nodes to ablate."""
    sizes = (code.numel() for code in subject.codes.values())
    return sum(min(size, config.candidates or size) for size in sizes)


def _described(
    opened: OpenModel, subject: "PromptSubject",
    ranked: Mapping[tuple[int, int, int], float], config: "CircuitConfig",
) -> dict[str, Any]:  # fmt: skip
    """Nodes, edges and shares, as written to JSON."""
    from cratelm.whitebox.circuit import choose, edges, explained

    strings, prompt = opened.strings, subject.prompt.tolist()
    chosen = choose(ranked, config)
    explanations = {layer: opened.explanations(layer) for layer in {layer for layer, _, _ in chosen}}
    nodes = [
        {
            "layer": layer, "position": position, "neuron": neuron, "effect": ranked[layer, position, neuron],
            "code": float(subject.codes[layer][0, position, neuron]), "token": strings[prompt[position]],
            "explanation": explanations[layer].get(neuron),
        }
        for layer, position, neuron in chosen
    ]  # fmt: skip
    return {
        "tokens": [strings[token] for token in prompt], "target": strings[subject.target],
        "target_id": subject.target, "ranked": len(ranked), "layers": sorted(subject.codes), "nodes": nodes,
        "edges": edges(subject, {node: ranked[node] for node in chosen}, config),
        "explained": explained(subject, list(ranked), chosen),
    }  # fmt: skip


def _name(options: Options, target: str) -> str:
    """File name from the prompt's words, the token and a digest of the settings."""
    settings = (options.prompt, target, options.nodes, options.method, options.baseline, options.candidates)
    return result_name(f"{options.prompt[-30:]} {target}", settings)
