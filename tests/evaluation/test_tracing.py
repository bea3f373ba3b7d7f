import pytest
import torch

from workbench import facts
from workbench.evaluation import tidy, tracing
from workbench.positions import front
from workbench.tracking.retention import measure


@pytest.fixture(scope="module")
def requests(world):
    pool = [one for one in facts.read("world") if one.fact.split == "study"][:8]
    known = measure(world, pool, against="object").retained
    return [one for one, good in zip(pool, known, strict=True) if good][:4]


def plain(model, requests, samples, window):
    """The same by hand: one fact and one drawing of the noise at a time."""
    embeddings, blocks = model.network.get_input_embeddings(), range(model.n_blocks)
    deviation = embeddings.weight.std()
    rows = [_plain_ids(model, request) for request in requests]
    longest = max(len(ids) + answer for ids, *_, answer in rows)
    generator = torch.Generator().manual_seed(0)
    width = model.unembedding.weight.shape[1]
    noise = torch.randn(len(rows) * samples, longest, width, generator=generator)
    expected = {}
    for number, (ids, first, end, token, _) in enumerate(rows):
        name = requests[number].fact.id
        kept = {}
        hooks = [
            model.mlp(layer).register_forward_hook(_keeper(kept, layer, end)) for layer in blocks
        ]
        expected[name, "clean"] = _p(model, ids, token)
        _remove(hooks)
        for layer in [None, *blocks]:
            inside = (
                {layer - window // 2 + step for step in range(window)} if layer in blocks else {}
            )
            total = 0.0
            for sample in range(samples):
                added = noise[number * samples + sample] * tracing.SPREAD * deviation
                hooks = [embeddings.register_forward_hook(_corrupter(added, first, end))]
                for block in [block for block in blocks if block in inside]:
                    hooks.append(
                        model.mlp(block).register_forward_hook(_restorer(kept[block], end))
                    )
                total += _p(model, ids, token) / samples
                _remove(hooks)
            if layer is None:
                expected[name, "corrupted"] = total
            else:
                expected[name, f"restored_{layer}"] = total - expected[name, "corrupted"]
    return expected


def _keeper(kept, layer, end):
    return lambda _, __, output: kept.update({layer: output[0, end].clone()})


def _corrupter(added, first, end):
    def corrupt(_, __, output):
        output = output.clone()
        output[0, first : end + 1] += added[first : end + 1]
        return output

    return corrupt


def _restorer(value, end):
    def restore(_, __, output):
        output = output.clone()
        output[0, end] = value
        return output

    return restore


def _remove(hooks):
    for hook in hooks:
        hook.remove()


def _plain_ids(model, request):
    """Tokens of the prompt, first and last of the subject, the answer's first, their number."""
    fact, lead = request.fact, len(front(model))
    whole = model.tokenizer(
        f"{fact.question} {fact.object}", add_special_tokens=False, return_offsets_mapping=True
    )
    ids, offsets = [*front(model), *whole["input_ids"]], whole["offset_mapping"]
    begins = fact.prompt.index("{}")
    ends = begins + len(fact.subject)
    inside = [n for n, (start, end) in enumerate(offsets) if end > begins and start < ends]
    answer = next(n for n, (_, end) in enumerate(offsets) if end > len(fact.question))
    cut = lead + answer
    return ids[:cut], lead + inside[0], lead + inside[-1], ids[cut], len(ids) - cut


@torch.no_grad()
def _p(model, ids, token) -> float:
    return model.network(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)[token].item()


def test_effects_are_those_of_a_plain_loop(world, requests, monkeypatch):
    monkeypatch.setattr(tracing, "SAMPLES", 2)
    table = (
        tidy("tracing", tracing.ask(world, requests))
        .set_index(["fact_id", "quantity"])
        .value.to_dict()
    )
    window = max(1, round(tracing.WINDOW * world.n_blocks))
    assert table == pytest.approx(plain(world, requests, 2, window), abs=2e-5)


def test_noise_hides_the_subject_and_effects_are_bounded(world, requests):
    table = tidy("tracing", tracing.ask(world, requests)).pivot(
        index="fact_id", columns="quantity", values="value"
    )
    assert (table.clean > 0.5).all()
    assert table.corrupted.mean() < table.clean.mean() / 2
    effects = table.filter(like="restored")
    assert effects.shape[1] == world.n_blocks
    assert effects.abs().le(1).all(axis=None)
