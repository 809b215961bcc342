"""Check the tensors of records before anything depends on their names, types and shapes."""

from collections.abc import Mapping

import numpy as np

STATISTIC_NAMES = ("density", "mean", "variance", "skewness", "kurtosis", "maximum", "minimum")
WINDOW_NAMES = ("tokens", "span_position", "span_offset", "document_position", "document_split")


def problem_of_windows(arrays: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the tensors of windows.safetensors; empty if nothing is."""
    for name in WINDOW_NAMES:
        if name not in arrays or arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
            return f"it must have the tensor {name} with one dimension of whole numbers"
    spans = len(arrays["span_position"]) == len(arrays["span_offset"]) > 0
    documents = len(arrays["document_position"]) == len(arrays["document_split"])
    return "" if spans and documents else "spans and documents must have a position each"


def problem_of_layer(arrays: Mapping[str, np.ndarray]) -> str:
    """What is wrong with the tensors of a layer; empty if nothing is."""
    absent = [name for name in STATISTIC_NAMES if name not in arrays or arrays[name].ndim != 1]
    if absent:
        return f"it must have the tensor {absent[0]} with one number per neuron"
    neurons = len(arrays["density"])
    for name, values in arrays.items():
        if values.shape[:1] != (neurons,) or values.dtype.kind not in "iuf":
            return f"{name} must have {neurons} rows of numbers, got {values.dtype} {values.shape}"
        group, _, part = name.rpartition(".")
        if part == "position" and group:
            others = [arrays.get(f"{group}.{other}", np.empty(0)) for other in ("length", "activation")]
            width = int(group.split(".")[0]) if group.split(".")[0].isdecimal() and group.count(".") == 2 else -1
            fits = [values.ndim == 2, others[0].shape == values.shape, others[1].shape == (*values.shape, width)]
            if not all(fits) or "f" in (values.dtype.kind, others[0].dtype.kind):
                return f"{group} must have position, length and activation of the same excerpts"
    return ""
