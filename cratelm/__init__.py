"""cratelm: white-box language models, and how interpretable their neurons are.

The names below are the public surface (`docs/python.md`); each is imported when it is first used, so `import cratelm`
costs nothing and loads neither torch nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cratelm.activations.records import Excerpt, LayerRecords, NeuronRecord, read_records
    from cratelm.activations.taps import capture, edit
    from cratelm.errors import CrateError
    from cratelm.interpretation.explainers.explanation import Explanation
    from cratelm.interpretation.protocols import Protocol
    from cratelm.interpretation.scoring.correlation import Score
    from cratelm.interpretation.simulators.simulation import Simulation
    from cratelm.model.weights import load

__version__ = "0.1.0"

__all__ = [
    "CrateError",
    "Excerpt",
    "Explanation",
    "LayerRecords",
    "NeuronRecord",
    "Protocol",
    "Score",
    "Simulation",
    "__version__",
    "capture",
    "edit",
    "load",
    "read_records",
]

_HOME = {
    "CrateError": "cratelm.errors",
    "Excerpt": "cratelm.activations.records",
    "Explanation": "cratelm.interpretation.explainers.explanation",
    "LayerRecords": "cratelm.activations.records",
    "NeuronRecord": "cratelm.activations.records",
    "Protocol": "cratelm.interpretation.protocols",
    "Score": "cratelm.interpretation.scoring.correlation",
    "Simulation": "cratelm.interpretation.simulators.simulation",
    "capture": "cratelm.activations.taps",
    "edit": "cratelm.activations.taps",
    "load": "cratelm.model.weights",
    "read_records": "cratelm.activations.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cratelm' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOME.keys())
