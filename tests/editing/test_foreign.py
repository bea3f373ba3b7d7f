"""Hyper-parameter files of other projects become ours; whatever is ignored is said."""

import json
import warnings

import pytest
import yaml

from workbench import editing
from workbench.__main__ import main
from workbench.editing import foreign
from workbench.facts import BadInput

MODULES = {
    "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
    "layer_module_tmp": "transformer.h.{}",
    "mlp_module_tmp": "transformer.h.{}.mlp",
    "attn_module_tmp": "transformer.h.{}.attn",
    "ln_f_module": "transformer.ln_f",
    "lm_head_module": "transformer.wte",
}
STATISTICS = {
    "mom2_dataset": "wikipedia",
    "mom2_n_samples": 100_000,
    "mom2_dtype": "float32",
    "mom2_adjustment": True,
}
SOLVER = {
    "fact_token": "subject_last",
    "v_num_grad_steps": 20,
    "v_lr": 0.5,
    "v_loss_layer": 47,
    "v_weight_decay": 0.5,
    "kl_factor": 0.0625,
}
LARGE = {
    "alg_name": "",
    "model_name": "./hugging_cache/gpt2-xl",
    "stats_dir": "./data/stats",
    "device": 0,
    "model_parallel": False,
}
FILES = {
    "rome": SOLVER
    | STATISTICS
    | MODULES
    | {
        "layers": [17],
        "clamp_norm_factor": 4,
        "context_template_length_params": [[5, 10], [10, 10]],
    },
    "memit": SOLVER
    | STATISTICS
    | MODULES
    | {
        "layers": [13, 14, 15, 16, 17],
        "layer_selection": "all",
        "clamp_norm_factor": 0.75,
        "mom2_update_weight": 20_000,
    },
    "alphaedit": SOLVER
    | STATISTICS
    | MODULES
    | {
        "layers": [13, 14, 15, 16, 17],
        "clamp_norm_factor": 0.75,
        "nullspace_threshold": 2e-2,
        "L2": 10,
        "P_loc": "./null_space_project.pt",
    },
    "ft": MODULES
    | {
        "layers": [0],
        "num_steps": 25,
        "lr": 5e-4,
        "weight_decay": 0,
        "kl_factor": 0,
        "norm_constraint": 5e-4,
        "objective_optimization": "target_new",
    },
    "malmen": {
        "inner_params": [f"transformer.h.{layer}.mlp.c_proj.weight" for layer in range(42, 48)],
        "n_edits": 20,
        "rank": 1920,
        "n_blocks": 2,
    }
    | {
        "lr": 1e-6,
        "meta_lr": 1e-5,
        "loc_coef": 1,
        "max_grad_norm": 1,
        "batch_size": 32,
        "token": "ans",
    },
}
NAMED = {"rome": "ROME", "memit": "MEMIT", "alphaedit": "AlphaEdit", "ft": "FT", "malmen": "MALMEN"}


@pytest.fixture
def written(tmp_path):
    """written(editor, fields, kind) -> file as that project would have it: JSON in a folder of the
    editor's name, or YAML with alg_name.
    """

    def write(editor: str, fields: dict, kind: str = "json"):
        folder = tmp_path / (NAMED[editor] if kind == "json" else "hparams")
        folder.mkdir(exist_ok=True)
        path = folder / f"gpt2-xl.{kind}"
        whole = fields if kind == "json" else LARGE | {"alg_name": NAMED[editor]} | fields
        path.write_text(json.dumps(whole) if kind == "json" else yaml.safe_dump(whole))
        return path

    return write


@pytest.mark.parametrize("kind", ["json", "yaml"])
@pytest.mark.parametrize("editor", FILES)
def test_their_numbers_for_gpt2_xl_are_our_published_preset(written, editor, kind):
    path = written(editor, FILES[editor], kind)
    with pytest.warns(UserWarning, match="hyper-parameters of another project; ignored: "):
        found = editing.preset(str(path))
    changes = {"facts_at_once": 20} if editor == "malmen" else {}
    variant = (
        "published" if editor in ("malmen", "ft") else "reference"
    )  # FILES["ft"] names its objective
    assert found == editing.preset(editor, "gpt2-xl", variant=variant).model_copy(update=changes)
    with pytest.warns(UserWarning, match="ignored"):
        assert editing.preset(editor, "any", path) == found


@pytest.mark.parametrize("editor", FILES)
def test_every_name_stands_in_the_table_and_says_what_became_of_it(written, editor):
    path = written(editor, FILES[editor] | {"no_such_thing": 1}, "yaml")
    table = editing.translation(path).set_index("name")
    convention = {"convention"} if editor in ("rome", "memit", "alphaedit") else set()
    assert set(table.index) == set(FILES[editor]) | set(LARGE) | {"no_such_thing"} | convention
    ignored = table[table.became == ""]
    assert (ignored.note != "").all()
    assert "nothing of the kind" in table.note["no_such_thing"]
    assert "when the model is loaded" in table.note["device"]
    with pytest.warns(UserWarning, match="ignored") as said:
        editing.preset(str(path))
    assert all(name in str(said[0].message) for name in ignored.index)


def test_a_name_in_the_warning_tells_a_terminal_nothing(written):
    path = written("memit", FILES["memit"] | {"\x1b[2J": 1}, "json")
    with pytest.warns(UserWarning, match="ignored") as warned:
        editing.preset(str(path))
    assert r"\x1b[2J" in str(warned[0].message)
    assert "\x1b" not in str(warned[0].message)


def test_numbers_change_with_the_file(written):
    with pytest.warns(UserWarning, match="ignored"):
        found = editing.preset(
            str(
                written(
                    "memit",
                    FILES["memit"] | {"v_lr": 0.1, "mom2_update_weight": 7, "layers": [3, 4]},
                )
            )
        )
    assert (found.learning_rate, found.weight, found.layers) == (0.1, 7, (3, 4))


@pytest.mark.parametrize(
    ("said", "expected"), [("prompt_last", "reference"), ("target_new", "published")]
)
def test_the_objective_of_ft(written, said, expected):
    with pytest.warns(UserWarning, match="ignored"):
        assert (
            editing.preset(
                str(written("ft", FILES["ft"] | {"objective_optimization": said}))
            ).convention
            == expected
        )


def test_without_a_word_on_it_ft_has_their_objective(written):
    fields = {
        name: value for name, value in FILES["ft"].items() if name != "objective_optimization"
    }
    with pytest.warns(UserWarning, match="ignored"):
        assert editing.preset("ft", "any", written("ft", fields)).convention == "reference"


def test_a_rome_without_moments_is_read_as_what_it_is(written):
    """EasyEdit's files of ROME say so by default, and were refused."""
    with pytest.warns(UserWarning, match="ignored"):
        found = editing.preset(str(written("rome", FILES["rome"] | {"mom2_adjustment": False})))
    assert found.moments == "identity"
    assert found.convention == "reference"


@pytest.mark.parametrize(("editor", "alg_name"), [("rome", "R-ROME"), ("ft", "FT-M")])
def test_what_mends_their_own_habits_is_not_read_as_those(written, editor, alg_name):
    fields = {
        name: value for name, value in FILES[editor].items() if name != "objective_optimization"
    }
    with pytest.warns(UserWarning, match="ignored"):
        found = editing.preset(editor, "any", written(editor, fields | {"alg_name": alg_name}))
    assert found.convention == "published"


def test_no_box_is_zero(written):
    with pytest.warns(UserWarning, match="ignored"):
        assert editing.preset(str(written("ft", FILES["ft"] | {"norm_constraint": False}))).box == 0


@pytest.mark.parametrize(
    ("editor", "fields", "told"),
    [
        ("rome", {"fact_token": "last"}, "only 'subject_last'"),
        ("memit", {"layer_selection": "random"}, "only 'all'"),
        ("memit", {"mom2_adjustment": False}, "mom2_adjustment False"),
        ("ft", {"kl_factor": 0.1}, "kl_factor 0.1"),
        ("rome", {"mom2_adjustment": "false"}, "mom2_adjustment"),
        ("memit", {"alg_name": "AlphaEdit"}, "is for alphaedit, not for memit"),
        ("malmen", {"inner_params": ["lm_head.weight"]}, "inner_params"),
        ("memit", {"layers": "all"}, "layers"),
        ("rome", {"v_lr": "fast"}, "learning_rate"),
        ("rome", {"context_template_length_params": [3]}, "context_template_length_params"),
    ],
)
def test_what_cannot_be_had_is_one_line(written, one_line, editor, fields, told):
    with pytest.raises(BadInput) as error, warnings.catch_warnings(action="ignore"):
        editing.preset(editor, "any", written(editor, FILES[editor] | fields))
    assert told in one_line(error)


def test_an_unknown_algorithm_is_one_line(tmp_path, one_line):
    path = tmp_path / "some.yaml"
    path.write_text("alg_name: GRACE\nlayers: [3]\nlr: 1")
    with pytest.raises(BadInput) as error:
        editing.preset(str(path))
    assert "'GRACE'" in one_line(error)


def test_our_own_files_stay_ours():
    for editor, module in editing.EDITORS.items():
        assert not foreign.is_foreign(dict.fromkeys(module.HParams.model_fields)), editor


def test_the_command_takes_such_a_file(written, tiny_folders, tmp_path, capsys):
    path = written("ft", FILES["ft"] | {"num_steps": 2})
    facts = tmp_path / "facts.jsonl"
    facts.write_text(
        json.dumps(
            {"subject": "Anna", "prompt": "{} plays the", "object": "harp", "target": "flute"}
        )
    )
    command = [
        "edit",
        "--model",
        str(tiny_folders["gpt2"]),
        "--editor",
        "ft",
        "--facts",
        str(facts),
        "--out",
        str(tmp_path / "edited"),
    ]
    with pytest.warns(UserWarning, match="ignored"):
        assert main([*command, "--hparams", str(path)]) == 0
    assert json.loads((tmp_path / "edited" / "edit.json").read_text())["hparams"]["steps"] == 2
    assert (tmp_path / "edited" / "config.json").is_file()
    capsys.readouterr()
