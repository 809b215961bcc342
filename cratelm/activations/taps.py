"""Read or edit activations at named places of a model, without changes to its `forward`.

A tap is the path of any submodule, as in `named_modules()`; its value is the module's output, or with `:input` after
the path the module's first argument. A `LanguageModel` lists the taps of its neurons (`model.neuron_taps`).
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cratelm.errors import CrateError

Edit = Callable[[Tensor], Tensor]

INPUT = ":input"
"""Suffix of a tap that is a module's input."""


@contextlib.contextmanager
def capture(model: nn.Module, taps: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward pass inside the block fills with the value of every tap.

    A later pass replaces the values of an earlier pass. A capture entered inside an `edit` sees the edited tensor. A
    capture entered before the `edit` sees the original, unless the edit changes the tensor in place.
    """
    outputs: dict[str, Tensor] = {}

    def keeper(tap: str) -> Edit:
        def keep(value: Tensor) -> Tensor:
            outputs[tap] = value
            return value

        return keep

    with contextlib.ExitStack() as stack:
        for tap in taps:
            stack.callback(_hook(model, tap, keeper(tap)))
        yield outputs


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace the value of each tap by a function of it, inside the block: `{tap: lambda code: ...}`.

    The function gets the tensor that the module made (or reads), (batch, seq, neurons) for a code, and returns one of
    the same shape; it may change it in place.
    """

    def checked(tap: str, change: Edit) -> Edit:
        def replace(value: Tensor) -> Tensor:
            shape = value.shape
            changed = change(value)
            if changed.shape != shape:
                raise CrateError(f"the edit of {tap} must keep the shape {tuple(shape)}, got {tuple(changed.shape)}")
            return changed

        return replace

    with contextlib.ExitStack() as stack:
        for tap, change in edits.items():
            stack.callback(_hook(model, tap, checked(tap, change)))
        yield


def find_tap(model: nn.Module, tap: str) -> nn.Module:
    """The submodule of a tap. Raises CrateError, with similar names, if the model does not have it."""
    # A ModuleList has no output.
    modules = {name: part for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)}
    path = tap.removesuffix(INPUT)
    if path not in modules:
        raise CrateError(f"the model has no module {path!r}. Similar: {near(path, modules)}")
    return modules[path]


def near(wanted: str, names: Iterable[str]) -> str:
    """A few names for an error message: those similar to the wanted name, else the first ones."""
    names = list(names)
    return ", ".join(difflib.get_close_matches(wanted, names, n=4, cutoff=0.6) or names[:12])


def _hook(model: nn.Module, tap: str, change: Edit) -> Callable[[], None]:
    """Replace the value of a tap by `change` of it, until the returned function is called.

    Hugging Face modules may return a tuple whose first part is the tensor, and may be called with keywords.
    """

    def on_output(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    def on_input(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            return (change(inputs[0]), *inputs[1:]), named
        first = next(iter(named))
        return inputs, named | {first: change(named[first])}

    module = find_tap(model, tap)
    if tap.endswith(INPUT):
        return module.register_forward_pre_hook(on_input, with_kwargs=True).remove
    return module.register_forward_hook(on_output).remove
