"""The types of the fields that readers of the JSON files depend on; `docs/formats.md` describes all fields.

A type is a Python type, a dictionary of fields (`...` is every other field), `[items]`, or a tuple of alternatives. A
field that may be None may be missing, and fields that are not named here are ignored, so newer files stay readable.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "checksum"
"""Field of our JSON files: `checksum_of` the others."""

_TEXT, _WHOLE, _NUMBER, _OBJECT = (str, None), (int, None), (float, None), (dict, None)
_MEAN = {"mean": float}
_STEPS = ({...: _MEAN}, None)
_BY_PROJECTION = ({"before": {...: _MEAN}, "after": {...: _MEAN}}, None)
_LOSS: dict[Any, Any] = {
    "split": _TEXT, "nats_per_token": _NUMBER, "standard_error": _NUMBER, "perplexity": _NUMBER,
    "bits_per_byte": _NUMBER, "tokens": _WHOLE, "documents": _WHOLE, "data_hash": _TEXT,
}  # fmt: skip
_WORD = ({"accuracy": _NUMBER, "standard_error": _NUMBER, "perplexity": _NUMBER, "passages": _WHOLE}, None)
_ZERO_SHOT = ({...: {**_LOSS, "last_word": _WORD}}, None)
_OF_SAE = {
    "sae_hash": str, "layer": int, "tokens": int, "ce": float, "ce_mean": float, "ce_unigram": float,
    "ce_added": float, "fvu": _NUMBER, "kept_model": _NUMBER, "recovered_mean": _NUMBER, "parameters": _WHOLE,
}  # fmt: skip
_DICTIONARY = {
    "stability": [float], "squared_norm": float, "coherence": float, "mean_coherence": float, "atom_norm": [float],
}  # fmt: skip
_LAYER = {
    "layer": int, "rate": ({"before": _MEAN, "after": _MEAN}, None), "orthonormal_rate": _BY_PROJECTION,
    "normalised_rate": _BY_PROJECTION, "rate_reduction": ({...: {...: _MEAN}}, None), "sparse_objective": _STEPS,
    "objective": _STEPS, "objective_at_zero": (_MEAN, None), "active": {...: _MEAN}, "hoyer": {...: _MEAN},
    "support_overlap": _STEPS, "reconstruction_error": _STEPS, "dead": float, "converged": _NUMBER, "penalty": _NUMBER,
    "dictionary": (_DICTIONARY, None),
}  # fmt: skip
_POINT = {
    "dial": str, "tokens": _WHOLE, "penalty": float, "step_size": float, "steps": _WHOLE, "threshold": float,
    "loss": _NUMBER, "active": ([float], None), "lookup": {"points": _NUMBER, "scored": _NUMBER},
}  # fmt: skip
_TAP = {"layers": [int], "sae_hash": _TEXT, "signed": (bool, None)}
_SPLIT = {"tokens": int, "documents": _WHOLE, "text_bytes": _WHOLE, "sha256": _TEXT}

JSON_FIELDS: dict[str, Any] = {
    "run.json": {
        "name": _TEXT, "arch": _TEXT, "model": ({"num_layers": _WHOLE, "context_length": _WHOLE}, None),
        "parameters": _WHOLE, "flops_per_token": _WHOLE,
        "control": _TEXT, "of": _TEXT, "source": _TEXT, "imported": _OBJECT, "begin_of_text": ([int], None),
        "training": ({"tokens": _WHOLE, "batch_tokens": _WHOLE, "seed": _WHOLE}, None),
        "origin": ({"date": _TEXT, "command": _TEXT, "machine": _TEXT, "python": _TEXT, "versions": _OBJECT}, None),
    },
    "metrics.jsonl": {"step": int, "tokens": _WHOLE, "loss": _NUMBER, "held_out_loss": _NUMBER},
    "evaluation.json": (
        {**_LOSS, "zero_shot": _ZERO_SHOT}, {"nats_per_token": None, "ce": None, "zero_shot": _ZERO_SHOT}, _OF_SAE,
    ),
    "records.json": {
        "tokens": _WHOLE, "documents": _WHOLE, "num_layers": _WHOLE, "per_quantile": _WHOLE, "model_hash": _TEXT,
        "data_hash": _TEXT, "tokenizer_hash": _TEXT, "mode": _TEXT, "taps": ({...: _TAP}, [str], None),
        "row_beginning": ({"rows": str, "tokens": [int]}, None),
    },
    "tokens.json": {
        "tokenizer": str, "tokenizer_hash": str, "tokenizer_sha256": _TEXT, "end_of_text": int,
        "vocab_size": int, "dtype": str,
        "splits": {...: _SPLIT}, "source": {"settings": _OBJECT}, "begin_of_text": ([int], None),
    },
    "explore.json": {"tokens": _WHOLE, "minutes": float, "layer": [int]},
    "whitebox.json": {"layers": [_LAYER], "tokens_per_set": int, "sets": int},
    "dial.json": {"width": int, "tokens": _WHOLE, "points": [_POINT]},
    "directions.json": {
        "layers": {...: [str]}, "model_hash": _TEXT, "tokenizer_hash": _TEXT, "row_beginning": ([int], None),
    },
    "sae.json": {
        "tap": _TEXT, "layer": _WHOLE, "kind": _TEXT, "training_flops": _NUMBER, "parameters": _WHOLE,
        "settings": ({"model_hash": _TEXT}, None), "origin": _OBJECT,
    },
    "checkpoint.json": {"step": int, "settings": _OBJECT, "held_out_loss": _NUMBER},
    "export.json": {"mode": _TEXT},
    "model.safetensors.index.json": {"weight_map": {...: str}},
    "pytorch_model.bin.index.json": {"weight_map": {...: str}},
    "encoder.json": {...: int},
    "vocab.json": {...: int},
    "gguf.json": {"quantization": _TEXT, "conversion": _WHOLE},
    "checksums.json": {"sha256": ({...: [str]}, None)},
    "ablation.jsonl": {
        "neurons": [str], "kind": str, "nats": float, "standard_error": _NUMBER, "density": _NUMBER,
    },
}  # fmt: skip
"""Name of a file -> its fields."""


def checksum_of(value: Mapping[str, Any]) -> str:
    """A hash of the fields of a JSON object, apart from `checksum`; their order does not count."""
    fields = {name: field for name, field in value.items() if name != CHECKSUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def mismatch(value: Any, expected: Any, where: str = "") -> str:
    """The first field of a value that does not have its type, in words; empty if all have theirs."""
    if isinstance(expected, tuple):
        problems = [mismatch(value, alternative, where) for alternative in expected]
        return "" if "" in problems else problems[0]
    if expected is None or isinstance(expected, type):
        number = isinstance(value, int) and not isinstance(value, bool)
        if expected in (int, float) and number:
            fits = abs(value) < 1 << 63
        else:
            fits = value is None if expected is None else expected is not int and isinstance(value, expected)
        return "" if fits else f"{where} must be {_KINDS[expected]}, got {shortened(repr(value))}"
    if not isinstance(value, type(expected)):
        return f"{where or 'it'} must be {_KINDS[type(expected)]}, got {shortened(repr(value))}"
    if isinstance(expected, list):
        parts = [(f"{where}[{index}]", item, expected[0]) for index, item in enumerate(value)]
    else:
        names = value if ... in expected else expected
        parts = [(f"{where}.{key}".lstrip("."), value.get(key), expected.get(key, expected.get(...))) for key in names]
    return next((problem for name, item, kind in parts if (problem := mismatch(item, kind, name))), "")


_KINDS: dict[Any, str] = {
    None: "null", int: "a whole number", float: "a number", str: "a text", dict: "an object", list: "a list",
    bool: "true or false",
}  # fmt: skip


def shortened(error: object) -> str:
    """The beginning of a text, on one line."""
    return " ".join(str(error).split())[:100]
