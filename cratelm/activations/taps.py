"""Read or edit a model at named places, with no change to its `forward`.

A tap is the path of any submodule, as in `named_modules()`; what it gives is that module's output. A model names the
taps of its neurons itself (`model.neuron_taps`).
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

from cratelm.errors import CrateError

Edit = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def capture(model: nn.Module, taps: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that each forward pass inside the block fills with the output of every tap.

    A later pass replaces what an earlier one left. A capture entered inside an `edit` sees the edited output; one
    entered before it sees the module's own, unless the edit changes that in place.
    """
    outputs: dict[str, Tensor] = {}

    def keeper(tap: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            outputs[tap] = output

        return keep

    with contextlib.ExitStack() as stack:
        for tap in taps:
            stack.callback(find_tap(model, tap).register_forward_hook(keeper(tap)).remove)
        yield outputs


@contextlib.contextmanager
def edit(model: nn.Module, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace the output of each tap by a function of it, inside the block: `{tap: lambda code: ...}`.

    The function gets the tensor that the module made, (batch, seq, neurons) for a code, and returns one of the same
    shape; it may change it in place.
    """

    def replacer(tap: str, change: Edit) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            changed = change(output)
            if changed.shape != output.shape:
                raise CrateError(
                    f"the edit of {tap} returned a shape of {tuple(changed.shape)}, it must stay {tuple(output.shape)}"
                )
            return changed

        return replace

    with contextlib.ExitStack() as stack:
        for tap, change in edits.items():
            stack.callback(find_tap(model, tap).register_forward_hook(replacer(tap, change)).remove)
        yield


def find_tap(model: nn.Module, tap: str) -> nn.Module:
    """The submodule of that name; a name that matches nothing is an error that lists names near it."""
    # A ModuleList is only a shelf: it has no output.
    modules = {name: part for name, part in model.named_modules() if name and not isinstance(part, nn.ModuleList)}
    if tap not in modules:
        near = difflib.get_close_matches(tap, modules, n=3, cutoff=0.5) or list(modules)[:12]
        raise CrateError(f"the model has no module {tap!r} to tap; there are, for example: {', '.join(near)}")
    return modules[tap]
