import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import peft
import pytest
import torch

import workbench.spec
from tests.layouts import as_json
from workbench import deltas, editing, facts, known, models, runs, study
from workbench.editing import EDITORS
from workbench.facts import BadInput
from workbench.study import Spec
from workbench.tracking.probes import Probe, questions
from workbench.tracking.retention import measure, measure_prompts
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune
from workbench.tuning.tasks import Data


@pytest.fixture(scope="module")
def small():
    """A whole study on a world model, as small as it can be."""
    return Spec(
        n_edited=2,
        n_intrinsic=3,
        edits_per_model=1,
        max_steps=2,
        eval_every=1,
        n_train=32,
        n_valid=4,
        batch_size=2,
        threshold=0.01,
    )


@pytest.fixture(scope="module")
def base():
    return models.load("world-gpt2", device="cpu")


@pytest.fixture(scope="module")
def done(small, base, tmp_path_factory):
    return study.run(small, base, out=tmp_path_factory.mktemp("runs"))


def test_a_run_holds_every_edited_model_step_and_fact(done):
    probes = done.probes
    assert probes.edited_model.unique().tolist() == [0, 1]
    assert probes.step.unique().tolist() == [-1, 0, 1, 2]
    own = probes[probes.group.isin(["edited", "intrinsic"])]
    assert (own.groupby(["edited_model", "step", "group"]).size().unstack() == [1, 3]).all().all()
    assert len(done.deltas) == 2
    assert len(done.training) == 2 * 3


def test_before_the_edit_the_facts_are_known_and_after_it_the_target_is_on_top(done):
    edited = done.probes[done.probes.group == "edited"]
    assert (edited[edited.step == -1].rank_true == 1).all()
    assert (edited[edited.step == 0].rank_edited == 1).all()
    assert (edited[edited.step == -1].rank_edited > 1).all()


def test_took_is_success_right_after_the_edit(done):
    edited = done.probes[done.probes.group == "edited"]
    at_zero = edited[edited.step == 0].set_index(["edited_model", "fact_id"]).retained
    later = edited[edited.step == 2].set_index(["edited_model", "fact_id"]).took
    assert (later == at_zero.reindex(later.index)).all()


def test_the_run_says_of_each_edit_what_was_solved_and_whether_it_took(done):
    edited = done.probes[(done.probes.group == "edited") & (done.probes.step == 0)]
    at_zero = edited.set_index(["edited_model", "fact_id"])
    assert len(done.about["edits"]) == len(at_zero)
    for edit in done.about["edits"]:
        row = at_zero.loc[(edit["edited_model"], edit["fact"])]
        assert edit["took"] == row.retained
        assert edit["p_after"] == pytest.approx(row.p_answer, rel=1e-3)
        assert edit["p_solved"] is None or edit["p_solved"] > 0.5


def test_the_model_comes_back_bit_for_bit(small, base, tmp_path):
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    study.run(small, base, out=tmp_path)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in base.network.state_dict().items()
    )


def test_the_same_spec_gives_the_same_tables(small, base, done, tmp_path):
    again = study.run(small, base, out=tmp_path)
    assert again.folder.name == done.folder.name
    for name in runs.TABLES:
        assert getattr(again, name).equals(getattr(done, name)), name
    assert [path.read_bytes() for path in again.deltas] == [
        path.read_bytes() for path in done.deltas
    ]


def test_a_finished_run_is_read_not_run(small, done):
    before = (done.folder / "run.json").stat().st_mtime_ns
    assert (
        study.run(small, model=None, out=done.folder.parent).folder == done.folder
    )  # no model is even loaded
    assert (done.folder / "run.json").stat().st_mtime_ns == before


def test_the_choice_depends_on_seed_and_numbers_only(base):
    def ids(**changes):
        chosen = study.choose(Spec(**({"n_edited": 5, "n_intrinsic": 8} | changes)), base)
        return [
            [request.fact.id for request in group] for group in (chosen.edited, chosen.intrinsic)
        ]

    first = ids()
    assert ids(editor="ft", plan="edited", max_steps=7) == first
    assert ids(seed=1) != first
    assert len(set(first[0] + first[1])) == 13


def test_matched_groups_share_relations_and_no_subject(base):
    chosen = study.choose(Spec(n_edited=8, n_intrinsic=12), base)
    relations = {request.fact.relation for request in chosen.edited}
    assert {request.fact.relation for request in chosen.intrinsic} <= relations
    subjects = [request.fact.subject for request in chosen.edited + chosen.intrinsic]
    assert len(set(subjects)) == len(subjects)


def test_the_papers_rule_shares_no_subject_relation_or_object(base):
    chosen = study.choose(Spec(n_edited=4, n_intrinsic=8, split_rule="paper"), base)
    for name in ("subject", "relation", "object"):
        edited, intrinsic = (
            {getattr(request.fact, name) for request in group}
            for group in (chosen.edited, chosen.intrinsic)
        )
        assert not edited & intrinsic, name


def test_chosen_facts_are_known_by_the_margin_and_are_study_facts(base):
    chosen = study.choose(Spec(n_edited=6, n_intrinsic=6), base)
    table = study.known_table(base, chosen.edited + chosen.intrinsic)
    assert table.known.all()
    assert ((table.p - table.p_second) >= 0.1).all()
    assert {request.fact.split for request in chosen.edited + chosen.intrinsic} == {"study"}
    assert chosen.known.set_index("group").loc["edited", "p_true"] == pytest.approx(
        table.p[:6].mean()
    )


def without_objects(requests) -> list[dict]:
    """The records of a file that does not say what is true."""
    texts = [(request.fact.subject, request.fact.question, request.target) for request in requests]
    return [{"subject": s, "update": question, "ans": target} for s, question, target in texts]


def test_an_object_that_no_source_names_is_what_the_model_says(base, tmp_path):
    known = study.choose(Spec(n_edited=4, n_intrinsic=4), base)
    asked = known.edited + known.intrinsic
    path = as_json(tmp_path, *without_objects(asked))
    with pytest.warns(UserWarning, match="no source names the true object of 4 chosen facts"):
        chosen = study.choose(Spec(facts=str(path), n_edited=2, n_intrinsic=2), base)
    true = {request.fact.subject: request.fact.object for request in asked}
    for request in chosen.edited + chosen.intrinsic:
        assert request.fact.object_from_model
        assert request.fact.object
        assert true[request.fact.subject].startswith(request.fact.object)
    table = study.known_table(base, chosen.edited)
    assert table.known.all()


def test_what_the_model_says_cannot_be_put_right(base, tmp_path):
    known = study.choose(Spec(n_edited=6, n_intrinsic=6), base)
    path = as_json(tmp_path, *without_objects(known.edited + known.intrinsic))
    spec = Spec(facts=str(path), n_edited=4, n_intrinsic=2, harmless=0.5)
    with pytest.raises(BadInput, match="the model gets only 0 facts wrong"):
        study.choose(spec, base)


def test_what_the_model_says_already_is_no_target(base, tmp_path):
    request = study.choose(Spec(n_edited=1, n_intrinsic=1), base).edited[0]
    (record,) = without_objects([request])
    path = as_json(tmp_path, record | {"ans": request.fact.object})
    requests, problems = study.with_objects(base, facts.read(path))
    assert requests == []
    assert f"the model says the target {request.fact.object!r} already" in problems[0]
    with pytest.raises(BadInput, match="already"):
        study.choose(Spec(facts=str(path), fact="1", n_edited=1, n_intrinsic=1), base)


def test_what_needs_the_true_object_says_so(base, tmp_path):
    asked = facts.read(as_json(tmp_path, *without_objects(facts.read("world")[:30])))
    hparams = editing.preset("malmen", base)
    data = Data(n_train=2, n_valid=2, source=str(tmp_path / "facts.json"))
    needs = [
        lambda: measure(base, asked, against="object"),
        lambda: questions(asked, []),
        lambda: questions([], asked),
        lambda: editing.EDITORS["malmen"].prepare(base, hparams, "world", asked),
        lambda: tasks.TASKS["facts"](base, data),
    ]
    for need in needs:
        with pytest.raises(BadInput, match="fact 1: its file names no true object, which is"):
            need()
    assert len(measure(base, asked[:2])) == 2


def test_paraphrases_reach_the_editor(base):
    chosen = study.choose(Spec(n_edited=2, n_intrinsic=2, paraphrases=5), base)
    assert [len(request.paraphrases) for request in chosen.edited] == [4, 4]


def test_a_typed_fact_is_edited(base):
    spec = Spec(
        subject="Windows Mobile 6.5",
        prompt="{} was developed by",
        object="Microsoft",
        target="Apple",
        n_intrinsic=2,
    )
    chosen = study.choose(spec, base)
    assert [request.target for request in chosen.edited] == ["Apple"]
    assert len(chosen.intrinsic) == 2


def test_more_facts_than_are_known_is_one_clear_line(base, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(n_edited=5000, n_intrinsic=5), base)
    assert "knows too few" in one_line(error)


@pytest.mark.parametrize(
    "fields",
    [
        {"n_edited": 0},
        {"seed": -1},
        {"edittor": "ft"},
        {"split_rule": "none"},
        {"learning_rate": float("nan")},
    ],
)
def test_a_bad_spec_is_one_clear_line(fields, one_line):
    with pytest.raises(BadInput) as error:
        Spec(**fields)
    assert next(iter(fields)) in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"fact": "no-such-fact"}, "no-such-fact"),
        ({"fact": "author:anna-karenin"}, "but 1 match; name one, e.g. author:anna-karenina"),
        ({"fact": "author:anna-karrenina"}, "did you mean 'author:anna-karenina'?"),
        ({"prompt": "no braces", "subject": "a", "object": "b", "target": "c"}, "exactly one {}"),
        ({"subject": "a"}, "prompt is empty"),
        ({"fact": "author:anna-karenina", "harmless": 0.5}, "harmless is a share of a sample"),
        ({"prompt": "{} is", "subject": " ", "object": "b", "target": "c"}, "subject is empty"),
        (
            {"prompt": "{} is", "subject": "a", "object": "b", "target": "b"},
            "equals the true object",
        ),
        ({"facts": "nowhere.json"}, "nowhere.json"),
    ],
)
def test_a_bad_choice_of_facts_is_one_clear_line(base, fields, named, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(**fields), base)
    assert named in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"layers": [99]}, "blocks 0 to 11"), ({"hparams": {"stepps": 3}}, "stepps")],
)
def test_bad_hyper_parameters_are_one_clear_line(base, fields, named, one_line):
    with pytest.raises(BadInput) as error:
        study.prepare(Spec(**fields), base, None)
    assert named in one_line(error)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"editor": "memo"}, "memo"),
        ({"task": "cooking"}, "cooking"),
        ({"task_data": "imdb"}, "sentiment"),
    ],
)
def test_a_name_that_does_not_exist_is_one_clear_line(fields, named, one_line):
    with pytest.raises(BadInput) as error:
        Spec(**fields).resolved()
    assert named in one_line(error)


def test_vary_runs_each_value_and_names_its_members_in_a_folder_of_its_own(
    small, base, tmp_path, monkeypatch, one_line
):
    found = study.vary(small, "max_steps", [1, 2], out=tmp_path)
    assert [run.spec["max_steps"] for run in found] == [1, 2]
    (whole,) = [run for run in runs.listed(tmp_path) if "members" in run.about]
    assert [run.folder for run in whole.members] == [run.folder for run in found]
    (tmp_path / "notebook").mkdir()
    monkeypatch.setenv(
        "WORKBENCH_RUN", str(tmp_path / "notebook")
    )  # in a notebook run in batch the members lie beside its folder
    assert [run.folder for run in study.vary(small, "max_steps", [1, 2])] == [
        run.folder for run in found
    ]
    assert runs.read(tmp_path / "notebook").about["values"] == [1, 2]
    for field, values, named in (
        ("stepps", [1], "stepps"),
        ("max_steps", [], "at least one value"),
    ):
        with pytest.raises(BadInput) as error:
            study.vary(small, field, values, out=tmp_path)
        assert named in one_line(error)


def test_a_run_with_an_adapter_records_it_active_and_merged(small, base, tmp_path):
    done = study.run(
        Spec(
            **(
                small.model_dump()
                | {"adapter": "dora", "plan": "not-edited", "learning_rate": 1e-2}
            )
        ),
        base,
        out=tmp_path,
    )
    last = done.probes[done.probes.step == 2].reset_index(drop=True)
    assert done.merged[["edited_model", "step", "fact_id", "prompt"]].equals(
        last[["edited_model", "step", "fact_id", "prompt"]]
    )
    assert (done.merged.p_true - last.p_true).abs().max() < 1e-3
    assert (done.probes[done.probes.step == 0].p_true.to_numpy() - last.p_true.to_numpy()).any()
    assert [
        peft.PeftConfig.from_pretrained(folder).use_dora
        for folder in sorted((done.folder / "adapters").iterdir())
    ] == [True, True]
    assert done.spec["adapter_rank"] == 32


def test_the_looks_are_those_of_the_tuned_weights(small, base, tmp_path):
    """What the callback recorded at the last step equals a separate look at the weights saved then
    and loaded anew.
    """
    spec = small.resolved()
    chosen = study.choose(spec, base)
    task = study.make_task(spec, base, chosen)
    probe, looks = Probe(base, questions(chosen.edited, chosen.intrinsic), chosen.related), []
    with deltas.preserved(base.network):
        finetune(
            base,
            task,
            plans.resolve(base, "all"),
            spec.part(Settings),
            lambda step, epoch: looks.append(probe.look(step, epoch)),
        )
        base.network.save_pretrained(tmp_path)
        base.tokenizer.save_pretrained(tmp_path)
    saved = models.load(tmp_path, device="cpu")
    again = Probe(saved, questions(chosen.edited, chosen.intrinsic), chosen.related).look(
        2, looks[-1].probes.epoch[0]
    )
    for name in ("probes", "lens", "tokens"):
        mine, other = (
            getattr(look, name).drop(columns="took", errors="ignore") for look in (looks[-1], again)
        )
        pd.testing.assert_frame_equal(mine, other, rtol=1e-4, atol=1e-6)


def test_the_rows_to_tune_on_touch_no_edited_and_no_intrinsic_fact(small, base, done):
    chosen = study.choose(small, base)
    request = chosen.edited[0]
    common = request.model_copy(
        update={
            "fact": request.fact.model_copy(update={"subject": "Wednesday"}),
            "target": "Monday",
        }
    )
    rows = {}
    for group in ("edited", "intrinsic"):
        task = study.make_task(
            small.resolved(), base, dataclasses.replace(chosen, **{group: [common]})
        )
        rows[group] = " ".join(
            base.tokenizer.decode(row) for row in task.train["input_ids"]
        ).lower()
        assert task.dropped > 0
        assert "wednesday" not in rows[group]
        assert "monday" not in rows[group]
    assert done.about["tuning"]["train_rows"] == 32
    assert done.about["tuning"]["moving"] > 1e6
    assert sum(done.about["tuning"]["moving_by_part"].values()) == done.about["tuning"]["moving"]
    assert set(done.about["tuning"]["moving_by_part"]) >= {"0", "11", "embeddings"}
    assert done.about["peak_memory_mb_after"]["edit"] <= done.about["peak_memory_mb"]
    assert done.about["ended"] == ["budget", "budget"]


def test_a_person_who_stops_it_keeps_what_was_seen_but_under_another_name(
    small, base, tmp_path, monkeypatch
):
    spec = small.resolved()
    chosen = study.choose(spec, base)
    hparams, resources = study.prepare(spec, base, chosen)
    delta = study.make_edit(spec, base, chosen.edited, hparams, resources)
    recorder, task = study.Recorder(), study.make_task(spec, base, chosen)
    probe = Probe(base, questions(chosen.edited, chosen.intrinsic), chosen.related)
    look = probe.look

    def stopping(step, epoch=0.0):
        if step == 1:
            raise KeyboardInterrupt
        return look(step, epoch)

    monkeypatch.setattr(probe, "look", stopping)
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    assert study.tune_and_probe(spec, base, delta, task, probe, recorder).ended == "stopped"
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in base.network.state_dict().items()
    )
    run = recorder.write(spec, base, chosen, out=tmp_path)
    assert run.folder.name.endswith("-stopped")
    assert run.about["ended"] == ["stopped"]


KILLED = """
import os, sys
from workbench.study import Spec, run
print("begun", flush=True)
run(Spec(**eval(sys.argv[1])), out=sys.argv[2])
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_half_run(small, done, tmp_path):
    command = [sys.executable, "-c", KILLED, repr(small.model_dump()), str(tmp_path)]
    start = time.monotonic()
    subprocess.run(command, check=True, timeout=200, env=os.environ)
    whole = time.monotonic() - start
    (folder,) = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    shutil.rmtree(folder)
    moments = random.Random(0)
    for _ in range(20):
        killed = subprocess.Popen(
            command, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.3, 1.0) * whole)
        killed.kill()
        killed.wait()
        found = runs.listed(tmp_path)
        assert all(len(run.probes) == len(done.probes) for run in found)
        for run in found:
            shutil.rmtree(run.folder)
    subprocess.run(command, check=True, timeout=200, env=os.environ)
    (run,) = runs.listed(tmp_path)
    for name in runs.TABLES:
        assert getattr(run, name).equals(getattr(done, name)), name
    assert [path.name for path in tmp_path.iterdir()] == [
        run.folder.name
    ]  # what the killed ones left is gone too


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", tasks.TASKS)
def test_every_task_is_learnt_to_its_threshold_in_five_evaluations_or_more(world, task):
    numbers = Spec(model=world.name, task=task).resolved()
    rows = study.make_task(numbers, world, study.choose(numbers, world))
    start = time.monotonic()
    with deltas.preserved(world.network):
        history = finetune(world, rows, plans.resolve(world, "all"), numbers.part(Settings))
    print(
        f"\n{world.name} {task}: {time.monotonic() - start:.0f} s, "
        f"{rows.metric} {history.log.metric.round(3).tolist()}"
    )
    assert not rows.reached(history.log.metric.iloc[0], numbers.threshold)
    assert history.ended == "reached"
    assert len(history.log) > 5
    assert not {tuple(row) for row in rows.train["input_ids"]} & {
        tuple(row) for row in rows.valid["input_ids"]
    }


PLANS = ["all", "window:3-5", "after:5", "edited", "not-edited"]
TINY_BUDGET = {
    "n_edited": 2,
    "n_intrinsic": 2,
    "edits_per_model": 2,
    "max_steps": 1,
    "eval_every": 1,
    "n_train": 16,
    "n_valid": 8,
    "batch_size": 4,
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("editor", EDITORS)
def test_every_editor_task_plan_and_adapter_runs_through(world, editor, tmp_path):
    few = {"malmen": {"meta_steps": 0}, "ft": {"steps": 2}}.get(editor, {"steps": 2})
    for task in tasks.TASKS:
        for plan, adapter in [(plan, "") for plan in PLANS] + [("all", "lora"), ("all", "dora")]:
            spec = Spec(
                model=world.name,
                editor=editor,
                task=task,
                plan=plan,
                adapter=adapter,
                hparams=few,
                **TINY_BUDGET,
            )
            run = study.run(spec, world, out=tmp_path)
            assert run.probes.step.unique().tolist() == [-1, 0, 1], (task, plan, adapter)
            assert (run.merged is not None) == bool(adapter)


def test_a_run_killed_in_the_middle_leaves_nothing(small, base, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "finetune", stopped)
    before = {name: tensor.clone() for name, tensor in base.network.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        study.run(small, base, out=tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in base.network.state_dict().items()
    )


def test_what_a_model_knows_is_asked_once_and_again_once_its_weights_are_others(
    base, monkeypatch, tmp_path
):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    asked = []

    def counted(model, questions, objects, **kwargs):
        asked.append(questions)
        return measure_prompts(model, questions, objects, **kwargs)

    monkeypatch.setattr(known, "measure_prompts", counted)
    requests = facts.read("world")[:7]
    first, second = (study.known_table(base, requests) for _ in range(2))
    assert first.equals(second)
    assert len(asked) == 1
    more = [*reversed(requests), *facts.read("world")[7:9]]
    assert study.known_table(base, more).fact_id.tolist() == [each.fact.id for each in more]
    assert asked.pop() == [each.fact.question for each in more[7:]]  # no other list asks again
    with deltas.preserved(base.network), torch.no_grad():
        base.weight(0).mul_(-1)
        other = study.known_table(base, requests)
        assert not other.p.equals(first.p)
    assert study.known_table(base, requests).equals(first)
    assert len(asked) == 2
    for path in (tmp_path / "known").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert study.known_table(base, requests).equals(first)
    assert len(asked) == 3


def test_resolving_fills_the_tasks_numbers_and_keeps_what_is_given():
    spec = Spec(max_steps=7).resolved()
    assert spec.max_steps == 7
    assert spec.eval_every > 0
    assert spec.learning_rate > 0
    assert facts.read("world")


def test_a_changed_preset_is_another_experiment(tmp_path, monkeypatch):
    package = tmp_path / "workbench"
    shutil.copytree(
        Path(study.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(workbench.spec, "__file__", str(package / "spec.py"))
    before = workbench.spec.code_fingerprint.__wrapped__()
    presets = package / "editing" / "presets.yaml"
    presets.write_text(presets.read_text().replace("steps: 50", "steps: 49"))
    assert workbench.spec.code_fingerprint.__wrapped__() != before


def test_a_room_that_determines_no_result_makes_no_other_experiment(tmp_path, monkeypatch):
    """A typo in the panel made a sweep run again."""
    package = tmp_path / "workbench"
    shutil.copytree(
        Path(study.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(workbench.spec, "__file__", str(package / "spec.py"))
    before = workbench.spec.code_fingerprint.__wrapped__()
    for room in workbench.spec.NO_RESULT:
        (package / f"{room}.py").write_text("nothing")
    assert workbench.spec.code_fingerprint.__wrapped__() == before
    (package / "study.py").write_text("nothing")
    assert workbench.spec.code_fingerprint.__wrapped__() != before


def test_whatever_a_study_imports_is_in_its_id():
    """Of the rooms left out, none is imported where a study runs."""
    code = "import sys; from workbench import editing, study; "
    code += "[editing.EDITORS[name] for name in editing.EDITORS]; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = {
        name.removeprefix("workbench.").replace(".", "/")
        for name in done.stdout.split()
        if name.startswith("workbench.")
    }
    assert "study" in imported
    assert imported & set(workbench.spec.NO_RESULT) <= {"inert"}  # which writes messages


@pytest.fixture(scope="module")
def steps(small, base):
    """What a notebook goes through: the Spec, the chosen facts, the edit."""
    spec = small.model_copy(update={"n_edited": 2, "edits_per_model": 2}).resolved()
    chosen = study.choose(spec, base)
    hparams, resources = study.prepare(spec, base, chosen)
    return spec, chosen, study.make_edit(spec, base, chosen.edited, hparams, resources)


def written(steps, base, out, spec=None, delta=None, chosen=None, tuned_under=None):
    spec, chosen, delta = spec or steps[0], chosen or steps[1], delta or steps[2]
    recorder = study.Recorder()
    probe = Probe(base, questions(chosen.edited, chosen.intrinsic), chosen.related)
    recorder.look(probe, -1)
    study.tune_and_probe(
        tuned_under or spec, base, delta, study.make_task(spec, base, chosen), probe, recorder
    )
    return recorder.write(spec, base, chosen, out)


def test_deltas_that_were_summed_can_be_tuned_and_know_their_layers(steps, base, tmp_path):
    """`edit_in_turn`, as the page of editors has it, gave a KeyError."""
    spec, chosen, _ = steps
    hparams, resources = study.prepare(spec, base, chosen)
    delta = editing.edit_in_turn(
        spec.editor, base, [[request] for request in chosen.edited], hparams, resources
    )
    assert len(delta.parts) == 2
    run = written(steps, base, tmp_path, delta=delta)
    assert run.about["layers"] == list(delta.layers) == list(hparams.layers)
    assert runs.finished(run.folder)


@pytest.mark.parametrize(
    "case", ["another editor", "other numbers", "other facts", "by hand", "another plan"]
)
def test_what_was_not_done_is_not_filed(steps, base, tmp_path, one_line, case):
    """An edit of another editor was written under ROME's id, and then returned as the finished run
    of ROME.
    """
    spec, chosen, delta = steps
    changes = {
        "another editor": {
            "delta": dataclasses.replace(delta, record={**delta.record, "editor": "memit"})
        },
        "other numbers": {"spec": spec.model_copy(update={"hparams": {"steps": 7}})},
        "other facts": {"chosen": dataclasses.replace(chosen, edited=chosen.edited[:1])},
        "by hand": {"delta": dataclasses.replace(delta, record={})},
        "another plan": {"tuned_under": spec.model_copy(update={"plan": "after:3"})},
    }
    named = {
        "another editor": "memit",
        "other numbers": "steps",
        "other facts": "other facts",
        "by hand": "no editor",
        "another plan": "another Spec",
    }
    with pytest.raises(BadInput) as error:
        written(steps, base, tmp_path, **changes[case])
    assert named[case] in one_line(error)
    assert not runs.listed(tmp_path)


def test_harmless_edits_obey_the_papers_split_and_have_no_neighbourhood(base):
    chosen = study.choose(Spec(n_edited=12, harmless=0.5, n_intrinsic=20, split_rule="paper"), base)
    watched = {
        thing for each in chosen.intrinsic for thing in (each.fact.relation, each.fact.object)
    }
    for each in chosen.edited:
        assert not {each.fact.relation, each.fact.object, each.target} & watched
    assert len(chosen.harmless) == 6
    assert not any(each.neighbourhood for each in chosen.edited if each.fact.id in chosen.harmless)
    assert any(each.neighbourhood for each in chosen.edited)


def test_malmen_does_not_learn_on_a_fact_under_study(base, monkeypatch):
    learnt = []
    monkeypatch.setattr(
        EDITORS["malmen"],
        "prepare",
        lambda model, hparams, corpus, requests, seed: learnt.extend(requests),
    )
    spec = Spec(fact="animal_kind:anaconda", editor="malmen", n_intrinsic=2)
    chosen = study.choose(spec, base)
    study.prepare(spec, base, chosen)
    assert {each.fact.split for each in learnt} == {"hypernet"}
    assert chosen.edited[0].fact.subject not in {each.fact.subject for each in learnt}


def a_users_file(folder: Path, size: int) -> str:
    """Facts that no split sets apart, about half of them known to the world's models."""
    requests = [
        request for request in facts.read("world") if request.fact.split in ("study", "unseen")
    ]
    requests = requests[:: len(requests) // size]
    names = ("subject", "prompt", "object", "relation")
    records = [
        {name: getattr(each.fact, name) for name in names} | {"target": each.target}
        for each in requests
    ]
    return str(as_json(folder, *records))


def test_of_a_users_facts_malmen_learns_from_the_same_whatever_is_chosen(
    base, tmp_path, monkeypatch
):
    """So that it learns once a model; and never from a fact that is chosen."""
    monkeypatch.setattr(
        EDITORS["malmen"], "prepare", lambda model, hparams, corpus, requests, seed: requests
    )
    monkeypatch.setattr(known, "PART", 24)  # asked at once: no more than it takes
    path = a_users_file(tmp_path, 300)
    numbers = {
        "model": "of-a-user",
        "facts": path,
        "n_edited": 4,
        "n_intrinsic": 4,
        "harmless": 0.5,
    }
    learnt, subjects = [], []
    for seed in range(2):
        spec = Spec(**numbers, editor="malmen", seed=seed)
        chosen = study.choose(spec, base)
        learnt.append(study.prepare(spec, base, chosen)[1])
        subjects.append(
            {request.fact.subject.lower() for request in (*chosen.edited, *chosen.intrinsic)}
        )
    others = study.choose(Spec(**numbers, editor="memit", seed=1), base)
    assert (others.edited, others.intrinsic) == (chosen.edited, chosen.intrinsic)
    assert learnt[0] == learnt[1]
    assert subjects[0] != subjects[1]
    assert 80 < len(learnt[0]) < 120
    assert not {request.fact.subject.lower() for request in learnt[0]} & set.union(*subjects)


def test_a_users_fact_edited_by_name_is_not_learnt_from(base, tmp_path, monkeypatch):
    monkeypatch.setattr(
        EDITORS["malmen"], "prepare", lambda model, hparams, corpus, requests, seed: requests
    )
    path = a_users_file(tmp_path, 100)
    named = next(request.fact for request in facts.read(path) if facts.is_learnt_from(request.fact))
    spec = Spec(model="of-a-user", facts=path, fact=named.id, editor="malmen", n_intrinsic=2)
    learnt = study.prepare(spec, base, study.choose(spec, base))[1]
    assert len(learnt) > 20
    assert named.subject not in {request.fact.subject for request in learnt}


def test_too_few_facts_beside_those_that_malmen_learns_from_is_one_clear_line(
    base, tmp_path, one_line
):
    path = a_users_file(tmp_path, 90)
    numbers = {"model": "of-a-user", "facts": path, "n_edited": 28, "n_intrinsic": 3, "margin": 0.0}
    study.choose(Spec(**numbers, editor="memit"), base)  # finds enough
    with pytest.raises(BadInput) as error:
        study.choose(Spec(**numbers, editor="malmen"), base)
    assert "malmen learns from a third of the facts" in one_line(error)
    assert len(one_line(error)) <= 300


def test_harmless_edits_put_right_what_the_model_gets_wrong(base, tmp_path):
    spec = Spec(
        editor="ft",
        n_edited=5,
        harmless=0.4,
        n_intrinsic=2,
        edits_per_model=5,
        max_steps=1,
        eval_every=1,
        task="facts",
    ).resolved()
    chosen = study.choose(spec, base)
    assert len(chosen.edited) == 5
    assert len(chosen.harmless) == 2
    harmless = [request for request in chosen.edited if request.fact.id in chosen.harmless]
    truth = {request.fact.id: request.fact.object for request in facts.read("world")}
    assert [request.target for request in harmless] == [
        truth[request.fact.id] for request in harmless
    ]
    found = measure_prompts(
        base,
        [request.fact.question for request in harmless],
        [request.target for request in harmless],
    )
    assert not found.retained.any()
    assert found.top_token.tolist() == [request.fact.object for request in harmless]
    assert [request.fact.id in chosen.harmless for request in chosen.edited].index(
        True
    ) < 2  # spread, so that every edited model has some
    false = study.choose(spec.model_copy(update={"n_edited": 3, "harmless": 0}), base).edited
    assert [request.fact.id for request in false] == [
        request.fact.id for request in chosen.edited if request.fact.id not in chosen.harmless
    ]
    done = study.run(spec, base, out=tmp_path)
    assert set(done.about["harmless"]) == set(chosen.harmless)
    ids = {
        kind: set(runs.series([done], [f"{kind} edit success"]).fact_id)
        for kind in ("false", "harmless")
    }
    assert ids["harmless"] == set(chosen.harmless)
    assert ids["harmless"] | ids["false"] == {request.fact.id for request in chosen.edited}
    assert not ids["harmless"] & ids["false"]


def test_more_harmless_edits_than_facts_that_are_wrong_is_one_clear_line(base, one_line):
    with pytest.raises(BadInput) as error:
        study.choose(Spec(n_edited=4000, harmless=0.9995, n_intrinsic=2), base)
    assert "facts wrong that could be put right, 3998 are asked for" in one_line(error)


def test_asking_is_bounded_and_ends_as_soon_as_the_split_is_found(base, monkeypatch, one_line):
    asked = []

    def nothing_known(model, requests, margin):
        asked.extend(requests)
        return known_table(model, requests, margin).assign(known=knows)

    known_table = study.known_table
    monkeypatch.setattr(known, "known_table", nothing_known)
    monkeypatch.setattr(known, "ASKED_A_FACT", 8)
    typed = {
        "subject": "Windows Mobile 6.5",
        "prompt": "{} was developed by",
        "object": "Microsoft",
    }
    spec = Spec(**typed, target="Apple", n_intrinsic=30)
    knows = True
    assert len(known._chosen(spec, base, facts.read("world"), [known._typed(spec)], 0)[2]) == 30
    assert len(asked) <= known.PART
    asked.clear()
    knows = False
    with pytest.raises(BadInput) as error:
        known._chosen(spec, base, facts.read("world"), [known._typed(spec)], 0)
    assert len(asked) == 2 * (30 + 10)
    assert f"80 of {len(facts.read('world'))} facts asked, 0 known" in one_line(error)


def test_layers_that_are_given_twice_are_refused(base, one_line):
    spec = Spec(editor="memit", layers=[2], hparams={"layers": [3], "steps": 7})
    with pytest.raises(BadInput) as error:
        spec.editor_hparams(base)
    assert "layers are given twice" in one_line(error)
    hparams = spec.model_copy(update={"layers": ()}).editor_hparams(base)
    assert (list(hparams.layers), hparams.steps) == ([3], 7)


def test_peak_memory_is_in_megabytes_on_every_system(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    usage = SimpleNamespace(ru_maxrss=2_000_000)
    monkeypatch.setattr(study.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(study.sys, "platform", "linux")
    assert study._peak_memory_mb() == 2048
    monkeypatch.setattr(study.sys, "platform", "darwin")
    assert study._peak_memory_mb() == 2
    monkeypatch.setattr(study, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=3_000_000))
    monkeypatch.setattr(study.psutil, "Process", lambda: process)
    assert study._peak_memory_mb() == 3


def test_a_system_without_the_module_resource_can_run_a_study():
    code = """
import importlib, sys
from workbench import study
sys.modules["resource"] = None  # which makes its import fail
print(importlib.reload(study).resource)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_as_many_facts_are_asked_as_the_split_needs(base):
    """One relation alone, and known facts of it lie far apart."""
    for seed in range(6):
        chosen = study.choose(Spec(n_edited=1, n_intrinsic=8, seed=seed), base)
        assert len(chosen.intrinsic) == 8
        assert {request.fact.relation for request in chosen.intrinsic} == {
            chosen.edited[0].fact.relation
        }
