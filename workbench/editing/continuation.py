"""Run only the blocks, and only the tokens, that an edit can change."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map

from workbench.activations import calls, hidden, recorded, replaced, stop_after
from workbench.closed_form import Factors
from workbench.editing.rows import Answers
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
        past = self.layers[layer_idx]
        keys = torch.cat([past.keys, key_states], -2)
        return keys, torch.cat([past.values, value_states], -2)

    def select(self, rows: Tensor) -> "_Past":
        """A copy of some of the rows."""
        selected = copy.copy(self)
        selected.layers = [copy.copy(layer) for layer in self.layers]
        selected.batch_select_indices(rows)
        return selected


class Continuation:
    """The network after one block, ready to run again from other hidden states of the same rows.

    Attributes:
        start: hidden states (r, length, d_model) that go into the next block, of the tokens from
            `begin` on.
        begin: (r,) first token of each row that may change; 0 without `begin`.
    """

    @torch.no_grad()
    def __init__(
        self, model: Model, texts: Encoded, layer: int, begin: Tensor | None = None, last: int = -1
    ):
        """One pass of the network over the rows remembers how each later block was called.

        Args:
            layer: block after which to go on; -1 = before the first.
            begin: (r,) >= 1, tokens before these never change: their keys and values are computed
                once and kept.
            last: the last block that will be needed; -1 = that of the model.
        """
        texts = texts.to(model.device)
        self.model = model
        self.layer = layer
        self.past = _Past()
        self.begin = torch.zeros_like(texts.lengths)
        arguments = texts.arguments()
        if begin is not None:
            self.begin = begin.to(model.device)
            arguments = _run_before(model, texts, self.begin, self.past)
        last = range(model.n_blocks)[last]
        later = {number: model.blocks[number] for number in range(layer + 1, last + 1)}
        state = recorded({"state": model.blocks[max(layer, 0)]})
        with calls(later) as block_calls, state as record, stop_after(model.blocks[last]):
            model.network(**arguments, logits_to_keep=1, use_cache=begin is not None)
        start = block_calls[layer + 1][0][0] if later else record["state"]
        self.start = start.to(model.device)
        self.calls = {number: (args[1:], kwargs) for number, (args, kwargs) in block_calls.items()}
        for past in self.past.layers[: layer + 1]:
            past.reset()

    def through(self, state: Tensor, first: int, last: int) -> Tensor:
        """Hidden states after block `last`, from those before block `first`."""
        for number in range(first, last + 1):
            args, kwargs = self.calls[number]
            state = hidden(self.model.blocks[number](state, *args, **kwargs))
        return state.to(self.model.device)  # under a device map the block may be on another GPU

    def logits(self, state: Tensor, row: Tensor, place: Tensor) -> Tensor:
        """Logits (k, vocab), float32, after token place[i] of row[i], of rows with `state` (r,
        length, d_model) after the block.
        """
        state = self.through(state, self.layer + 1, self.model.n_blocks - 1)
        state = self.model.final_norm(state[row, place - self.begin[row]])
        return self.model.unembedding(state).float().to(self.model.device)

    def answer_logits(self, answers: Answers) -> Tensor:
        """Logits (m, vocab) where the answers' tokens are read, of the rows as they are."""
        return self.logits(self.start, answers.row, answers.place)

    def select(self, rows: Tensor) -> "Continuation":
        """The same for some of the rows (indices on the CPU)."""
        count = len(self.begin)
        past = self.past.select(rows)

        def of_rows(value):
            if value is self.past:
                return past
            has_rows = isinstance(value, Tensor) and value.ndim > 1 and len(value) == count
            return value[rows] if has_rows else value

        selected = copy.copy(self)
        selected.past = past
        selected.begin = self.begin[rows]
        selected.start = self.start[rows]
        selected.calls = tree_map(of_rows, self.calls)
        return selected


def _run_before(model: Model, texts: Encoded, begin: Tensor, past: _Past) -> dict:
    """Put the tokens before `begin` into `past`; the arguments of a call with the tokens from there
    on.

    Rows are laid out anew around `begin`: earlier tokens end in one column, later ones start in the
    next; positions are explicit.
    """
    lengths = texts.lengths[:, None]
    before = int(begin.max())
    after = int((lengths - begin[:, None]).max())
    token = torch.arange(-before, after, device=model.device) + begin[:, None]  # (r, columns)
    mask = ((token >= 0) & (token < lengths)).long()
    token = token.clamp(min=0).minimum(lengths - 1)
    ids = texts.input_ids.gather(1, token)
    known = {"past_key_values": past, "attention_mask": mask[:, :before], "logits_to_keep": 1}
    model.network(ids[:, :before], position_ids=token[:, :before], use_cache=True, **known)
    past.fixed = True
    later = {"input_ids": ids[:, before:], "position_ids": token[:, before:]}
    return later | {"attention_mask": mask, "past_key_values": past}


@contextmanager
def changed(model: Model, factors: Mapping[int, Factors]) -> Iterator[None]:
    """Inside, each layer's down-projection also adds its D k, differentiable in the factors of
    D = left @ right.T.
    """

    with ExitStack() as stack:
        for layer, (left, right) in factors.items():

            def change(out, key, left=left, right=right):
                along = key.float() @ right.to(key.device)
                return out + (along @ left.T.to(key.device)).to(out.dtype)

            stack.enter_context(replaced(model.down_projection(layer), change))
        yield


def at(output: Tensor, places: Tensor) -> Tensor:
    """What a module gave for b rows, (b, length, d) or their tokens on end, at one place of each
    row: (b, d).
    """
    output = output.view(len(places), -1, output.shape[-1])
    return output[torch.arange(len(places)), places]
