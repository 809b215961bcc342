"""A made-up run directory with planted neurons, for tests that begin where `collect` ends. No model is involved.

Per layer, by index: neuron 0 is dead, 1 fires in two documents only, 2 has one value everywhere, 3 is noise; all
others are token neurons, which fire on a few tokens of their own (a lookup finds them), with a little noise.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cratelm import rundir
from cratelm.activations.records import ABSENT, layer_file, records_folder

DEAD, RARE, CONSTANT, NOISE, FIRST_TOKEN_NEURON = range(5)
WIDTHS = {64: 5, 8: 11}
"""Tokens of an excerpt -> number of quantile intervals."""
END = "<|endoftext|>"
SENTENCE = (
    "the neuron code of a layer fires when it reads return or def and then class import from while for in sparse "
    "rate reduction compresses tokens onto subspaces; 1 2 3 ( ) : = + \n \t\t café → naïve river boats beach"
)
WORDS = SENTENCE.split(" ")


def make_tokenizer(vocab: int = 320) -> Tokenizer:
    """A real byte-level BPE of a few sentences; `<|endoftext|>` is its last token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator([SENTENCE] * 4, trainer)
    tokenizer.add_special_tokens([END])
    return tokenizer


def make_run(
    path: Path, rng: np.random.Generator, *, name: str = "crate-2l", layers: int = 2, neurons: int = 12,
    vocab: int = 320, control: str | None = None, mode: str = "fixed", documents: int = 90,
) -> Path:  # fmt: skip
    """Write run.json, metrics.jsonl, evaluation.json and the records of one mode under `path`; returns `path`."""
    tokenizer = make_tokenizer(vocab)
    texts = [rng.choice(WORDS, size=int(rng.integers(30, 90))).tolist() for _ in range(documents)]
    end = tokenizer.encode(END).ids
    encoded = [tokenizer.encode(" ".join(words)).ids + end for words in texts]
    tokens = np.concatenate(encoded).astype(np.int64)
    starts = np.cumsum([0, *map(len, encoded[:-1])]).astype(np.int64)
    vocab = tokenizer.get_vocab_size()
    _write_run_files(path, rng, name=name, layers=layers, neurons=neurons, vocab=vocab, control=control)
    folder = records_folder(path, mode)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    split = (np.arange(documents) % 2 if mode == "fixed" else np.zeros(documents)).astype(np.int64)
    save_file(
        {
            "tokens": tokens.astype(np.uint16), "span_position": np.zeros(1, np.int64),
            "span_offset": np.zeros(1, np.int64), "document_position": starts, "document_split": split,
        },
        folder / "windows.safetensors", metadata={"format_version": "1"},
    )  # fmt: skip
    for layer in range(layers):
        activations = plant(rng, tokens, starts, neurons, trained=control is None)
        arrays = _moments(activations) | (_fixed if mode == "fixed" else _compat)(rng, activations, starts, split)
        file = layer_file(path, mode, "neurons", layer)  # type: ignore[arg-type]
        file.parent.mkdir(exist_ok=True)
        save_file(arrays, file, metadata={"format_version": "1"})
    collection = {"model_hash": f"model-{rng.integers(2**32)}", "data_hash": "data", "taps": ["neurons"], "seed": 0}
    counts = {"mode": mode, "tokens": len(tokens), "documents": documents, "num_layers": layers}
    rundir.write_json(folder / "records.json", {**collection, **counts, "origin": rundir.origin()})
    return path


def plant(
    rng: np.random.Generator, tokens: Int[np.ndarray, " tokens"], starts: Int[np.ndarray, " documents"], neurons: int,
    *, trained: bool = True,
) -> Float[np.ndarray, "neurons tokens"]:  # fmt: skip
    """Activations of each neuron on each token; without `trained` the token neurons are noise too."""
    activations = np.zeros((neurons, len(tokens)), dtype=np.float32)
    for i in range(neurons):
        noise = np.maximum(rng.normal(-1.5, 1.0, len(tokens)), 0)
        if i == RARE:
            activations[i, [starts[4] + 1, starts[5] + 1]] = 1.0
        elif i == CONSTANT:
            activations[i] = 0.5
        elif i == NOISE or (i != DEAD and not trained):
            activations[i] = noise
        elif i != DEAD:
            liked = rng.choice(np.unique(tokens), size=5, replace=False)
            strength = np.zeros(tokens.max() + 1)
            strength[liked] = rng.uniform(2, 5, size=5)
            activations[i] = strength[tokens] + 0.1 * noise
    return activations


def _moments(activations: Float[np.ndarray, "neurons tokens"]) -> dict[str, np.ndarray]:
    wide = activations.astype(np.float64)
    mean, variance = wide.mean(1), wide.var(1)
    scaled = (wide - mean[:, None]) / np.sqrt(np.maximum(variance, 1e-12))[:, None]
    moments = {
        "density": (wide > 0).mean(1), "mean": mean, "variance": variance, "skewness": (scaled**3).mean(1),
        "kurtosis": (scaled**4).mean(1), "maximum": wide.max(1), "minimum": wide.min(1),
    }  # fmt: skip
    return {name: values.astype(np.float32) for name, values in moments.items()}


def _fixed(
    rng: np.random.Generator, activations: Float[np.ndarray, "neurons tokens"],
    starts: Int[np.ndarray, " documents"], split: Int[np.ndarray, " documents"],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Excerpts as `collect` leaves them in `fixed` mode: cut inside documents, explaining and scoring ones apart."""
    ends = np.append(starts[1:], activations.shape[1])
    arrays: dict[str, np.ndarray] = {}
    for width, intervals in WIDTHS.items():
        for number, part in enumerate(("explain", "score")):
            spans = [
                (position, min(width, ends[d] - position), d)
                for d in np.flatnonzero(split == number)
                for position in range(starts[d], ends[d], width)
            ]
            position, length, document = np.array(spans).T
            strongest = np.array([activations[:, p : p + n].max(1) for p, n in zip(position, length, strict=True)]).T
            for kind, chosen in _choose(rng, strongest, document, intervals, 20 if width == 64 else 25).items():
                arrays |= _cut(f"{width}.{part}.{kind}", chosen, position, length, activations, width)
    return arrays


def _choose(
    rng: np.random.Generator, strongest: Float[np.ndarray, "neurons spans"], document: Int[np.ndarray, " spans"],
    intervals: int, tops: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Indices of spans per kind, `ABSENT` where there are too few."""
    neurons, spans = strongest.shape
    top = np.full((neurons, tops), ABSENT)
    quantile = np.zeros((neurons, 2 * intervals), dtype=np.int64)
    for i, values in enumerate(strongest):
        order = np.argsort(-values, kind="stable")
        order = order[values[order] > 0]
        _, first = np.unique(document[order], return_index=True)
        best = order[np.sort(first)][:tops]
        top[i, : len(best)] = best
        levels = np.array_split(np.argsort(values, kind="stable"), intervals)
        quantile[i] = np.concatenate([rng.choice(level, size=2, replace=False) for level in levels])
    random = np.stack([rng.choice(spans, size=10, replace=False) for _ in range(neurons)])
    return {"top": top, "random": random, "quantile": quantile}


def _compat(
    rng: np.random.Generator, activations: Float[np.ndarray, "neurons tokens"],
    _starts: Int[np.ndarray, " documents"], _split: Int[np.ndarray, " documents"],
) -> dict[str, np.ndarray]:  # fmt: skip
    """Excerpts of the released procedure: centred on single tokens of the corpus, clipped at its two ends only."""
    neurons, count = activations.shape
    order = np.argsort(-activations, axis=1, kind="stable")
    arrays: dict[str, np.ndarray] = {}
    for width, intervals in WIDTHS.items():
        levels = np.array_split(order[:, ::-1], intervals, axis=1)
        chosen = {
            "top": order[:, :50], "random": rng.integers(count, size=(neurons, 50)),
            "quantile": np.concatenate([level[:, rng.permutation(level.shape[1])[:20]] for level in levels], axis=1),
        }  # fmt: skip
        position = np.maximum(np.arange(count) - width // 2, 0)
        length = np.minimum(np.arange(count) + width // 2, count) - position
        for kind, indices in chosen.items():
            arrays |= _cut(f"{width}.all.{kind}", indices, position, length, activations, width)
    return arrays


def _cut(
    name: str, chosen: Int[np.ndarray, "neurons excerpts"], position: Int[np.ndarray, " spans"],
    length: Int[np.ndarray, " spans"], activations: Float[np.ndarray, "neurons tokens"], width: int,
) -> dict[str, np.ndarray]:  # fmt: skip
    there = chosen != ABSENT
    where = np.where(there, position[chosen], ABSENT)
    lengths = np.where(there, length[chosen], 0)
    inside = np.arange(width) < lengths[..., None]
    index = np.where(inside, where[..., None] + np.arange(width), 0)
    values = np.where(inside, activations[np.arange(len(chosen))[:, None, None], index], 0)
    return {
        # Copied in C order: safetensors writes memory as it lies.
        f"{name}.position": where.astype(np.int64, order="C"), f"{name}.length": lengths.astype(np.int16, order="C"),
        f"{name}.activation": values.astype(np.float32, order="C"),
    }  # fmt: skip


def _write_run_files(
    path: Path, rng: np.random.Generator, *, name: str, layers: int, neurons: int, vocab: int, control: str | None
) -> None:
    model = {
        "arch": name.split("-")[0], "num_layers": layers, "d_model": max(neurons // 4, 1), "num_heads": 1,
        "num_neurons": neurons, "vocab_size": vocab, "context_length": 256,
    }  # fmt: skip
    origin = rundir.origin()
    rundir.write_json(path / "run.json", {
        "name": name if control is None else f"{name}-random", "arch": model["arch"], "control": control,
        "of": None if control is None else name, "model": model, "parameters": 1_234_567, "flops_per_token": 2_345_678,
        "training": {"tokens": 64_000, "seed": 0} if control is None else None, "origin": origin,
    })  # fmt: skip
    loss = float(rng.uniform(3, 4)) if control is None else float(np.log(vocab))
    if control is None:
        for step in range(10):
            rundir.append_jsonl(path / "metrics.jsonl", {
                "step": step, "tokens": 6400 * (step + 1), "loss": loss + 3 / (step + 1),
                "learning_rate": 1e-3, "tokens_per_second": 5e3,
            })  # fmt: skip
        rundir.append_jsonl(path / "metrics.jsonl", {"step": 9, "tokens": 64_000, "held_out_loss": loss})
    rundir.write_json(path / "evaluation.json", {
        "split": "val", "nats_per_token": loss, "standard_error": 0.02, "perplexity": float(np.exp(loss)),
        "bits_per_byte": loss / np.log(2) / 3, "tokens": 9_000, "documents": 90, "origin": origin,
    })  # fmt: skip
