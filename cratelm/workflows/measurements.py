"""Measurements during training (`cratelm train --measure`): lookup scores, generated text, white-box view.

The command passes them to the training as functions, so that `training/` does not import interpretation.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from cratelm.activations.collect import collect
from cratelm.activations.observe import observe
from cratelm.activations.plan import CollectConfig
from cratelm.activations.records import read_records
from cratelm.activations.subject import Corpus, Subject
from cratelm.data.tokens import TokenDirectory
from cratelm.errors import CrateError
from cratelm.interpretation.lookup.explain import explain_layer
from cratelm.interpretation.lookup.simulate import simulate_layer
from cratelm.interpretation.protocols import protocol
from cratelm.interpretation.scoring.correlation import score_layer
from cratelm.model.language_model import LanguageModel
from cratelm.rundir import append_jsonl, rewind_jsonl
from cratelm.runtime import ProgressBar
from cratelm.training.config import MeasurementName
from cratelm.training.train import Measurement
from cratelm.whitebox.coding_rate import tokens_needed
from cratelm.whitebox.measure import MeasureConfig, logged_numbers
from cratelm.whitebox.measure import measure as measure_layers

SAMPLE_TOKENS, SAMPLE_DOCUMENTS = 65_536, 96
"""Minimum of held-out tokens and documents that `lookup` reads, from the beginnings of documents.

96 documents: half of them must hold the 25 from which the top excerpts of a neuron come."""
SAMPLE_NEURONS = 128
"""Neurons of each layer that `lookup` scores, the same ones each time."""
WHITEBOX_TOKENS = 4096
"""Held-out tokens that `whitebox` reads; more if one coding rate needs more."""
PROMPTS = ("", "The ")
"""Prompts of `samples`; the empty one begins a document."""
SAMPLE_LENGTH = 64


def measurements(names: tuple[MeasurementName, ...], data: TokenDirectory, run: Path) -> dict[str, Measurement]:
    """Name -> measurement, as `train` expects them."""
    made: dict[MeasurementName, Callable[[], Measurement]] = {
        "lookup": lambda: lookup(data),
        "samples": lambda: samples(data, run),
        "whitebox": lambda: whitebox(data),
    }
    return {name: made[name]() for name in dict.fromkeys(names)}


def lookup(data: TokenDirectory, *, neurons: int = SAMPLE_NEURONS) -> Measurement:
    """The lookup score of some neurons of every layer on a fixed sample of held-out text, in points.

    Runs `collect` and `interpret` on few tokens and neurons with one protocol, in a temporary folder. Returns `points`
    (the mean over layers), `layer_N` for each layer, and `scored`, the share of neurons that have a score.
    """
    corpus = _sample(data)

    def measure(model: LanguageModel, _step: int) -> Mapping[str, float]:
        subject = _some_neurons(model, neurons)
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder)
            bar = ProgressBar(Progress(disable=True), "lookup", 1)
            collect(CollectConfig(), subject, corpus, run, device=model.device, bar=bar)
            return _points(run, tuple(subject.layers), [""] * data.vocab_size)

    return measure


def samples(data: TokenDirectory, run: Path) -> Measurement:
    """Generate text into `samples.jsonl`; returns `distinct`, the share of tokens that are not repeats."""
    tokenizer = data.tokenizer()
    prompts = [[data.end_of_text, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in PROMPTS]

    def measure(model: LanguageModel, step: int) -> Mapping[str, float]:
        rewind_jsonl(run / "samples.jsonl", lambda row: row["step"] < step)  # a resumed run repeats some steps
        distinct = []
        for prompt in prompts:
            start = torch.tensor([prompt], device=model.device)
            made = model.generate(start, SAMPLE_LENGTH, temperature=0.8, seed=step)[0].tolist()
            distinct.append(len(set(made[len(prompt) :])) / SAMPLE_LENGTH)
            append_jsonl(run / "samples.jsonl", {"step": step, "text": tokenizer.decode(made)})
        return {"distinct": float(np.mean(distinct))}

    return measure


def whitebox(data: TokenDirectory) -> Measurement:
    """The white-box view of every layer on one cheap batch of held-out text: `layer_N.rate`, `layer_N.active`, ..."""

    def measure(model: LanguageModel, _step: int) -> Mapping[str, float]:
        size = tokens_needed(model.config.d_model, model.config.context_length)
        config = MeasureConfig(tokens=max(size, WHITEBOX_TOKENS), converged=False)
        bar = ProgressBar(Progress(disable=True), "whitebox", 1)
        view = measure_layers(model, data.tokens("val"), config, bar=bar)
        return {
            f"layer_{layer['layer']}.{name}": value for layer in view["layers"] for name, value in logged_numbers(layer)
        }

    return measure


def _sample(data: TokenDirectory) -> Corpus:
    """The beginnings of the first held-out documents, each closed by <|endoftext|>."""
    stream, longest = data.tokens("val"), SAMPLE_TOKENS // SAMPLE_DOCUMENTS
    parts: list[np.ndarray] = []
    first = taken = 0
    while (taken < SAMPLE_TOKENS or len(parts) < SAMPLE_DOCUMENTS) and first < len(stream):
        block = stream[first : first + (1 << 22)]
        ends = np.flatnonzero(block == data.end_of_text)
        after = int(ends[0]) + 1 if len(ends) else len(block)
        begun = np.array(block[: min(after - 1, longest)])
        parts.append(np.append(begun, np.array(data.end_of_text, dtype=begun.dtype)))
        first, taken = first + after, taken + len(parts[-1])
    if len(parts) < SAMPLE_DOCUMENTS * 3 // 4:
        raise CrateError(
            f"--measure lookup needs {SAMPLE_DOCUMENTS * 3 // 4} held-out documents, got {len(parts)} in {data.path}. "
            "Hint: tokenize with a larger --held-out"
        )
    documents = np.cumsum([0, *(len(part) for part in parts)]).astype(np.int64)
    return Corpus(
        tokens=np.concatenate(parts), documents=documents, end_of_text=data.end_of_text, identity={"split": "val"}
    )


def _some_neurons(model: LanguageModel, neurons: int) -> Subject:
    """The model as a `Subject` with only some neurons of each layer, evenly spaced."""

    subject, total = observe(model, model_hash=""), model.config.num_neurons
    count = min(neurons, total)
    index = torch.arange(count, device=model.device) * total // count

    def forward(tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        return {layer: code[..., index] for layer, code in subject.forward(tokens).items()}

    return replace(subject, forward=forward, layers=dict.fromkeys(subject.layers, count), decoders=None)


def _points(run: Path, layers: tuple[int, ...], strings: list[str]) -> dict[str, float]:
    excerpts, points, scored = protocol("top-and-random"), {}, []
    for layer in layers:
        records = read_records(run, layer)
        simulations = simulate_layer(records, excerpts, explain_layer(records, excerpts, strings))
        correlation = score_layer(records, excerpts, simulations).correlation
        defined = correlation[~np.isnan(correlation)]
        scored.append(len(defined) / len(correlation))
        if len(defined):
            points[f"layer_{layer}"] = 100 * float(defined.mean())
    mean = {"points": float(np.mean(list(points.values())))} if points else {}
    return points | {"scored": float(np.mean(scored))} | mean
