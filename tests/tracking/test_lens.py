import torch

from workbench import facts
from workbench.positions import encode
from workbench.tracking import lens
from workbench.tracking.probes import Probe, questions


def check_lens(model, prompt: str) -> None:
    encoded = encode(model, [prompt])
    with torch.no_grad():
        output = model.network(input_ids=encoded.input_ids, output_hidden_states=True)
        states = [
            state[0, -1] for state in output.hidden_states[1:]
        ]  # the last entry is already normed
        oracle = [
            model.unembedding(model.final_norm(state)).softmax(0) for state in states[:-1]
        ] + [model.unembedding(states[-1]).softmax(0)]
    found = lens.trajectory(model, prompt)
    assert found.probs.shape == (model.n_blocks, len(oracle[0]))
    for layer, row in enumerate(oracle):
        assert torch.allclose(found.probs[layer], row, atol=1e-6), layer
    assert torch.allclose(found.probs[-1], output.logits[0, -1].softmax(0), atol=1e-6)
    assert not torch.allclose(found.probs[0], oracle[1], atol=1e-6)  # an off-by-one would show
    assert len(found.tokens) == encoded.input_ids.shape[1]


def test_every_layer_is_the_final_norm_and_head_of_its_hidden_state(tiny):
    check_lens(tiny, facts.read("world")[3].fact.question)


def test_every_layer_of_a_world_model(world):
    check_lens(world, facts.read("world")[3].fact.question)


def test_a_look_at_many_prompts_reads_what_each_gives_alone(tiny):
    requests = facts.read("world")[:200:40]
    tokens = Probe(tiny, questions([], requests)).look(-1).tokens
    for request in requests:
        alone = lens.trajectory(tiny, request.fact.question).probs.topk(10).values.flatten()
        together = tokens[tokens.fact_id == request.fact.id].probability
        assert torch.allclose(torch.tensor(together.to_numpy()).float(), alone, atol=1e-4)
