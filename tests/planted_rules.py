"""A run whose neurons follow rules that can be said in words (`rule_follower.py`), on a text made for them."""

from pathlib import Path

import numpy as np
import synthetic
from jaxtyping import Float
from rule_follower import RULES
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cratelm import rundir
from cratelm.activations.records import Mode, layer_file, records_folder
from cratelm.data.tokenizer import token_strings

TEXT = (
    "the rain ; a boat , snow (over) [it] {x} The River : 12 : 7 row: 3 at 40 Anna went , then wind : and hail ; "
    "storm café → naïve the 5 the end ."
)
WORDS = TEXT.split()
EXPLANATIONS = tuple(RULES)
"""What each neuron of the layer fires on, by its index."""


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE that knows the words of the text, but for the last letter of café and the arrow."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    known = " ".join(word for word in WORDS if word.isascii())
    tokenizer.train_from_iterator([known + " caf na ve"] * 4, trainer)
    tokenizer.add_special_tokens([synthetic.END])
    return tokenizer


def make_planted(path: Path, rng: np.random.Generator, *, mode: Mode = "fixed", documents: int = 120) -> Path:
    """Write a run of one layer, whose neuron i fires as the i-th rule says, in its own units, with a little noise."""
    tokenizer = make_tokenizer()
    texts = ["\n\t".join(" ".join(rng.choice(WORDS, size=15)) for _ in range(2)) for _ in range(documents)]
    end = tokenizer.encode(synthetic.END).ids
    encoded = [tokenizer.encode(text).ids + end for text in texts]
    tokens = np.concatenate(encoded).astype(np.int64)
    starts = np.cumsum([0, *map(len, encoded[:-1])]).astype(np.int64)
    synthetic._write_run_files(
        path, rng, name="crate-1l", layers=1, neurons=len(RULES), vocab=tokenizer.get_vocab_size(), control=None
    )
    folder = records_folder(path, mode)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    split = (np.arange(documents) % 2 if mode == "fixed" else np.zeros(documents)).astype(np.int64)
    save_file(
        {
            "tokens": tokens.astype(np.uint16), "span_position": np.zeros(1, np.int64),
            "span_offset": np.zeros(1, np.int64), "document_position": starts, "document_split": split,
        },
        folder / "windows.safetensors", metadata={"format_version": "1"},
    )  # fmt: skip
    activations = fire(rng, encoded, tokenizer)
    arrays = synthetic._moments(activations) | getattr(synthetic, f"_{mode}")(rng, activations, starts, split)
    file = layer_file(path, mode, "neurons", 0)
    file.parent.mkdir()
    save_file(arrays, file, metadata={"format_version": "1"})
    rundir.write_json(folder / "records.json", {
        "model_hash": "planted", "data_hash": "data", "taps": ["neurons"], "seed": 0, "mode": mode,
        "tokens": len(tokens), "documents": documents, "num_layers": 1, "origin": rundir.origin(),
    })  # fmt: skip
    return path


def fire(
    rng: np.random.Generator, documents: list[list[int]], tokenizer: Tokenizer
) -> Float[np.ndarray, "neurons tokens"]:
    """What the rules say of every token of every document, scaled differently for each neuron."""
    strings = token_strings(tokenizer)
    rows = []
    for rule in RULES.values():
        scale = rng.uniform(0.1, 3)
        told = [rule([strings[token] for token in ids], i) for ids in documents for i in range(len(ids))]
        values = np.array(told, dtype=np.float32)
        rows.append(scale * np.maximum(values + rng.normal(0, 0.3, len(values)) * (values > 0), 0))
    return np.array(rows, dtype=np.float32)
