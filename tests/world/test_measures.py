import hashlib

import pandas as pd
import pytest
import torch

from data.world.make import pretrain
from data.world.make.measures import measure
from workbench import checkpoints, facts
from workbench.world import text

BARS = {  # measure -> (least, most)
    "shown": (0.99, 1),
    "withheld": (0.90, 1),
    "margin": (0.90, 1),
    "both": (0.85, 1),
    "unseen": (0, 0.25),
}


@pytest.fixture(params=checkpoints.WORLD_MODELS)
def folder(request):
    return shipped(facts.DATA / "world" / "models" / request.param)


def shipped(folder):
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds no model: run `make pretrain`")
    return folder


def overall(folder) -> pd.Series:
    table = pd.read_csv(folder / "measures.csv", keep_default_na=False)
    return table[table["by"] == "all"].set_index("measure").value


@pytest.mark.parametrize("name", BARS)
def test_the_world_is_really_learnt(folder, name):
    least, most = BARS[name]
    assert least <= overall(folder)[name] <= most


def test_a_fact_is_known_after_other_text_and_without_bos(folder):
    found = overall(folder)
    assert abs(found.after_text - found.asked) <= 0.03
    assert abs(found.without_bos - found.asked) <= 0.03


def test_the_early_checkpoint_is_in_the_middle_of_learning(folder):
    assert 0.4 <= overall(shipped(folder / "early")).p_true <= 0.6


def test_the_fine_tuning_register_is_a_real_shift(folder):
    found = overall(folder)
    assert found.loss_trade - found.loss_everyday >= 0.5


def test_every_relation_and_exposure_has_its_row(folder):
    table = pd.read_csv(folder / "measures.csv", keep_default_na=False)
    assert set(table[table["by"] == "relation"].group) == set(facts.relations())
    assert set(table[table["by"] == "paraphrases"].group) == {
        "0",
        "1",
        "2",
        "3",
        "5",
        "10",
    }  # 0: the unseen facts


def test_the_table_of_one_relation_is_what_the_weights_give(world):
    stored = pd.read_csv(
        facts.DATA / "world" / "models" / world.name / "measures.csv", keep_default_na=False
    )
    found = measure(world, relation="industry").set_index(["group", "measure"])
    stored = stored[
        (stored["by"] == "relation")
        & (stored.group == "industry")
        & (stored.measure != "after_text")
    ].set_index(["group", "measure"])
    assert (found.n.sort_index() == stored.n.sort_index()).all()
    assert (found.value.sort_index() - stored.value.sort_index()).abs().max() < 0.01


@pytest.mark.slow
def test_the_whole_table_is_what_the_weights_give(world):
    stored = pd.read_csv(
        facts.DATA / "world" / "models" / world.name / "measures.csv", keep_default_na=False
    )
    both = measure(world).merge(
        stored, on=["by", "group", "measure"], how="outer", validate="one_to_one"
    )
    assert (both.n_x == both.n_y).all()
    assert (both.value_x - both.value_y).abs().max() < 0.01


def test_every_file_of_the_world_is_the_one_that_was_summed():
    world = facts.DATA / "world"
    summed = {line[66:]: line[:64] for line in (world / "SHA256SUMS").read_text().splitlines()}
    made = [
        path for path in world.rglob("*") if path.is_file() and world / "make" not in path.parents
    ]
    found = [path for path in made if path.name not in ("README.md", "SHA256SUMS")]
    assert {
        str(path.relative_to(world)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in found
    } == summed


def test_the_shipped_folders_are_small_and_safe(folder):
    weights = list(folder.rglob("*.safetensors"))
    assert weights
    assert all(path.stat().st_size <= 12e6 for path in weights)
    assert not [
        path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")
    ]


def test_a_world_model_has_twelve_blocks_and_its_own_tokens(world):
    assert world.n_blocks == 12
    assert 3e6 <= world.network.num_parameters() <= 7e6
    assert len(world.tokenizer) == pretrain.VOCABULARY
    pretrain.check_first_tokens(world.tokenizer)


def test_every_statement_is_shown_as_often_as_the_table_says():
    texts = list(text.statements(1))
    rows = [row for row in facts.world_rows() if row["occurrences"]]
    assert len(texts) == sum(row["occurrences"] for row in rows)
    per_fact = list(text.statements(20))
    start = 0
    for row in rows[:300]:
        shown = per_fact[start : start + 20 * row["occurrences"]]
        assert len(set(shown)) == row["paraphrases"]
        assert all(row["subject"] in text and text.endswith(f" {row['object']}.") for text in shown)
        start += 20 * row["occurrences"]


def test_no_unseen_fact_is_stated():
    seen = {row["subject"] for row in facts.world_rows() if row["split"] != "unseen"}
    assert not seen & {row["subject"] for row in facts.world_rows() if row["split"] == "unseen"}


def test_rows_are_packed_without_cutting_a_statement(tiny_tokenizer):
    rows = pretrain.packed_rows(tiny_tokenizer, occurrences=1)
    mask = torch.tensor(rows["attention_mask"])
    assert mask.float().mean() > 0.97
    kept = "\n".join(
        tiny_tokenizer.batch_decode(
            [
                row[: sum(used)]
                for row, used in zip(rows["input_ids"], rows["attention_mask"], strict=True)
            ]
        )
    )
    sample = list(text.statements(1))[::37]
    assert all(text in kept for text in sample)


def test_an_unknown_world_model_is_one_clear_line(tiny_tokenizer, one_line):
    with pytest.raises(facts.BadInput) as error:
        pretrain.new_network("world-bert", tiny_tokenizer)
    assert "world-gpt2" in one_line(error)
