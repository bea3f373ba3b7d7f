"""Record or replace what modules put out (or take in), for the length of a `with`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn


def hidden(output) -> torch.Tensor:
    """A block's hidden states (n, length, d); some architectures put them first in a tuple."""
    return output if isinstance(output, torch.Tensor) else output[0]


@contextmanager
def recorded(modules: Mapping, inputs: bool = False) -> Iterator[dict]:
    """A dict that holds, under each module's key, the output (or input) of its last call.

    Args:
        modules: key -> module.
        inputs: record what goes in, not what comes out.
    """
    record: dict = {}

    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(module, args, kwargs, output, key=key):
                record[key] = _first(args, kwargs) if inputs else hidden(output)

            stack.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        yield record


@contextmanager
def calls(modules: Mapping) -> Iterator[dict]:
    """A dict that holds, under each module's key, the (args, kwargs) of its last call."""
    record: dict = {}

    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(module, args, kwargs, key=key):
                record[key] = (args, kwargs)

            stack.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield record


class _Enough(Exception):
    """The module that was waited for has run."""


@contextmanager
def stop_after(module: nn.Module) -> Iterator[None]:
    """Inside, a call of the network ends once the module has run, and the `with` with it."""

    def hook(module, args, output):
        raise _Enough

    with suppress(_Enough), module.register_forward_hook(hook):
        yield


@contextmanager
def replaced(
    module: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Iterator[None]:
    """Inside, the module puts out `change(output, input)`.

    The change must return a new tensor, not write into its arguments.
    """

    def hook(module, args, kwargs, output):
        changed = change(hidden(output), _first(args, kwargs))
        return changed if isinstance(output, torch.Tensor) else (changed, *output[1:])

    with module.register_forward_hook(hook, with_kwargs=True):
        yield


def _first(args: tuple, kwargs: dict) -> torch.Tensor:
    """What a module takes in, named (`hidden_states=`) or not."""
    return args[0] if args else next(iter(kwargs.values()))
