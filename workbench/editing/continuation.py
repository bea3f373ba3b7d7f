"""Run only the blocks, and only the tokens, that an edit can change."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import transformers

from workbench.activations import calls, hidden, recorded, replaced, stop_after
from workbench.models import Model
from workbench.positions import Encoded


class _Past(transformers.DynamicCache):
    """Keys and values of the tokens that never change.

    Once `fixed`, later tokens see them and leave nothing behind.
    """

    fixed = False

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if not self.fixed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)

    def of(self, rows: torch.Tensor | slice, first: int) -> "_Past":
        """The same for some of the rows, from one layer on."""
        some = copy.copy(self)
        some.layers = [copy.copy(layer) for layer in self.layers]
        for number, layer in enumerate(some.layers):
            at = rows if isinstance(rows, slice) or number < first else rows.to(layer.keys.device)
            layer.keys, layer.values = (
                (layer.keys[at], layer.values[at]) if number >= first else (None, None)
            )
        return some


class Continuation:
    """The network after one block, ready to run again from other hidden states of the same rows.

    Attributes:
        start: hidden states (r, length, d_model) that go into the next block, of the tokens from
            `begin` on.
        seen: the tensors of the modules in `outputs` and `inputs`, (r, length, d), of the same
            tokens.
        begin: (r,) first token of each row that may change; 0 without `begin`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Model,
        encoded: Encoded,
        layer: int,
        begin: torch.Tensor | None = None,
        last: int | None = None,
        outputs: dict | None = None,
        inputs: dict | None = None,
    ):
        """One pass of the network over the rows remembers how each later block was called.

        Args:
            layer: block after which to go on; -1 = before the first.
            begin: (r,) >= 1, tokens before these never change: their keys and values are computed
                once and kept.
            last: the last block that will be needed; default all.
            outputs, inputs: key -> module, to be recorded in `seen` on the way.
        """
        self.model, self.layer = model, layer
        self.last = model.n_blocks - 1 if last is None else last
        later = {number: model.blocks[number] for number in range(layer + 1, self.last + 1)}
        self.begin = (
            torch.zeros(len(encoded.input_ids), dtype=torch.long) if begin is None else begin
        ).to(model.device)
        self.past = _Past()
        arguments = (
            _after(model, encoded, self.begin, self.past)
            if begin is not None
            else encoded.to(model.device).arguments()
        )
        with (
            calls(later) as self.calls,
            recorded({"at": model.blocks[max(layer, 0)]} | (outputs or {})) as out,
            recorded(inputs or {}, inputs=True) as taken,
            stop_after(model.blocks[self.last]),
        ):
            model.network(**arguments, logits_to_keep=1, use_cache=begin is not None)
        at = out.pop("at")
        self.start = (self.calls[layer + 1][0][0] if later else at).to(model.device)
        self.calls = {number: (args[1:], kwargs) for number, (args, kwargs) in self.calls.items()}
        self.past = self.past.of(slice(None), layer + 1)
        shape = self.start.shape[:2]
        self.seen = {
            key: tensor.view(*shape, tensor.shape[-1]).to(model.device)
            for key, tensor in (out | taken).items()
        }

    def through(self, state: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Hidden states after block `last`, from those before block `first`."""
        for number in range(first, last + 1):
            args, kwargs = self.calls[number]
            state = hidden(self.model.blocks[number](state, *args, **kwargs))
        return state.to(self.model.device)  # under a device map the block may be on another GPU

    def logits(self, state: torch.Tensor, row: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Logits (k, vocab), float32, after token at[i] of row[i], of rows with `state` (r, length,
        d_model) after the block.
        """
        state = self.through(state, self.layer + 1, self.model.n_blocks - 1)
        return (
            self.model.unembedding(self.model.final_norm(state[row, at - self.begin[row]]))
            .float()
            .to(self.model.device)
        )

    def of(self, rows: torch.Tensor) -> "Continuation":
        """The same for some of the rows (indices), with nothing in `seen`."""
        count = len(self.begin)

        def chosen(value):
            if isinstance(value, tuple):
                return tuple(map(chosen, value))
            if isinstance(value, _Past):
                return past
            return (
                value[rows]
                if isinstance(value, torch.Tensor) and value.ndim > 1 and len(value) == count
                else value
            )

        past = self.past.of(rows, self.layer + 1)
        some = copy.copy(self)
        some.begin, some.start, some.past, some.seen = self.begin[rows], self.start[rows], past, {}
        some.calls = {
            number: (chosen(args), {name: chosen(value) for name, value in kwargs.items()})
            for number, (args, kwargs) in self.calls.items()
        }
        return some


def _after(model: Model, encoded: Encoded, begin: torch.Tensor, past: _Past) -> dict:
    """Put the tokens before `begin` into `past`; the arguments of a call with the tokens from there
    on.

    Rows are laid out anew around `begin`: earlier tokens end in one column, later ones start in the
    next; positions are explicit.
    """
    encoded = encoded.to(model.device)
    lengths = encoded.lengths
    before, after = int(begin.max()), int((lengths - begin).max())
    column = (
        torch.arange(before + after, device=model.device) - before + begin[:, None]
    )  # token of each column, (r, columns)
    mask = (column >= 0) & (column < lengths[:, None])
    token = column.clamp(min=0).minimum(lengths[:, None] - 1)
    ids = encoded.input_ids.gather(1, token)
    first, rest = slice(None, before), slice(before, None)
    known = {"past_key_values": past, "use_cache": True, "logits_to_keep": 1}
    model.network(
        input_ids=ids[:, first],
        attention_mask=mask[:, first].long(),
        position_ids=token[:, first],
        **known,
    )
    past.fixed = True
    return {
        "input_ids": ids[:, rest],
        "attention_mask": mask.long(),
        "position_ids": token[:, rest],
        "past_key_values": past,
    }


@contextmanager
def changed(
    model: Model, factors: Mapping[int, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """Inside, each layer's down-projection also adds its D k, differentiable in the factors (left,
    right) of D = left @ right.T.
    """

    def adding(left, right):
        return lambda out, key: (
            out + ((key.float() @ right.to(key.device)) @ left.T.to(key.device)).to(out.dtype)
        )

    with ExitStack() as stack:
        for layer, (left, right) in factors.items():
            stack.enter_context(replaced(model.down_projection(layer), adding(left, right)))
        yield
