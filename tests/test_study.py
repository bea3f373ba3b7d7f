import dataclasses
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import pandas as pd
import peft
import pytest
import torch

from workbench import cache, deltas, editing, edits, known, models, moments, runs, study
from workbench.editing import EDITORS
from workbench.editing.records import NotTaken
from workbench.facts import BadInput
from workbench.study import Spec
from workbench.tracking.probes import Probe, questions
from workbench.tuning import plans, tasks
from workbench.tuning.finetune import Settings, finetune


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


def refused(*_):
    raise AssertionError("is made again")


def test_a_run_of_another_plan_takes_edits_moments_and_known_facts_from_the_cache(
    small, base, done, tmp_path, monkeypatch
):
    monkeypatch.setattr(editing, "edit_each", refused)
    monkeypatch.setattr(moments, "_collect", refused)
    monkeypatch.setattr(known, "measure_prompts", refused)
    other = study.run(small.model_copy(update={"plan": "edited"}), base, out=tmp_path)
    assert other.folder.name != done.folder.name
    for paths in zip(other.deltas, done.deltas, strict=True):
        edit, earlier = map(deltas.load, paths)
        assert edit.record == earlier.record
        ours, theirs = edit.tensors(), earlier.tensors()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_seed_number_or_fact_is_another_edit(small, base, monkeypatch):
    chosen = study.choose(small, base)
    numbers, resources = study.prepare(small, base, chosen)
    first = study.make_edit(small, base, chosen.edited, numbers, resources)
    monkeypatch.setattr(editing, "edit_each", refused)
    again = study.make_edit(small, base, chosen.edited, numbers, resources)
    assert again.record == first.record
    more = numbers.model_copy(update={"steps": numbers.steps + 1})
    seeded = small.model_copy(update={"seed": 1})
    for spec, edited, hparams in (
        (seeded, chosen.edited, numbers),
        (small, chosen.edited[:1], numbers),
        (small, chosen.edited, more),
    ):
        with pytest.raises(AssertionError, match="is made again"):
            study.make_edit(spec, base, edited, hparams, resources)
    with first.applied(base), pytest.raises(AssertionError, match="is made again"):
        study.make_edit(small, base, chosen.edited, numbers, resources)


def test_an_edit_from_the_cache_is_warned_of_too_and_a_damaged_one_is_made_again(small, base):
    chosen = study.choose(small, base)
    numbers, resources = study.prepare(small, base, chosen)
    few = numbers.model_copy(update={"steps": 1})
    for _ in range(2):
        with pytest.warns(NotTaken, match="0 of 2 edits took"):
            first = study.make_edit(small, base, chosen.edited, few, resources)
    kept = max(cache.folder("edits").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    kept.write_bytes(kept.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="it is made anew"):
        again = study.make_edit(small, base, chosen.edited, few, resources)
    assert again.record == first.record


def test_an_edit_after_others_is_not_the_one_without_them(base, requests):
    """AlphaEdit leaves the keys of earlier edits alone, which the cache must not forget."""
    spec = Spec(editor="alphaedit", hparams={"layers": [3], "steps": 2})
    chosen = known.Chosen(edited=requests, intrinsic=[], known=None, related={})
    numbers, resources = study.prepare(spec, base, chosen)
    make = partial(study.make_edit, spec, base)
    first = make(requests[:1], numbers, resources)
    alone = make(requests[1:2], numbers, resources)
    after = make(requests[1:2], numbers, EDITORS["alphaedit"].remember(resources, first))
    (name,) = alone.changes
    (key,) = first.keys[name].T
    norms = [(edit.changes[name].matrix() @ key.float()).norm() for edit in (alone, after)]
    assert norms[1] < 0.9 * norms[0]


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
    few = {"malmen": {"meta_steps": 0}, "incontext": {}}.get(editor, {"steps": 2})
    alone = [plan for plan in PLANS if editor != "incontext" or "edited" not in plan]  # edits none
    for task in tasks.TASKS:
        for plan, adapter in [(plan, "") for plan in alone] + [("all", "lora"), ("all", "dora")]:
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


@pytest.mark.parametrize("adapter", ["", "lora"])
def test_another_copy_takes_the_weights_as_they_are_at_the_end(steps, base, adapter):
    spec, chosen, delta = steps
    spec = spec.model_copy(update={"adapter": adapter, "learning_rate": 1e-3}).resolved()
    other = study.load(spec)
    untuned = other.fingerprint
    recorder = study.Recorder()
    asked = questions(chosen.edited, chosen.intrinsic)
    probe = Probe(base, asked, chosen.related)
    task = study.make_task(spec, base, chosen)
    study.tune_and_probe(spec, base, delta, task, probe, recorder, into=other)
    seen = recorder.table("merged" if adapter else "probes").query("step == 2")
    again = Probe(other, asked, chosen.related).look(2, 0.0).probes
    assert len(seen) == len(again)
    assert again.p_edited.tolist() == pytest.approx(seen.p_edited.tolist(), rel=1e-4)
    before = Probe(base, asked, chosen.related).look(2, 0.0).probes
    assert (before.p_edited - again.p_edited).abs().max() > 0.1
    assert other.fingerprint != untuned == base.fingerprint


def test_another_copy_cannot_take_an_edit_that_changes_no_weight(steps, base, one_line):
    spec, chosen, _ = steps
    probe = Probe(base, questions(chosen.edited, chosen.intrinsic), chosen.related)
    with pytest.raises(BadInput) as error:
        study.tune_and_probe(
            spec, base, edits.Edit.of(base), None, probe, study.Recorder(), into=base
        )
    assert "no change of weights" in one_line(error)


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


@pytest.mark.parametrize("editor", ["grace", "incontext"])
def test_a_run_of_it_is_written_and_read(tiny_folders, editor, tmp_path):
    layers = {"layers": (1,), "hparams": {"steps": 3}} if editor == "grace" else {}
    spec = study.Spec(
        model=str(tiny_folders["gpt2"]),
        editor=editor,
        **layers,
        margin=0,
        fact="developer:windows-mobile-6-5",
        n_edited=1,
        n_intrinsic=0,
        plan="window:0-0",
        n_train=4,
        n_valid=2,
        max_steps=2,
        eval_every=1,
        batch_size=2,
    )
    run = study.run(spec, out=tmp_path)
    assert run.about["layers"] == list(spec.layers)
    assert deltas.load(run.deltas[0]).record["editor"] == editor
    assert set(run.probes.step) == {-1, 0, 1, 2}


SHORT = {"n_train": 32, "n_valid": 4, "batch_size": 2, "max_steps": 1, "eval_every": 1}


def test_a_study_of_an_edit_is_of_its_facts_and_of_nothing_else(
    steps, base, tmp_path, one_line, monkeypatch
):
    """Of other facts the finished run of the edit's was handed back; what else did not fit was
    refused after the tuning.
    """
    _, chosen, edit = steps
    made = partial(study.of_edit, base, edit, out=tmp_path, n_intrinsic=0, **SHORT)
    run = made(requests=chosen.edited)
    monkeypatch.setattr(study, "tune_and_probe", refused)
    assert made(requests=chosen.edited).folder == run.folder
    own = "model, edit and requests say it"
    for requests, fields, why in (
        (chosen.intrinsic[:2], {}, "other facts"),
        (chosen.edited[:1], {}, "other facts"),
        ([*chosen.edited, chosen.edited[0]], {}, "one twice"),
        ([], {}, "n_edited"),
        (chosen.edited, {"layers": [5]}, f"layers: {own}"),
        (chosen.edited, {"editor": "memit"}, f"editor: {own}"),
        (chosen.edited, {"plan": "after-edit"}, "plan 'after-edit': choose all"),
    ):
        with pytest.raises(BadInput) as error:
            made(requests=requests, **fields)
        assert why in one_line(error)


def test_no_study_of_a_model_that_holds_an_edit(small, steps, base, tmp_path, one_line):
    """It was filed under the id of the model without it."""
    _, chosen, edit = steps
    for study_of_it in (
        partial(study.run, small, base, out=tmp_path),
        partial(study.of_edit, base, edit, chosen.edited, out=tmp_path),
    ):
        with deltas.applied(base, edit), pytest.raises(BadInput) as error:
            study_of_it()
        assert "holds an edit" in one_line(error)
    assert not runs.listed(tmp_path)


def test_no_arm_is_run_before_all_can_be(small, base, tmp_path, one_line):
    last = small.model_copy(update={"layers": (11,)})
    for spec, plan, why in (
        (small, "after-edit", "choose all"),
        (last, "after-edited", "no block"),
    ):
        with pytest.raises(BadInput) as error:
            study.vary(spec, "plan", ["all", plan], out=tmp_path, model=base)
        assert why in one_line(error)
    assert not list(tmp_path.iterdir())


def test_an_editor_that_chooses_its_block_itself_goes_with_a_plan_by_edit(
    small, base, tmp_path, monkeypatch
):
    def mine(model, requests, size: float = 1.0):
        left, right = (
            torch.zeros(model.weight(2).shape[0], 1),
            torch.zeros(model.weight(2).shape[1], 1),
        )
        left[0], right[0] = size, 1
        change = deltas.Change(left=left, right=right)
        return deltas.WeightDelta.of(model, changes={model.down_projection_name(2): change})

    monkeypatch.setattr(EDITORS, "_ready", dict(EDITORS._ready))
    EDITORS.register("mine", mine)
    spec = small.model_copy(update={"editor": "mine", "plan": "after-edited", "n_edited": 1})
    with pytest.warns(NotTaken):
        run = study.run(spec, base, out=tmp_path)
    assert list(run.about["tuning"]["moving_by_part"]) == [str(block) for block in range(3, 12)]


def test_what_differs_between_edited_models_is_said_of_each():
    two = [{"task": "facts", "moving": 5}, {"task": "facts", "moving": 3}]
    assert study._in_common(two) == {"task": "facts", "moving": [5, 3]}
    assert study._in_common(two[:1]) == two[0]
    assert study._in_common([]) == {}


@pytest.mark.parametrize("given", [{"editor": "rome"}, "world-gpt2", None])
def test_a_study_is_of_a_spec_or_a_model(given, one_line):
    with pytest.raises(BadInput) as error:
        study(given, task="text")
    assert "neither a Spec nor a model; give wb.Spec" in one_line(error)
