"""The solver's numbers, what it evaluates and when it stops, how it parts the requests; its
solutions are in test_against_plain.
"""

import itertools
import random

import pydantic
import pytest
import torch

from workbench.activations import recorded
from workbench.editing import target_vectors
from workbench.editing.rows import Rows, build_rows, sample_prefixes
from workbench.editing.target_vectors import Solving
from workbench.facts import BadInput
from workbench.positions import Encoded, encode, statement
from workbench.tracking.retention import measure_prompts


def solve(model, requests, prefixes=(), layer=1, **numbers):
    hparams = Solving(**({"layers": (layer,), "steps": 3, "stop_loss": 0.0} | numbers))
    return target_vectors.solve(model, requests, layer, "mlp", prefixes, hparams)


def test_the_defaults_are_those_that_rome_published_for_gpt2_xl():
    assert Solving(layers=(17,)).model_dump() == {
        "layers": (17,),
        "steps": 20,
        "learning_rate": 0.5,
        "weight_decay": 0.5,
        "clamp": 4.0,
        "kl_weight": 0.0625,
        "stop_loss": 0.05,
        "patience": 0,
        "prefixes": 20,
        "moment_tokens": 0,
        "optimiser": "adam",
        "convention": "published",
    }


@pytest.mark.parametrize(
    ("name", "fits", "too_small"),
    [
        ("steps", 1, 0),
        ("learning_rate", 1e-9, 0),
        ("weight_decay", 0, -1e-9),
        ("clamp", 1e-9, 0),
        ("kl_weight", 0, -1e-9),
        ("stop_loss", 0, -1e-9),
        ("patience", 0, -1),
        ("prefixes", 0, -1),
        ("moment_tokens", 0, -1),
    ],
)
def test_numbers_have_bounds(name, fits, too_small):
    assert getattr(Solving(layers=(1,), **{name: fits}), name) == fits
    with pytest.raises((BadInput, pydantic.ValidationError), match=name):
        Solving(layers=(1,), **{name: too_small})


def test_before_the_first_step_loss_and_p_are_those_of_the_model(tiny, requests):
    """The loss is a mean over the bare prompt and the prefixed ones, a target's tokens alike; p is
    of them all, when bare.
    """
    prefixes = ("A short text", "Another")
    found = solve(tiny, requests, prefixes, steps=1, convention="reference")
    several = 0
    for number, request in enumerate(requests):
        nlls, counts = [], []
        for lead in ("", *(f"{prefix}. " for prefix in prefixes)):
            question = lead + request.fact.question
            encoded = encode(tiny, [statement(question, request.target)])
            places = torch.tensor(encoded.tokens_from(0, len(question)))
            log_probs = (
                tiny.network(input_ids=encoded.input_ids).logits[0, places - 1].log_softmax(-1)
            )
            counts.append(len(places))
            nlls.append(-log_probs.gather(1, encoded.input_ids[0, places][:, None]).mean())
        several += len(places) > 1
        nlls = torch.stack(nlls)
        assert found.loss[number].item() == pytest.approx(nlls.mean().item(), rel=1e-4)
        bare = (-nlls[0] * counts[0]).exp().item()
        assert found.p_target[number].item() == pytest.approx(bare, rel=1e-4)
    assert several
    assert found.steps.tolist() == [0] * len(requests)


def test_a_fact_stops_below_the_stop_loss_not_at_it(tiny, requests):
    losses = solve(tiny, requests, steps=1, convention="reference").loss
    for number, loss in enumerate(losses.tolist()):
        taken = solve(tiny, requests, stop_loss=loss).steps
        assert taken[number] > 0
        assert taken[losses < loss].tolist() == [0] * number_below(losses, loss)


def number_below(losses, loss):
    return sum(other < loss for other in losses.tolist())


def test_a_target_on_top_does_not_stop_a_fact_unless_patience_says_so(tiny, requests):
    questions = [request.fact.question for request in requests]
    top = measure_prompts(
        tiny, questions, [request.target for request in requests], past_stop_words=False
    ).top_token
    said = [
        request.model_copy(update={"target": word})
        for request, word in zip(requests, top, strict=True)
    ]
    numbers = {"steps": 5, "learning_rate": 1e-4}
    assert solve(tiny, said, **numbers).steps.tolist() == [5] * len(said)
    stopped = solve(tiny, said, **numbers, patience=2).steps
    assert (stopped == 1).any()  # on top from the start: two evaluations, one update
    assert set(stopped.tolist()) <= {1, 5}


def test_the_kl_is_read_only_where_it_counts(tiny, requests, monkeypatch):
    asked, build = [], target_vectors.build_rows

    def watched(*given, kl):
        asked.append(kl)
        return build(*given, kl=kl)

    monkeypatch.setattr(target_vectors, "build_rows", watched)
    for weight in (0.0, 0.01):
        solve(tiny, requests[:1], steps=1, kl_weight=weight)
    assert asked == [False, True]


def test_a_layer_that_is_not_there_is_one_clear_line(tiny, requests, one_line):
    with pytest.raises(BadInput) as error:
        solve(tiny, requests, layer=3)
    assert "blocks 0 to 2" in one_line(error)


@pytest.mark.parametrize(("stop_loss", "updates"), [(0.0, [1, 1, 1, 1, 0]), (1e9, [1, 3])])
def test_the_progress_bar_ends_full(tiny, requests, monkeypatch, stop_loss, updates):
    """At each evaluation one step further; what early stopping spares is added when a chunk is
    done.
    """
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n, self.updates = total, 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, by=1):
            self.n += by
            self.updates.append(by)

    monkeypatch.setattr(target_vectors, "tqdm", Bar)
    monkeypatch.setattr(target_vectors, "tokens_at_once", lambda model: 1)
    solve(tiny, requests, steps=3, stop_loss=stop_loss)
    (bar,) = bars
    assert bar.updates == updates * len(requests)
    assert bar.n == bar.total


def test_a_solution_is_split_in_order():
    numbers = torch.arange(5)
    whole = target_vectors.Solution(
        shift=numbers[:, None].repeat(1, 3),
        loss=numbers + 10,
        p_target=numbers + 20,
        steps=numbers + 30,
    )
    parts = whole.split([2, 0, 3])
    assert [part.loss.tolist() for part in parts] == [[10, 11], [], [12, 13, 14]]
    assert [part.p_target.tolist() for part in parts] == [[20, 21], [], [22, 23, 24]]
    assert [part.steps.tolist() for part in parts] == [[30, 31], [], [32, 33, 34]]
    assert [part.shift.shape for part in parts] == [(2, 3), (0, 3), (3, 3)]


def rows_of(before: list[list[int]], later: list[list[int]]) -> Rows:
    """For each request the tokens before the subject's last one, and from it on, of each of its
    rows.
    """
    owner = torch.tensor([number for number, own in enumerate(before) for _ in own])
    subject = torch.tensor([length for own in before for length in own])
    lengths = subject + torch.tensor([length for own in later for length in own])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    encoded = Encoded(input_ids=mask, attention_mask=mask, offsets=())
    return Rows(encoded=encoded, owner=owner, subject=subject, labels=mask, is_kl=subject < 0)


def test_a_chunk_is_closed_where_it_is_full_or_large_enough_and_nowhere_else(monkeypatch):
    """Requests by the longest of their rows, from the subject on; all rows of a chunk are padded to
    the longest of both parts.
    """
    monkeypatch.setattr(target_vectors, "WORTHWHILE", 40)
    rng, full, unlike = random.Random(0), 0, 0
    for _ in range(100):
        most = rng.randrange(20, 200)
        counts = [rng.randint(1, 4) for _ in range(rng.randint(1, 30))]
        before = [[rng.randint(0, 6) for _ in range(count)] for count in counts]
        later = [[rng.randint(1, 12) for _ in range(count)] for count in counts]
        longest = [max(own) for own in later]

        def size(requests, counts=counts, before=before, longest=longest):
            rows = sum(counts[request] for request in requests)
            return rows * (
                max(max(before[request]) for request in requests)
                + max(longest[request] for request in requests)
            )

        def is_unlike(request, chunk, size=size, longest=longest):
            return size(chunk) > 40 and longest[request] > 1.25 * longest[chunk[0]]

        chunks = target_vectors._chunks(rows_of(before, later), most)
        assert all(chunk.tolist() == sorted(chunk.tolist()) for chunk in chunks)
        chunks = [sorted(chunk.tolist(), key=longest.__getitem__) for chunk in chunks]
        order = sorted(range(len(counts)), key=longest.__getitem__)
        assert [request for chunk in chunks for request in chunk] == order
        for chunk, following in zip(chunks, [*chunks[1:], None], strict=True):
            assert size(chunk) <= most or len(chunk) == 1
            assert not any(is_unlike(chunk[place], chunk[:place]) for place in range(1, len(chunk)))
            if following:
                assert size([*chunk, following[0]]) > most or is_unlike(following[0], chunk)
                full += size([*chunk, following[0]]) > most
                unlike += size([*chunk, following[0]]) <= most
    assert full > 50
    assert unlike > 50


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_many_facts_at_once_get_the_vectors_they_would_get_alone(tiny, requests, optimiser):
    prefixes = sample_prefixes(tiny, 3, seed=1)
    numbers = {"steps": 6, "optimiser": optimiser, "weight_decay": 0.0}
    together = solve(tiny, requests, prefixes, **numbers)
    for number, request in enumerate(requests):
        alone = solve(tiny, [request], prefixes, **numbers)
        assert torch.allclose(together.shift[number], alone.shift[0], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.shift[0], together.shift[1], atol=1e-2)


def test_chunks_do_not_change_the_solution(tiny, requests, monkeypatch):
    whole = solve(tiny, requests, steps=6)
    monkeypatch.setattr(target_vectors, "tokens_at_once", lambda model: 1)
    assert torch.allclose(solve(tiny, requests, steps=6).shift, whole.shift, rtol=1e-3, atol=1e-4)


def test_no_chunk_holds_more_tokens_than_it_may_with_padding(tiny, requests):
    long = requests[0].model_copy(
        update={"fact": requests[0].fact.model_copy(update={"prompt": "and so on " * 20 + "{} is"})}
    )
    rows = build_rows(tiny, [*requests, long], sample_prefixes(tiny, 3, seed=1), kl=True)
    chunks = target_vectors._chunks(rows, 500)
    assert torch.cat(chunks).sort().values.tolist() == list(range(rows.n))
    assert max(map(len, chunks)) > 1
    for chunk in chunks:
        some = rows.select(chunk)
        size = len(some.owner) * int(
            some.subject.max() + (some.encoded.lengths - some.subject).max()
        )
        assert size <= 500 or len(chunk) == 1


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_facts_that_stop_leave_those_that_go_on_as_they_would_be_alone(tiny, requests, optimiser):
    numbers = {"steps": 12, "optimiser": optimiser, "weight_decay": 0.0, "clamp": 30.0}
    losses = solve(tiny, requests, **numbers | {"steps": 4}).loss
    numbers["stop_loss"] = losses.sort().values[2:4].mean().item()  # on nobody's edge
    together = solve(tiny, requests, **numbers)
    alone = [solve(tiny, [request], **numbers) for request in requests]
    assert together.steps.tolist() == [int(solution.steps) for solution in alone]
    assert len(set(together.steps.tolist())) > 2
    for number, solution in enumerate(alone):
        assert torch.allclose(together.shift[number], solution.shift[0], rtol=1e-3, atol=1e-3)
        assert together.loss[number].item() == pytest.approx(solution.loss.item(), abs=1e-3)


def test_lbfgs_gives_the_best_of_what_it_read(tiny, requests, monkeypatch):
    """A step too far is of no use: it counts, but neither shift, loss nor p are those after it."""
    monkeypatch.setattr(target_vectors, "RADIUS", 1000.0)
    far = {"optimiser": "lbfgs", "clamp": 1000.0, "weight_decay": 1e-3}
    solutions = [solve(tiny, requests, steps=steps, **far) for steps in range(1, 9)]
    stood = 0
    for steps, (before, after) in enumerate(itertools.pairwise(solutions), 2):
        assert after.steps.tolist() == [steps] * len(requests)
        assert (after.loss <= before.loss + 1e-5).all()
        same = (after.shift == before.shift).all(1)
        for name in ("loss", "p_target"):
            now, then = getattr(after, name), getattr(before, name)
            assert torch.allclose(now[same], then[same], rtol=1e-4, atol=0)
            assert not torch.isclose(now[~same], then[~same], rtol=1e-6, atol=0).any()
        stood += int(same.sum())
    assert stood
    assert (solutions[-1].loss < solutions[0].loss).all()


def test_a_fact_stops_by_itself_below_the_stop_loss(tiny, requests):
    first = solve(tiny, requests, steps=1, convention="reference").loss  # one evaluation, no update
    bound = first.sort().values[1:3].mean().item()  # two facts are below it from the start
    solution = solve(tiny, requests, steps=3, stop_loss=bound)
    assert (solution.steps[first < bound] == 0).all()
    assert (solution.shift[first < bound] == 0).all()
    assert (solution.steps[first >= bound] > 0).all()


@pytest.mark.parametrize("optimiser", ["adam", "lbfgs"])
def test_the_shift_stays_within_the_clamp(tiny, requests, optimiser):
    numbers = {"steps": 6, "clamp": 0.6, "optimiser": optimiser, "weight_decay": 0.0}
    solution = solve(tiny, requests, **numbers)
    rows = build_rows(tiny, requests)
    with recorded({"mlp": tiny.mlp(1)}) as record:
        tiny.network(**rows.encoded.arguments())
    v0 = record["mlp"][torch.arange(len(requests)), rows.subject].norm(dim=1)
    assert (solution.shift.norm(dim=1) <= 0.6 * v0 * (1 + 1e-5)).all()
    assert torch.allclose(solution.shift.norm(dim=1), 0.6 * v0, rtol=0.05)  # all wish to go on
