"""C = E[k k'] is what a plain loop over the same tokens finds; it is collected once and kept under
a fingerprint of all that it depends on.
"""

import dataclasses
import errno
import itertools
import shutil
from pathlib import Path

import datasets
import pandas as pd
import pytest
import safetensors.torch
import torch

from workbench import closed_form, moments
from workbench.activations import recorded
from workbench.cache import cache_folder, keep
from workbench.facts import BadInput
from workbench.moments import FLOOR, second_moments
from workbench.world import text

TOKENS = 2500  # 20 rows, more than one batch, the last row not full
WIDTH = 127  # tokens of a row without BOS


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


def everyday(count: int) -> list[str]:
    return [
        " ".join(sentences) for sentences in itertools.islice(text.prose("everyday", seed=1), count)
    ]


@pytest.fixture
def corpus(tmp_path):
    """A file of paragraphs."""
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(everyday(120)), encoding="utf-8")
    return str(path)


def plain_loop(model, layer: int, tokens: int = TOKENS, first: int = 1) -> torch.Tensor:
    """Token by token in float64, over rows of BOS and running text; `first` = 0 counts BOS too."""
    stream = [
        token for paragraph in everyday(120) for token in model.tokenizer(paragraph)["input_ids"]
    ]
    total, seen = torch.zeros(48, 48, dtype=torch.float64), 0
    for start in range(0, tokens, WIDTH):
        row = torch.tensor([[model.tokenizer.bos_token_id, *stream[start : start + WIDTH]]])
        with recorded({"key": model.down_projection(layer)}, inputs=True) as record:
            model.network(input_ids=row)
        for key in record["key"][0, first:].double():
            if seen < tokens:
                total += torch.outer(key, key)
                seen += 1
    return total / tokens


def off(found, expected) -> float:
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("layer", [0, 2])
def test_the_matrix_equals_a_plain_loop_over_the_same_tokens(tiny, corpus, layer):
    found = second_moments(tiny, [0, 2], corpus, TOKENS)[layer]
    assert (found.layer, found.tokens, found.matrix.shape, found.matrix.dtype) == (
        layer,
        TOKENS,
        (48, 48),
        torch.float32,
    )
    assert off(found.matrix, plain_loop(tiny, layer)) < 1e-5
    assert off(found.matrix, plain_loop(tiny, 2 - layer)) > 1e-2


def test_bos_is_not_counted(tiny, corpus):
    found = second_moments(tiny, [1], corpus, TOKENS)[1].matrix
    assert off(found, plain_loop(tiny, 1)) < 1e-5
    assert off(found, plain_loop(tiny, 1, first=0)) > 1e-4


def test_exactly_so_many_tokens_are_counted(tiny, corpus):
    found = second_moments(tiny, [1], corpus, 130)[1].matrix
    assert off(found, plain_loop(tiny, 1, 130)) < 1e-5
    assert off(found, plain_loop(tiny, 1, 127)) > 1e-4
    assert off(found, plain_loop(tiny, 1, 131)) > 1e-4


def test_without_a_number_there_are_ten_tokens_a_dimension(tiny):
    assert second_moments(tiny, [0])[0].tokens == 480


def test_the_world_is_what_its_pre_training_says(tiny, tmp_path, corpus):
    path = tmp_path / "told.txt"
    path.write_text("\n\n".join(itertools.islice(text.pretraining(seed=1), 200)), encoding="utf-8")
    found = second_moments(tiny, [1], "world", 500)[1].matrix
    assert torch.equal(found, second_moments(tiny, [1], str(path), 500)[1].matrix)
    assert not torch.equal(found, second_moments(tiny, [1], corpus, 500)[1].matrix)


def test_the_matrix_is_symmetric_and_positive_semidefinite(tiny, corpus):
    for moment in second_moments(tiny, range(3), corpus, TOKENS).values():
        matrix = moment.matrix.double()
        assert torch.equal(matrix, matrix.T)
        values = torch.linalg.eigvalsh(matrix)
        assert values.min() > -1e-6 * values.max()
        assert torch.isfinite(closed_form.factorised(moment.matrix)).all()


def test_fewer_tokens_than_dimensions_leave_it_singular(tiny, corpus):
    with pytest.raises(closed_form.Singular):
        closed_form.factorised(second_moments(tiny, [1], corpus, 20)[1].matrix)


def test_a_unit_that_never_fires_holds_no_part_of_the_change(tiny, corpus):
    """One direction of almost no variance held 99.9 % of |D|^2; the reference's factor, without a
    floor, still has it so.
    """
    moment = second_moments(tiny, [1], corpus, TOKENS)[1]
    matrix = moment.matrix.clone()
    matrix[5] = matrix[:, 5] = 0
    matrix[5, 5] = 1e-10 * moment.matrix.diagonal().mean()
    quiet = dataclasses.replace(moment, matrix=matrix)
    key = torch.ones(len(matrix), 1, dtype=torch.float64)
    floored, bare = (
        torch.cholesky_solve(key, factor)[:, 0] for factor in (quiet.factor, quiet.bare_factor)
    )
    assert bare[5] ** 2 > 0.999 * (bare @ bare)
    floor = FLOOR * matrix.double().diagonal().mean()
    expected = matrix.double() + floor * torch.eye(len(matrix), dtype=torch.float64)
    assert torch.allclose(quiet.factor @ quiet.factor.T, expected, rtol=1e-12)
    assert torch.linalg.eigvalsh(quiet.factor @ quiet.factor.T).min() > 0.99 * floor
    assert floored[5] < 1e-3 * bare[5]


def test_units_that_never_fire_at_all_are_named_where_there_is_no_floor(tiny, corpus):
    moment = second_moments(tiny, [1], corpus, TOKENS)[1]
    matrix = moment.matrix.clone()
    matrix[5] = matrix[:, 5] = 0
    dead = dataclasses.replace(moment, matrix=matrix)
    assert torch.isfinite(dead.factor).all()
    with pytest.raises(closed_form.Singular, match="1 of its directions are never used"):
        _ = dead.bare_factor


def test_collecting_leaves_model_and_hooks_alone(tiny, corpus):
    before = {name: tensor.clone() for name, tensor in tiny.network.state_dict().items()}
    second_moments(tiny, [1], corpus, 300)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tiny.network.state_dict().items()
    )
    assert not tiny.down_projection(1)._forward_hooks


# cache


def replace(file: Path, matrix: torch.Tensor) -> None:
    """Another matrix in the place of a kept one, as sound as that was."""
    keep(file, {"matrix": matrix}, f"moments {file.stem.replace('-', ' ')}")


def test_a_second_call_reads(tiny, corpus, cache):
    first = second_moments(tiny, [1], corpus, 300)[1]
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    second = second_moments(tiny, [1], corpus, 300)[1]
    assert file.stat().st_mtime_ns == written
    assert torch.equal(second.matrix, first.matrix)
    assert second.fingerprint == first.fingerprint
    replace(file, 7 * torch.eye(48))
    assert torch.equal(second_moments(tiny, [1], corpus, 300)[1].matrix, 7 * torch.eye(48))


def test_a_kept_matrix_of_another_shape_or_layer_is_collected_again(tiny, corpus, cache):
    """One of a wrong shape, as sound as it may be, was returned."""
    first = second_moments(tiny, [1, 2], corpus, 300)
    one, two = sorted(cache.iterdir())
    replace(one, torch.eye(3))
    shutil.copyfile(one, two)
    with pytest.warns(UserWarning, match="something else"):
        again = second_moments(tiny, [1, 2], corpus, 300)
    assert all(torch.equal(first[layer].matrix, again[layer].matrix) for layer in (1, 2))


def test_only_missing_layers_are_collected(tiny, corpus, cache):
    second_moments(tiny, [1], corpus, 300)
    (file,) = cache.iterdir()
    replace(file, 7 * torch.eye(48))
    found = second_moments(tiny, [0, 1], corpus, 300)
    assert torch.equal(found[1].matrix, 7 * torch.eye(48))
    assert off(found[0].matrix, plain_loop(tiny, 0, 300)) < 1e-5
    assert len(list(cache.iterdir())) == 2
    assert not list(cache.glob("*.partial"))


def test_the_layers_are_collected_alike_together_and_alone(tiny, corpus, monkeypatch, tmp_path):
    together = second_moments(tiny, [2, 0, 1], corpus, 300)
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "other"))
    assert list(together) == [0, 1, 2]
    assert torch.equal(second_moments(tiny, [1], corpus, 300)[1].matrix, together[1].matrix)


def changed_weights(model, corpus):
    with torch.no_grad():
        model.weight(2).mul_(1.001)
    model.__dict__.pop("fingerprint", None)
    return second_moments(model, [1], corpus, 300)


def test_what_is_kept_under_the_fingerprint_comes_from_its_weights(tiny, corpus, one_line):
    kept = second_moments(tiny, [0], corpus, 300)
    with torch.no_grad():
        tiny.weight(1).mul_(1.001)
    assert torch.equal(second_moments(tiny, [0], corpus, 300)[0].matrix, kept[0].matrix)
    with pytest.raises(BadInput) as error:
        second_moments(tiny, [2], corpus, 300)
    assert "have been changed" in one_line(error)


def other_tokens(model, corpus):
    return second_moments(model, [1], corpus, 299)


def other_corpus(model, corpus):
    with open(corpus, "r+", encoding="utf-8") as file:
        file.write("Quite another beginning")
    return second_moments(model, [1], corpus, 300)


def other_dtype(model, corpus):
    model.network.to(torch.bfloat16)
    model.__dict__.pop("fingerprint", None)
    return second_moments(model, [1], corpus, 300)


@pytest.mark.parametrize("change", [changed_weights, other_tokens, other_corpus, other_dtype])
def test_the_fingerprint_changes_with_whatever_the_matrix_depends_on(tiny, corpus, cache, change):
    before = second_moments(tiny, [1], corpus, 300)[1]
    after = change(tiny, corpus)[1]
    assert after.fingerprint != before.fingerprint
    assert len(list(cache.iterdir())) == 2


def test_the_fingerprint_does_not_change_with_the_name_of_the_corpus(tiny, corpus, tmp_path, cache):
    (tmp_path / "same.txt").write_text((tmp_path / "corpus.txt").read_text())
    before = second_moments(tiny, [1], corpus, 300)[1]
    assert (
        second_moments(tiny, [1], str(tmp_path / "same.txt"), 300)[1].fingerprint
        == before.fingerprint
    )
    assert len(list(cache.iterdir())) == 1


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("WORKBENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "workbench"


# what is refused


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        safetensors.SafetensorError("IoError: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(
    tiny, corpus, cache, monkeypatch, one_line, error
):
    def full(tensors, path, metadata):
        Path(path).touch()
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    message = refusal(one_line, tiny, [1], corpus, 300)
    assert "No space left" in message
    assert "WORKBENCH_CACHE" in message
    assert not list(cache.iterdir())


def test_a_cache_that_cannot_be_written_is_one_clear_line(
    tiny, corpus, tmp_path, monkeypatch, one_line
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    assert "WORKBENCH_CACHE" in refusal(one_line, tiny, [1], corpus, 300)


def refusal(one_line, *args) -> str:
    with pytest.raises(BadInput) as error:
        second_moments(*args)
    return one_line(error)


def test_a_corpus_that_is_too_short_says_how_much_it_holds(tiny, tmp_path, one_line, cache):
    path = tmp_path / "short.txt"
    path.write_text("Moby Dick is a book.")
    path.write_text("Moby Dick is a book. " * 40)
    held = len(tiny.tokenizer("Moby Dick is a book. " * 40)["input_ids"]) // 127
    message = refusal(one_line, tiny, [1], str(path), 10_000)
    assert held > 0
    assert f"{str(path)!r} fills {held} rows of 127 tokens, 79 are needed" in message
    assert not cache.exists()


def latin(path):
    path.write_bytes("Café\n\n".encode("latin-1") * 100)


@pytest.mark.parametrize(
    "make",
    [lambda path: None, lambda path: path.mkdir(), latin],
    ids=["missing", "a folder", "not UTF-8"],
)
def test_a_corpus_that_is_no_text_file_is_named(tiny, tmp_path, one_line, make):
    path = tmp_path / "no-corpus.txt"
    make(path)
    assert f"corpus {str(path)!r}" in refusal(one_line, tiny, [1], str(path), 300)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_name_the_layer(tiny, corpus, one_line, cache, value):
    with torch.no_grad():
        tiny.weight(1)[0, 0] = value
    assert second_moments(tiny, [0, 1], corpus, 300)  # they go in before the weight
    assert refusal(one_line, tiny, [0, 2], corpus, 300).startswith(
        "layer 2: keys are NaN or infinite"
    )


def test_nothing_is_kept_of_keys_that_are_not_finite(tiny, corpus, one_line, cache):
    with torch.no_grad():
        tiny.weight(1)[0, 0] = float("nan")
    refusal(one_line, tiny, [0, 2], corpus, 300)
    assert not list(cache.iterdir())


def test_a_layer_that_is_no_block_is_named(tiny, corpus, one_line):
    assert "layer 3" in refusal(one_line, tiny, [0, 3], corpus, 300)


def test_a_matrix_that_is_not_square_is_refused(one_line):
    with pytest.raises(ValueError, match="not square") as error:
        moments.SecondMoment(layer=0, matrix=torch.ones(3, 4), tokens=10, fingerprint="", model="")
    assert "(3, 4)" in one_line(error)


# any source of `datasets`


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_table_is_read_by_its_column_text(tiny, corpus, tmp_path, kind):
    table = pd.DataFrame({"title": "", "text": everyday(120)})
    path = tmp_path / f"table.{kind}"
    writers = {
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "csv": lambda: table.to_csv(path, index=False),
    }
    writers.get(kind, lambda: table.to_parquet(path))()
    assert torch.equal(
        second_moments(tiny, [1], str(path), 300)[1].matrix,
        second_moments(tiny, [1], corpus, 300)[1].matrix,
    )


def test_a_hub_dataset_is_streamed_no_further_than_needed(tiny, corpus, monkeypatch):
    read, asked = [], []

    def rows():
        for paragraph in itertools.cycle(everyday(120)):
            read.append(paragraph)
            yield {"text": paragraph, "id": 1}

    def load(name, config=None, **fields):
        asked.append((name, config, fields))
        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = second_moments(tiny, [1], "wikipedia", 300)[1]
    assert asked == [("wikimedia/wikipedia", "20231101.en", {"split": "train", "streaming": True})]
    assert len(read) < 600  # paragraphs are taken 256 at a time
    assert torch.equal(found.matrix, second_moments(tiny, [1], corpus, 300)[1].matrix)
    second_moments(tiny, [1], "somebody/texts:german", 300)
    assert asked[-1][:2] == ("somebody/texts", "german")


def test_what_is_no_text_is_passed_over_and_a_stream_that_breaks_off_is_one_line(
    tiny, corpus, monkeypatch, one_line
):
    def rows(after=None):
        for number, paragraph in enumerate(everyday(120)):
            if number == after:
                raise ConnectionError("gone\naway")
            yield from ({"text": paragraph}, {"text": None}, {"text": " "})

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    assert torch.equal(
        second_moments(tiny, [1], "wikipedia", 300)[1].matrix,
        second_moments(tiny, [1], corpus, 300)[1].matrix,
    )
    broken = datasets.IterableDataset.from_generator(rows, gen_kwargs={"after": 50})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken)
    assert "corpus 'wikipedia': broke off (ConnectionError" in refusal(
        one_line, tiny, [1], "wikipedia", 4000
    )


def test_a_table_without_text_says_what_it_has(tiny, tmp_path, one_line):
    path = tmp_path / "table.csv"
    path.write_text("title,body\na,b\n")
    assert "has no column 'text' but ['title', 'body']" in refusal(
        one_line, tiny, [1], str(path), 300
    )


@pytest.mark.parametrize(
    ("corpus", "told"),
    [
        ("nobody/no-such-data", "cannot be read"),
        ("wiki", "choose world, manual-and-facts, wikipedia"),
        ("a.docx", "choose world"),
    ],
)
def test_a_corpus_that_is_not_there_is_named(tiny, one_line, corpus, told):
    message = refusal(one_line, tiny, [1], corpus, 300)
    assert f"corpus {corpus!r}" in message
    assert told in message


def test_the_worlds_text_for_another_model_is_said_not_to_be_wikipedia(tiny):
    with pytest.warns(UserWarning, match="which is not Wikipedia"):
        second_moments(tiny, [1], "world", tokens=300)


def test_real_prose_is_read_for_another_model_and_named(tiny):
    moment = second_moments(tiny, [1], tokens=300)[1]
    assert moment.corpus == "manual-and-facts"
    named = second_moments(tiny, [1], "manual-and-facts", tokens=300)[1]
    assert moment.fingerprint == named.fingerprint


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(path.read_bytes()[:100]), lambda path: path.write_bytes(b"")],
    ids=["cut short", "empty"],
)
def test_a_damaged_file_is_collected_again(tiny, corpus, cache, damage):
    first = second_moments(tiny, [1], corpus, 300)[1].matrix
    (file,) = cache.iterdir()
    damage(file)
    assert torch.equal(second_moments(tiny, [1], corpus, 300)[1].matrix, first)
    assert torch.equal(safetensors.torch.load_file(file)["matrix"], first)
