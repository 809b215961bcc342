"""Fields of a `ModelConfig` as a user writes them: FIELD=VALUE."""

import dataclasses
import json
from typing import Any, get_args

from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig


def field_value(text: str, key: str, value: str) -> Any:
    """The value of a field of `ModelConfig`, checked against its type; `text` is what the user wrote."""
    known = {field.name: field.type for field in dataclasses.fields(ModelConfig)}
    if key not in known:
        raise CrateError(f"variant {text!r}: a model has no field {key!r} (it has {', '.join(known)})")
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError:
        parsed = value
    if known[key] is float and type(parsed) is int:
        parsed = float(parsed)
    choices = get_args(known[key])
    if parsed in choices or type(parsed) is known[key] or any(type(parsed) is choice for choice in choices):
        return parsed
    wanted = " or ".join(map(str, choices)) or getattr(known[key], "__name__", str(known[key]))
    raise CrateError(f"variant {text!r}: {key} must be {wanted}, got {value!r}")
