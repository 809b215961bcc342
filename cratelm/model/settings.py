"""Fields of a `ModelConfig` as a user writes them: FIELD=VALUE."""

import dataclasses
import json
from typing import Any, get_args

from cratelm.errors import CrateError
from cratelm.model.config import ModelConfig


def field_value(text: str, key: str, value: str) -> Any:
    """The value of a field of `ModelConfig`, checked against its type; `text` is what the user wrote."""
    known = {one.name: one.type for one in dataclasses.fields(ModelConfig)}
    if key not in known:
        raise CrateError(f"variant {text!r}: a model has no field {key!r} (it has {', '.join(known)})")
    try:
        found = json.loads(value)
    except json.JSONDecodeError:
        found = value
    if known[key] is float and type(found) is int:
        found = float(found)
    choices = get_args(known[key])
    if found in choices or type(found) is known[key] or any(type(found) is choice for choice in choices):
        return found
    wanted = " or ".join(map(str, choices)) or getattr(known[key], "__name__", str(known[key]))
    raise CrateError(f"variant {text!r}: {key} is {value!r}, it must be {wanted}")
