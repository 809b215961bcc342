"""Whole numbers as a person writes them: 1_228_800, 200k, 8.2M, 1G. Every count on the command line is parsed here."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry

FACTORS = {"k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


def whole_number(text: str) -> int:
    """`8.2M` -> 8200000, `1_000` -> 1000; a `ValueError` says how to write one."""
    match = re.fullmatch(r"(-?\d[\d_]*)(?:(?:\.(\d+))?([kKMG]))?", text)
    if match is None:
        raise ValueError(f"{text!r} is not a whole number. Write one such as 200000, 200k, 8.2M or 1G")
    factor = FACTORS.get(match[3] or "", 1)
    return int(match[1]) if factor == 1 else round(float(f"{match[1]}.{match[2] or 0}") * factor)


def registry() -> "ConstructorRegistry":
    """The tyro registry with which the command line reads every whole number."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> "PrimitiveConstructorSpec[int] | None":
        if info.type is not int:
            return None
        return PrimitiveConstructorSpec(
            nargs=1, metavar="INT", instance_from_str=lambda given: whole_number(given[0]),
            is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
            str_from_instance=lambda value: [str(value)],
        )  # fmt: skip

    return registry
