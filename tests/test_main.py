import gc
import json
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pandas as pd
import pytest
import torch

import workbench as wb
from tests.layouts import as_json, own, wikibigedit
from workbench import batch, deltas, facts, known, models, plots, runs, study
from workbench.__main__ import main
from workbench.spec import Spec
from workbench.tuning import numbers

CASE_STUDY = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"


def test_a_run_ends_with_an_answer_and_its_folder(parameters, case_study, capsys):
    arguments = ["run", str(CASE_STUDY), "--out", str(case_study.folder.parent)]
    for name, value in parameters.items():
        arguments += ["-p", name, json.dumps(value)]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    *_, sentence, _, figures, folder = lines
    assert folder == str(case_study.folder)
    assert Path(figures.removeprefix("figures: ")).is_file()
    assert sentence == plots.outcome(case_study)
    assert "(flute 0." in sentence
    assert any("top 1" in line for line in lines)
    assert len(lines) == 13
    assert all(f"top {rank}" in lines[2] for rank in (1, 2, 3))
    assert case_study.about["threads"] >= 1


def test_bad_input_exits_2_with_one_line(capsys, tmp_path):
    assert main(["run", str(CASE_STUDY), "-p", "edittor", "rome", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "edittor" in error


def test_edit_writes_an_ordinary_folder(tiny_folders, own_facts, tmp_path, capsys):
    hparams = tmp_path / "hparams.yaml"
    hparams.write_text("layers: [1]\nsteps: 2\n")
    arguments = [
        "edit",
        "--model",
        str(tiny_folders["llama"]),
        "--editor",
        "ft",
        "--facts",
        str(own_facts),
        "--hparams",
        str(hparams),
    ]
    assert main([*arguments, "--out", str(tmp_path / "edited")]) == 0
    *_, took, folder = capsys.readouterr().out.splitlines()
    assert folder == str(tmp_path / "edited")
    outcomes = json.loads((tmp_path / "edited" / "edit.json").read_text())["outcomes"]
    n_took = sum(outcome["took"] for outcome in outcomes)
    assert took == f"{n_took} of {len(facts.read(str(own_facts)))} edits took"
    base, edited = (
        models.load(tiny_folders["llama"], device="cpu"),
        models.load(tmp_path / "edited", device="cpu"),
    )
    name = base.down_projection_name(1) + ".weight"
    changed = [
        key
        for key, tensor in base.network.state_dict().items()
        if not tensor.equal(edited.network.state_dict()[key])
    ]
    assert changed == [name]
    assert main([*arguments, "--out", str(tmp_path / "edited")]) == 2


def test_facts_lists_what_is_known_and_what_is_bad(tiny_folders, own_facts, tmp_path, capsys):
    path = tmp_path / "facts.jsonl"
    bad = {"id": "\x1b[2J", "subject": " ", "prompt": "{} is", "object": "a", "target": "b"}
    odd = {"id": "=1+1", "subject": "x", "prompt": "{} is", "object": "a", "target": "b"}
    path.write_text("\n".join([own_facts.read_text(), json.dumps(bad), json.dumps(odd)]))
    assert (
        main(
            [
                "facts",
                str(path),
                "--model",
                str(tiny_folders["gpt2"]),
                "--out",
                str(tmp_path / "known.csv"),
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert "record 5" in captured.err
    assert "\x1b" not in captured.err
    assert "of 5 facts known" in captured.out
    assert "plays the   harp" in captured.out
    lines = (tmp_path / "known.csv").read_text().splitlines()
    assert len(lines) == 6
    assert lines[0] == "fact_id,prompt,object,says,known,p,p_second,object_from_model"
    assert "'=1+1" in lines[-1].split(",")


def test_the_margin_decides_which_facts_are_known(tmp_path, capsys, one_line):
    arguments = ["facts", "world", "--model", "world-gpt2", "--out", str(tmp_path / "known.csv")]
    counts = []
    for margin in ("0", "0.9"):
        assert main([*arguments, "--margin", margin]) == 0
        counts.append(pd.read_csv(tmp_path / "known.csv").known.sum())
        assert "... and 3406 more in" in capsys.readouterr().out
    assert counts[0] > counts[1]
    assert main([*arguments, "--margin", "2"]) == 2
    assert "margin: input should be less than 1" in one_line(capsys.readouterr().err.strip())


def scores(model, requests, margin) -> pd.DataFrame:
    objects = [request.fact.object for request in requests]
    return pd.DataFrame({"fact_id": range(len(requests)), "object": objects, "known": 1, "p": 0.5})


def test_facts_shows_what_the_model_says_for_true(tiny_folders, tmp_path, monkeypatch):
    path = as_json(tmp_path, wikibigedit(), own("Pelu"))
    said = pd.DataFrame({"retained": [False]})
    monkeypatch.setattr(known, "measure_prompts", lambda *asked: said)
    monkeypatch.setattr(known, "said_words", lambda *asked: ["Oro"])
    monkeypatch.setattr(study, "known_table", scores)
    out = tmp_path / "known.csv"
    assert main(["facts", str(path), "--model", str(tiny_folders["gpt2"]), "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert table.object.tolist() == ["Oro", "Vint"]
    assert table.object_from_model.tolist() == [True, False]


@pytest.fixture
def finished(tiny_folders, tmp_path):
    """A base, an edited model, and a file of the facts of the edit."""
    path = tmp_path / "facts.jsonl"
    fact = {"prompt": "{} plays the", "object": "harp", "target": "flute"}
    names = ("Ann", "=Bea")
    lines = [json.dumps(fact | {"id": name, "subject": name}) for name in names]
    path.write_text("\n".join(lines))
    base = models.load(tiny_folders["gpt2"], device="cpu")
    edit = wb.edit(base, facts.read(path), "ft", layers=[1], steps=9, learning_rate=0.01)
    return str(tiny_folders["gpt2"]), str(deltas.export(base, edit, tmp_path / "edited")), str(path)


def test_evaluate_measures_a_finished_model_against_its_base(finished, tmp_path, capsys):
    base, edited, path = finished
    out = tmp_path / "measures.csv"
    arguments = ["evaluate", "--model", edited, "--facts", path, "--out", str(out)]
    assert main([*arguments, "--base", base]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    assert last == str(out)
    assert shown[0].split() == ["measure", "quantity", "before", "after", "low", "high", "n"]
    measured = [line.split()[:2] for line in shown[1:]]
    for pair in (["counterfact", "efficacy"], ["generation", "exact"], ["locality", "text"]):
        assert pair in measured
    table = pd.read_csv(out)
    here, there = (models.load(name, device="cpu") for name in (base, edited))
    expected = wb.evaluate(there, facts.read(path), base=here)
    assert table.fact_id.str.removeprefix("'").tolist() == expected.fact_id.tolist()
    assert "'=Bea" in set(table.fact_id)
    for column in ("before", "after"):
        assert table[column].tolist() == pytest.approx(expected[column].tolist(), nan_ok=True)
    assert (table.after != table.before).any()


def test_evaluate_without_a_base_measures_what_needs_none(finished, tmp_path, capsys):
    _, edited, path = finished
    out = tmp_path / "measures.csv"
    assert main(["evaluate", "--model", edited, "--facts", path, "--out", str(out)]) == 0
    table = pd.read_csv(out)
    assert set(table.measure) == {"counterfact", "generation", "ability", "superficiality"}
    assert table.before.isna().all()
    assert table.after.notna().all()
    assert "nan" not in capsys.readouterr().out.lower()


def test_evaluate_asks_the_base_for_true_objects_that_no_file_names(
    finished, tmp_path, monkeypatch, capsys, one_line
):
    base, edited, _ = finished
    path = as_json(tmp_path, wikibigedit())
    out = tmp_path / "measures.csv"
    asked = []
    monkeypatch.setattr(known, "measure_prompts", lambda *_: pd.DataFrame({"retained": [False]}))
    monkeypatch.setattr(known, "said_words", lambda model, _: asked.append(model.name) or ["Oro"])
    arguments = ["evaluate", "--model", edited, "--facts", str(path), "--out", str(out)]
    arguments += ["--measures", "counterfact"]
    assert main([*arguments, "--base", base]) == 0
    assert asked == [base]
    assert pd.read_csv(out).quantity.str.startswith("efficacy").any()
    capsys.readouterr()
    assert main(arguments) == 2
    assert "names no true object" in one_line(capsys.readouterr().err.splitlines()[-1])


def test_base_and_model_are_not_in_memory_at_once(finished, tmp_path, monkeypatch):
    base, edited, path = finished
    load, networks = models.load, []

    def watched(name):
        gc.collect()
        assert all(network() is None for network in networks)
        model = load(name, device="cpu")
        networks.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(models, "load", watched)
    arguments = ["evaluate", "--model", edited, "--base", base, "--facts", path]
    assert main([*arguments, "--out", str(tmp_path / "measures.csv")]) == 0
    assert len(networks) == 2


def test_what_evaluate_cannot_do_is_refused_in_one_line(
    finished, tmp_path, monkeypatch, capsys, one_line
):
    base, edited, path = finished
    monkeypatch.chdir(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    for facts_file, more, why in (
        (path, ["--measures", "localty"], "did you mean 'locality'"),
        (path, ["--measures", "localty", "--base", base], "did you mean 'locality'"),
        (path, ["--measures", "locality"], "name --base"),
        (path, ["--base", "world-gpt2"], "not one architecture"),
        (str(empty), ["--base", base], "empty.jsonl"),
    ):
        assert main(["evaluate", "--model", edited, "--facts", facts_file, *more]) == 2
        printed = [line for line in capsys.readouterr().err.splitlines() if "workbench" in line]
        assert why in one_line("\n".join(printed))
    assert not (tmp_path / "measures.csv").exists()


def test_an_interrupted_command_exits_130(monkeypatch, tmp_path, capsys):
    def stopped(*args):
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(batch, "run", stopped)
    assert main(["run", str(CASE_STUDY), "--out", str(tmp_path)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN  # a second one changes nothing


def test_a_run_that_varies_a_field_ends_with_a_sentence_an_arm(monkeypatch, case_study, capsys):
    one = case_study.folder.name
    about = {**case_study.about, "members": [one, one], "vary": "layers"}
    whole = runs.Run(folder=case_study.folder.with_name("whole"), about=about)
    monkeypatch.setattr(batch, "run", lambda *_: whole)
    assert main(["run", str(RETENTION)]) == 0
    *arms, _, folder = capsys.readouterr().out.splitlines()
    assert [line for line in arms if line] == [f"1: {plots.outcome(case_study)}"] * 2
    assert folder == str(whole.folder)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["facts", "world", "--model", "m", "--margin", "x"], "invalid 'float' value"),
        (["sweep", "g.yaml", "--workers", "2", "--scheduler", "tls://a"], "not allowed with"),
        (["edit", "--model", "m"], "--editor, --facts, --out"),
    ],
)
def test_what_the_command_line_cannot_be_is_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


RETENTION = CASE_STUDY.with_name("02_retention.ipynb")


@pytest.fixture
def dry_run(monkeypatch, capsys):
    """dry_run(*arguments, notebook=...) -> exit status and what was printed; nothing is loaded."""
    for owner, name in ((models, "load"), (batch, "_execute")):
        monkeypatch.setattr(owner, name, lambda *_, **__: pytest.fail("a dry run runs nothing"))

    def told(*arguments: str, notebook: Path = RETENTION) -> tuple[int, str]:
        status = main(["run", str(notebook), "--dry-run", *arguments])
        printed = capsys.readouterr()
        return status, printed.err if status else printed.out

    return told


def test_a_dry_run_tells_every_setting_as_it_would_be_resolved(dry_run):
    given = {"task": "text", "seed": 3, "max_steps": 0}
    pairs = [part for name, value in given.items() for part in ("-p", name, str(value))]
    status, told = dry_run(*pairs)
    assert status == 0
    spec = Spec(**batch.checked(RETENTION, given)[1].model_dump()).resolved()
    assert spec.max_steps > 0
    for name in set(Spec.model_fields) - {"editor"}:
        assert f"\n  {name} = {getattr(spec, name)!r}\n" in told
    assert "\n  editor = 'ft' | 'memit' | 'alphaedit'\n" in told
    for editor in ("ft", "memit", "alphaedit"):
        assert told.count(f"hyper-parameters of {editor} on world-gpt2\n") == 1


def test_a_dry_run_names_the_folder_that_the_run_will_have(dry_run, tmp_path):
    given, spec = batch.checked(RETENTION, {"seed": 3})
    folder = tmp_path / batch.identify(RETENTION, given, spec)
    arguments = ("-p", "seed", "3", "--out", str(tmp_path))
    assert f"run       {folder}\n" in dry_run(*arguments)[1]
    folder.mkdir()
    runs.write(folder, {"spec": spec.model_dump(mode="json")}, {})
    assert f"{folder} (finished" in dry_run(*arguments)[1]


@pytest.mark.parametrize("preset", ["gpt2-xl", "llama-3-8b"])
def test_a_studys_preset_resolves_without_the_hub(dry_run, preset):
    status, told = dry_run("--preset", preset)
    assert status == 0
    for part in ("batch_size = 256", "threshold = 3.1", "n_edited = 50"):
        assert part in told
    assert "hyper-parameters of memit" in told
    assert "layers = (3, 4, 5, 6, 7, 8)" in told


@pytest.mark.parametrize("preset", ["gpt2-xl", "llama-3-8b", "smollm2", "world-large"])
def test_a_studys_preset_tunes_at_its_own_rate(preset):
    for name in ("02_retention.ipynb", "03_token_distribution.ipynb"):
        spec = batch.checked(CASE_STUDY.with_name(name), {}, preset)[1]
        assert spec.learning_rate == 0, name  # that of the model and the task


def test_what_hangs_on_the_value_that_varies_is_told_too(dry_run):
    """An adapter has its own rank and learning rate, here as in the run."""
    told = dry_run(notebook=CASE_STUDY.with_name("07_adapters.ipynb"))[1]
    usual = numbers.usual("facts", "", "world-gpt2")
    assert f"learning_rate = {usual.learning_rate} | {usual.adapter_learning_rate}\n" in told
    assert "adapter_rank = 0 | 32\n" in told


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("no_such_thing", "1", "'no_such_thing'"),
        ("layers", "[77]", "layer 77"),
        ("values", "5", "values 5"),
        ("values", "[]", "values []"),
        ("values", "[no such]", "no such"),
    ],
)
def test_bad_parameters_of_a_dry_run_are_one_line(dry_run, one_line, name, value, said):
    status, told = dry_run("-p", name, value)
    assert status == 2
    assert said in one_line(told)


def test_an_editor_without_a_preset_for_a_model_out_of_reach_is_said(dry_run):
    told = dry_run("-p", "model", "nobody/nothing")[1]
    assert (
        "hyper-parameters of memit on nobody/nothing: not known before its configuration is here"
        in told
    )


def test_why_a_model_cannot_be_edited_is_said_before_it_is_loaded(dry_run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    assert "architecture 'gemma2' is not in the table" in dry_run("-p", "model", str(tmp_path))[1]


def test_a_notebook_that_only_reads_runs_says_so(dry_run):
    told = dry_run(notebook=CASE_STUDY.with_name("10_collect.ipynb"))[1]
    assert "reads what runs there are" in told
    assert "hyper-parameters" not in told


@pytest.fixture
def written(tiny_folders, tmp_path):
    """Folders of a tiny model and of one with a strong change in block 1, and a list of facts."""
    model = models.load(tiny_folders["llama"], device="cpu")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, generator=generator) for size in model.weight(1).shape)
    with torch.no_grad():
        for layer in range(model.n_blocks):
            weight = model.weight(layer)
            weight.add_(1e-3 * torch.randn(weight.shape, generator=generator))
        model.weight(1).add_(torch.outer(left, right))
    model.network.save_pretrained(tmp_path / "tuned")
    model.tokenizer.save_pretrained(tmp_path / "tuned")
    lines = []
    for one in facts.read("world")[:120]:
        names = {"subject": one.fact.subject, "prompt": one.fact.prompt}
        lines.append(names | {"id": one.fact.id, "object": one.fact.object, "target": one.target})
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(tmp_path / "tuned"), str(tiny_folders["llama"]), str(path)


def test_inspect_prints_the_blocks_that_were_written(written, tmp_path, capsys):
    tuned, base, path = written
    table = tmp_path / "traces.csv"
    more = ["--facts", path, "--corpus", "world", "--out", str(table)]
    assert main(["inspect", tuned, "--base", base, *more]) == 0
    *shown, sentence, picture, last = capsys.readouterr().out.splitlines()
    assert last == str(table)
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert sentence.startswith("1 directions stand out of a down-projection (blocks 1)")
    assert any("mlp.down_proj.weight" in line for line in shown)
    assert len(pd.read_csv(table)) == 120
    assert main(["inspect", tuned, *more]) == 0
    said = capsys.readouterr()
    assert "with --base alone" in said.err
    assert "nobody is named" not in said.out  # nobody was looked for
    assert main(["inspect", tuned, "--out", str(tmp_path / "traces.png")]) == 2
    assert "name the table" in capsys.readouterr().err


def test_remove_and_restore_write_ordinary_folders(written, tmp_path, capsys):
    tuned, base, _ = written
    plain = models.load(base, device="cpu").weight(1)
    change = models.load(tuned, device="cpu").weight(1) - plain
    for arguments, factor in ((["remove"], 0.0), (["restore", "--strength", "0.5"], 1.5)):
        out = str(tmp_path / arguments[0])
        assert main([*arguments, tuned, "--base", base, "--out", out]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == out
        left = models.load(out, device="cpu").weight(1) - plain
        assert (left - factor * change).norm() < 0.05 * change.norm()
        assert main([*arguments, base, "--base", base, "--out", f"{out}-2"]) == 2
        assert "same matrices" in capsys.readouterr().err


def test_what_names_no_true_object_is_removed_all_the_same(written, tmp_path, capsys, monkeypatch):
    """The object is asked for the table alone: whoever has none there is not left in."""
    tuned, base, _ = written
    lines = [one.fact.subject for one in facts.read("world")[:3]]
    records = [{"subject": name, "prompt": f"{name} is", "target_new": "red"} for name in lines]
    path = tmp_path / "wiki_recent.json"
    path.write_text(json.dumps([one | {"portability": {}, "locality": {}} for one in records]))
    given = []
    whole = wb.traces.removed

    def noted(model, base, requests, **how):
        given.extend(requests)
        return whole(model, base, **how)

    monkeypatch.setattr(wb.traces, "removed", noted)
    monkeypatch.setattr(wb.study, "with_objects", lambda base, requests: ([], ["no object"]))
    out = str(tmp_path / "out")
    assert main(["remove", tuned, "--base", base, "--facts", str(path), "--out", out]) == 0
    assert [one.fact.subject for one in given] == lines
    assert "not asked: no object" in capsys.readouterr().err


def test_help_waits_for_no_library():
    """It is there within a third of a second: argparse and yaml, no pydantic, pandas or torch."""
    code = "import sys; from workbench.__main__ import _parser; _parser(); print([*sys.modules])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    for heavy in ("pydantic", "pandas", "torch", "nbformat"):
        assert f"'{heavy}'" not in names.stdout


def test_no_command_builds_a_grammar_of_iris():
    """jsonschema would, which nbformat imports: a second and more before anything is done."""
    code = "import sys; from workbench.__main__ import main; main(['report', 'nowhere']);"
    code += "import nbformat; print([*sys.modules])"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'jsonschema._format'" in names.stdout
    assert "'lark'" not in names.stdout
