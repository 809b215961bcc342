"""Read or edit a model at named places, with no change to its `forward`.

A tap is the path of any submodule, as in `named_modules()`; what it gives is that module's output, or with `:input`
after the path what the module reads: its first argument. A model names the taps of its neurons itself
(`model.neuron_taps`).
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from cratelm.errors import CrateError

Edit = Callable[[Tensor], Tensor]

INPUT = ":input"
"""Ends the name of a tap that is what a module reads."""


@contextlib.contextmanager
def capture(model: nn.Module, taps: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward pass inside the block fills with what every tap gives.

    A later pass replaces what an earlier one left. A capture entered inside an `edit` sees the edited tensor; one
    entered before it sees the module's own, unless the edit changes that in place.
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
    """Replace what each tap gives by a function of it, inside the block: `{tap: lambda code: ...}`.

    The function gets the tensor that the module made (or reads), (batch, seq, neurons) for a code, and returns one of
    the same shape; it may change it in place.
    """

    def checked(tap: str, change: Edit) -> Edit:
        def replace(value: Tensor) -> Tensor:
            shape = value.shape
            changed = change(value)
            if changed.shape != shape:
                raise CrateError(
                    f"the edit of {tap} returned a shape of {tuple(changed.shape)}, it must stay {tuple(shape)}"
                )
            return changed

        return replace

    with contextlib.ExitStack() as stack:
        for tap, change in edits.items():
            stack.callback(_hook(model, tap, checked(tap, change)))
        yield


def find_tap(model: nn.Module, tap: str) -> nn.Module:
    """The submodule that a tap is about; a name that matches nothing is an error that lists names near it."""
    # A ModuleList is only a shelf: it has no output.
    modules = {name: part for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)}
    path = tap.removesuffix(INPUT)
    if path not in modules:
        raise CrateError(f"the model has no module {path!r} to tap; there are, for example: {near(path, modules)}")
    return modules[path]


def near(wanted: str, names: Iterable[str]) -> str:
    """Some of the names, those like the wanted one if there are any, as a user reads them."""
    there = list(names)
    return ", ".join(difflib.get_close_matches(wanted, there, n=4, cutoff=0.6) or there[:12])


def _hook(model: nn.Module, tap: str, change: Edit) -> Callable[[], None]:
    """Pass what a tap gives through a function until the returned one is called.

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
