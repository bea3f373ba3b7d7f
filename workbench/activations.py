"""Record or replace what modules put out (or take in), for the length of a `with`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import torch
from torch import Tensor, nn


def hidden(output) -> Tensor:
    """A block's hidden states (n, length, d); some architectures put them first in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def recorded(modules: Mapping, inputs: bool = False) -> AbstractContextManager[dict]:
    """A dict that holds, under each module's key, the output (or input) of its last call.

    Args:
        modules: key -> module.
        inputs: record what goes in, not what comes out.
    """
    if inputs:
        return _kept(modules, "register_forward_pre_hook", _first)
    return _kept(modules, "register_forward_hook", lambda args, kwargs, output: hidden(output))


def calls(modules: Mapping) -> AbstractContextManager[dict]:
    """A dict that holds, under each module's key, the (args, kwargs) of its last call."""
    return _kept(modules, "register_forward_pre_hook", lambda args, kwargs: (args, kwargs))


@contextmanager
def _kept(modules: Mapping, register: str, value: Callable) -> Iterator[dict]:
    """A dict of the value of each module's last call, by a hook of this kind."""
    record: dict = {}

    with ExitStack() as stack:
        for key, module in modules.items():

            def hook(module, *call, key=key):
                record[key] = value(*call)

            stack.enter_context(getattr(module, register)(hook, with_kwargs=True))
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
def replaced(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the module puts out `change(output, input)`.

    The change must return a new tensor, not write into its arguments.
    """

    def hook(module, args, kwargs, output):
        changed = change(hidden(output), _first(args, kwargs))
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    with module.register_forward_hook(hook, with_kwargs=True):
        yield


def put(places: Tensor, values: Tensor, output: Tensor, _: Tensor) -> Tensor:
    """A change, of an output for b texts, (b, length, d) or their tokens on end: the values (b, d)
    at one place of each.
    """
    changed = output.view(len(places), -1, output.shape[-1]).clone()
    changed[torch.arange(len(places)), places] = values.to(changed)
    return changed.view_as(output)


def _first(args: tuple, kwargs: dict) -> Tensor:
    """What a module takes in, named (`hidden_states=`) or not."""
    return args[0] if args else next(iter(kwargs.values()))
