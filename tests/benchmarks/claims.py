"""What two studies claim of edits under fine-tuning, judged on runs of the grids of data/findings.

    workbench sweep data/findings/retention.yaml --out runs/findings   # and the other grids
    python -m tests.benchmarks.claims --collect runs/findings          # runs -> looks.csv
    python -m tests.benchmarks.claims                                  # looks.csv -> claims.csv

`looks.csv` has a row an edited model and look. Its column `edited` has a letter a fact, in the
order of their ids: - the edit did not take; 1 it is said; else what the likeliest token is, t the
true answer, r a related one, s a stop word, e the edit's own first token (without its rest), o any
other. `intrinsic` has 1 or 0 a fact. Arms that differ in one field share facts and seed, and are
paired.

`kept` is of edits that took, and of intrinsic facts that the edited model says before the tuning.
Arms that are compared are alike in every field but the one that the claim is about, and of the
seeds that both have. Intervals are of 95 %, by bootstrap over seeds and facts; ten facts of one
model share its fate, which of one seed no interval knows, and of two hardly. Differences are taken
fact by fact where both arms have the fact, else (edited less intrinsic) by Newcombe's rule of two
intervals, or by a bootstrap that draws the seeds of both together where that is wider. A claim of a
difference holds where its interval lies on the claimed side of 0, does not where it lies on the
other, and is undecided otherwise; one of no difference holds where it lies within .1 of 0, and does
not where it lies wholly beyond; of fewer than 5 facts every claim is undecided.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pandas as pd

from tests.benchmarks import outcomes
from tests.benchmarks.outcomes import FINDINGS
from workbench import runs
from workbench.runs import value_name
from workbench.tuning.numbers import usual

SETTING = ["task_data", "learning_rate"]  # every claim is judged within one of each
ARM = [
    *("model", "revision", "editor", "layers", "paraphrases", "n_edited"),
    *("task", "plan", "adapter", *SETTING),
]
COPY = [*ARM, "seed", "edited_model"]
FACT = ["editor", "task", "seed", "place"]
SAME = 0.1  # a share within which two are called equal
FEWEST = 5  # facts that decide anything
USUAL = {"revision": "none", "layers": "preset", "paraphrases": "1", "n_edited": "10"}
USUAL |= {"plan": "all", "adapter": "none", "task_data": "none", "learning_rate": "usual"}
READ = ("level", "end", "steps", "distance")
OTHERWISE = "at one (?:end|steps|distance)"  # read so, and not at one level
LATE = "after:8"
WINDOWS = ("window:5-7", "window:8-10")
MOVES = (
    *("all", "window:0-11", "not-edited", "after:2", "after:5", "after:8", "after:20"),
    *("edited", "window:2-4", "window:5-7", "window:8-10"),
)
OF_DEEP = ("window:0-29", "window:12-16", "window:20-24")
WINDOWS_OF = ("all", "window:0-2", "window:2-4", "window:5-7", "window:8-10")
WINDOWS_OF += ("window:1-5", "window:6-10", *OF_DEEP)
BLOCKS = "window:0-11"  # all of them; embeddings and head stay, as under every plan but `all`
BATCHES = (1, 10, 30, 100)  # edits at once
SINGLE = (1, 10)  # of so many
MEMORY = ("grace", "incontext")  # editors that leave the weights as they are
MIXED = (20, 60)  # edits at once, half of them harmless
DEEP = "smollm2-135m"
ON_EDIT = "window:2-4"  # the blocks that MEMIT and AlphaEdit write; ROME writes the middle one
EARLY = {DEEP: 13}  # blocks that are early; of 12, five
MOST = {DEEP: "6"}  # statements that an edit can have; of the world's facts, ten
ROMES = {DEEP: "6"}  # the block of ROME's preset; of the small models, 3
DEEPER = {  # of 30 blocks in the place of 12, of which MEMIT writes 2 to 6
    LATE: "after:20",
    BLOCKS: "window:0-29",
    ON_EDIT: "edited",
    **dict(zip(WINDOWS, ("window:12-16", "window:20-24"), strict=True)),
}

Result = tuple[float, float, float, int, int]  # mean, low, high, facts, seeds


def looked(run: runs.Run) -> pd.DataFrame:
    """The looks of a run, a row each.

    Raises:
        ValueError: it differs from others in what the table has no column for.
    """
    batch = (run.spec["edits_per_model"], run.spec["n_edited"])
    if run.spec.get("protect") or (batch[0] != batch[1] and batch != SINGLE):
        what = "protected, or neither all edits at once nor ten, one at a time"
        raise ValueError(f"{run.folder}: {what}; not of these grids")
    numbers = usual(run.spec["task"], run.spec["task_data"], run.spec["model"])
    usual_rate = numbers.adapter_learning_rate if run.spec["adapter"] else numbers.learning_rate
    rate = run.spec["learning_rate"]
    training = run.training.set_index(["edited_model", "step"])
    harmless = set(run.about["harmless"])
    fields = {name: value_name(run.spec[name]) for name in ARM} | {"seed": run.spec["seed"]}
    fields["n_edited"] = str(run.spec["edits_per_model"])
    fields["task_data"] = Path(fields["task_data"]).stem
    fields["learning_rate"] = "usual" if rate in (0, usual_rate) else f"{rate:g}"
    rows = []
    probes = run.probes[run.probes.step >= 0].sort_values("fact_id")
    for place, look in probes.groupby(["edited_model", "step"]):
        edited = look[look.group == "edited"]
        took = edited[edited.took.astype(bool)]
        others = look[look.group == "paraphrase"]
        others = others[others.fact_id.isin(took.fact_id)]
        rows.append(
            fields
            | {"edited_model": place[0], "step": place[1], "run": run.folder.name}
            | training.loc[place, ["metric", "moved"]].to_dict()
            | {
                "edited": "".join(map(_letter, edited.itertuples())),
                "harmless": "".join(str(int(one in harmless)) for one in edited.fact_id),
                "held_out": others.retained.astype(float).mean(),
                "intrinsic": _digits(look[look.group == "intrinsic"].retained),
            }
        )
    return pd.DataFrame(rows)


def _letter(fact) -> str:
    if not fact.took:
        return "-"
    return "1" if fact.retained else str(fact.top_category)[0]


def _digits(values: pd.Series) -> str:
    return "".join(str(int(value)) for value in values)


def collect(folder: Path, out: Path) -> None:
    """Add the looks of the finished runs below a folder; a copy that is there is replaced whole."""
    tables = [looked(run) for run in runs.collect(folder)]
    if out.exists():
        tables.insert(0, read(out).drop(columns="known"))
    whole = pd.concat(tables).astype(dict.fromkeys(ARM, str))
    newest = whole.groupby(COPY).run.transform("last")
    whole = whole[whole.run == newest].drop_duplicates([*COPY, "step"], keep="last")
    whole = whole.sort_values([*COPY, "step"])
    whole.to_csv(out, index=False, float_format="%.5g")


def read(path: Path) -> pd.DataFrame:
    """With `known`: the intrinsic facts that the edited model says before the tuning."""
    words = dict.fromkeys((*ARM, "edited", "harmless", "intrinsic"), str)
    looks = pd.read_csv(path, dtype=words, keep_default_na=False, na_values={"held_out": [""]})
    starts = looks[looks.step == 0].set_index(COPY).intrinsic.rename("known")
    return looks.join(starts, on=COPY, validate="m:1")


def arms(looks: pd.DataFrame, *varied: str, **fixed) -> pd.DataFrame:
    """Rows that differ in these fields, and in editor, task and seed; the others are as usual, or
    as given.
    """
    for name, value in (USUAL | fixed).items():
        if name not in varied:
            looks = looks[looks[name] == str(value)]
    return looks


def even(looks: pd.DataFrame, varied: str) -> pd.DataFrame:
    """The seeds that all arms have which differ in one field alone."""
    others = [name for name in ARM if name != varied]
    every = looks.groupby(others)[varied].transform("nunique")
    return looks[looks.groupby([*others, "seed"])[varied].transform("nunique") == every]


def chosen(looks: pd.DataFrame, varied: str, how: str) -> pd.DataFrame:
    """One look of each copy, or two that share (`share`). `level`: where the metric first is at the
    loosest of the arms' best ones; `distance`: where it first is as far from the start as the arm
    went that went least; both between two looks, as they lie about it. `end`: the last look;
    `steps`: the one at the last step that all arms have.
    """
    if how == "end" or looks.empty:
        return looks[looks.step == looks.groupby(COPY).step.transform("max")]
    parts = []
    for _, alike in looks.groupby([name for name in COPY if name != varied]):
        sign = 1 if alike.task.iloc[0] in ("text", "instructions") else -1
        metric = sign * alike.metric
        copies = alike.groupby(COPY)
        if how == "level":
            best = metric.groupby([alike[name] for name in COPY]).min().max()
            parts += [_first(copy, sign * copy.metric, best) for _, copy in copies]
        elif how == "steps":
            common = set.intersection(*(set(one.step) for _, one in copies))
            parts.append(alike[alike.step == max(common)])
        else:
            least = copies.moved.max().min()
            parts += [_first(copy, -copy.moved, -least) for _, copy in copies]
    return pd.concat(parts)


def _first(copy: pd.DataFrame, values: pd.Series, most: float) -> pd.DataFrame:
    """The first look of a copy with a value of at most so much and the one before, with shares."""
    number = int((values <= most).to_numpy().argmax())
    both = copy.iloc[max(number - 1, 0) : number + 1]
    if len(both) == 1:
        return both.assign(share=1.0)
    before, after = values.iloc[number - 1 : number + 1]
    part = (before - most) / (before - after)
    return both.assign(share=[1 - part, part])[-2 + int(part == 1) :]


def facts_of(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a fact of each look: `group`, `place`, `kept` (times the look's `share`), `to` (a
    letter), `harmless`.
    """
    rows = []
    for look in looks.to_dict("records"):
        about = {name: look[name] for name in (*ARM, "seed", "edited_model")}
        copy = look["edited_model"]
        share = look.get("share", 1.0)
        for place, (letter, kind) in enumerate(zip(look["edited"], look["harmless"], strict=True)):
            if letter != "-":
                edit = {"group": "edited", "place": f"{copy}:{place}", "kept": letter == "1"}
                edit |= {"to": letter, "harmless": kind == "1", "share": share}
                rows.append(about | edit)
        for place, (letter, known) in enumerate(zip(look["intrinsic"], look["known"], strict=True)):
            if known == "1":
                one = {"group": "intrinsic", "place": f"{place}", "kept": letter == "1"}
                rows.append(about | one | {"to": "", "harmless": False, "share": share})
    fact = [*ARM, "seed", "edited_model", "group", "place", "harmless"]
    table = pd.DataFrame(rows, columns=[*fact, "kept", "to", "share"])
    if "share" not in looks:
        return table.drop(columns="share")
    return table.assign(kept=table.kept * table.share).groupby(fact, as_index=False).kept.sum()


def kept(facts: pd.DataFrame, group: str = "edited", **which) -> pd.Series:
    """1 or 0 of each fact of a group and of these arms, by editor, task, seed and place."""
    rows = facts[facts.group == group]
    for name, value in which.items():
        rows = rows[rows[name] == value]
    return rows.set_index(FACT).kept.astype(float)


def interval(values: pd.Series, others: pd.Series | None = None, least: float = 0) -> Result:
    """Mean, 95 % interval, number of the values and of their seeds; less the mean of `others`,
    which are of other facts, where they are given: of the seeds that both have; the number is then
    of the fewer.
    """
    parts = [one.astype(float) for one in (values, others) if one is not None]
    seeds = set.intersection(*({*one.index.get_level_values("seed")} for one in parts))
    results, means = [], []
    for one in parts:
        one = one[one.index.get_level_values("seed").isin(seeds)]
        one = one.groupby(level=["seed", "place"]).mean()
        if one.empty:
            return numpy.nan, numpy.nan, numpy.nan, 0, 0
        ends = outcomes.interval(one, one.index.get_level_values("seed"), least)
        results.append((one.mean(), *ends, len(one), len(seeds)))
        means.append(one)
    if others is None:
        return results[0]
    (mean, low, high, n, _), (other, under, over, m, _) = results
    difference = mean - other
    low = difference - numpy.hypot(mean - low, over - other)
    high = difference + numpy.hypot(high - mean, other - under)
    if len(seeds) > 1:
        ends = outcomes.difference(*means)
        low, high = min(low, ends[0]), max(high, ends[1])
    return difference, low, high, min(n, m), len(seeds)


def paired(of: pd.Series, against: pd.Series, but: str = "") -> pd.Series:
    """Differences over the facts that both have, whatever they are in the level `but`; a fact's
    copies averaged.
    """
    fact = [name for name in FACT if name != but]
    return of.groupby(fact).mean().sub(against.groupby(fact).mean()).dropna()


def verdict(low: float, high: float, claimed: int, n: int = FEWEST) -> str:
    """`claimed`: the sign of the difference, 0 for none."""
    if n < FEWEST:
        return "undecided"
    if claimed == 0:
        if low >= -SAME and high <= SAME:
            return "holds"
        return "does not hold" if low > SAME or high < -SAME else "undecided"
    if claimed < 0:
        low, high = -high, -low
    if low > 0:
        return "holds"
    return "does not hold" if high < 0 else "undecided"


Rows = Iterator[tuple[str, Result, int]]  # condition, result, claimed sign


def less_than_intrinsic(looks: pd.DataFrame) -> Rows:
    """1. Edited facts are retained less than intrinsic ones."""
    for size, facts in _ends(looks):
        for (editor, task), part in facts.groupby(["editor", "task"]):
            condition = f"{editor}, {task}, {size} edits"
            yield condition, interval(kept(part), kept(part, "intrinsic")), -1


def stable_across_tasks(looks: pd.DataFrame) -> Rows:
    """2. Intrinsic facts are retained alike whatever the task: the same ones, after MEMIT."""
    for size, facts in _ends(looks):
        on_facts = kept(facts, "intrinsic", editor="memit", task="facts")
        for task in sorted({*facts[facts.editor == "memit"].task} - {"facts"}):
            on_other = kept(facts, "intrinsic", editor="memit", task=task)
            differences = paired(on_other, on_facts, "task")
            yield f"{task} less facts, {size} edits", interval(differences, least=-1), 0


def to_related(looks: pd.DataFrame) -> Rows:
    """3. Lost edits go to related tokens, not back to the true one."""
    for size, facts in _ends(looks):
        lost = facts[(facts.group == "edited") & ~facts.kept]
        for (editor, task), part in lost.groupby(["editor", "task"]):
            part = part.set_index(FACT)
            differences = (part.to == "r").astype(int) - (part.to == "t")
            yield f"{editor}, {task}, {size} edits", interval(differences, least=-1), 1


def best_editor(looks: pd.DataFrame) -> Rows:
    """4. MALMEN retains most on text, sentiment and instructions, ROME and MEMIT on facts."""
    for size, facts in _ends(looks):
        for task, part in kept(facts).groupby("task"):
            claimed = {"rome", "memit"} if task == "facts" else {"malmen"}
            editors = part.index.get_level_values("editor")
            if not claimed <= set(editors):
                continue
            of = part[editors.isin(claimed)]
            for rival in sorted({*editors} - claimed):
                differences = paired(of, part[editors == rival], "editor")
                condition = f"{' and '.join(sorted(claimed))} less {rival}, {task}, {size} edits"
                yield condition, interval(differences, least=-1), 1


def more_paraphrases(looks: pd.DataFrame) -> Rows:
    """5. An edit of more statements is retained more; three equal intrinsic facts."""
    most = MOST.get(looks.model.iloc[0], "10")
    for size in BATCHES:
        part = arms(looks, "paraphrases", task="facts", n_edited=size)
        editors = sorted(set(part[part.paraphrases == most].editor))
        facts = facts_of(chosen(part, "paraphrases", "level")) if editors else None
        for editor in editors:
            one = kept(facts, editor=editor, paraphrases="1")
            many = kept(facts, editor=editor, paraphrases=most)
            of = interval(paired(many, one), least=-1)
            yield f"{editor}, {most} less 1, {size} edits", of, 1
            three = kept(facts, editor=editor, paraphrases="3")
            intrinsic = kept(facts, "intrinsic", editor=editor, paraphrases="3")
            yield f"{editor}, 3 less intrinsic, {size} edits", interval(three, intrinsic), 0


def differences(looks: pd.DataFrame, plan: str, against: str) -> Iterator[tuple[str, Result]]:
    """What a plan keeps less what another does, of each editor and batch that both tuned."""
    for size in BATCHES:
        part = arms(looks, "plan", task="facts", n_edited=size)
        for editor, pair in part[part.plan.isin((plan, against))].groupby("editor"):
            if pair.plan.nunique() < 2:
                continue
            for how in READ:
                facts = facts_of(chosen(even(pair, "plan"), "plan", how))
                of = paired(kept(facts, plan=plan), kept(facts, plan=against))
                yield f"{editor}, {size} edits, at one {how}", interval(of, least=-1)


def deeper(looks: pd.DataFrame, plan: str) -> str:
    """The same of the looks' model, which may have more blocks than the small ones."""
    return DEEPER.get(plan, plan) if looks.model.iloc[0] == DEEP else plan


def plans(of: str, against: tuple[str, ...], claimed: int) -> Callable[[pd.DataFrame], Rows]:
    def rows(looks: pd.DataFrame) -> Rows:
        plan, *others = (deeper(looks, one) for one in (of, *against))
        for other in others:
            for condition, result in differences(looks, plan, other):
                beside = f"less {other}, " if len(against) > 1 else ""
                yield f"{beside}{condition}", result, claimed

    return rows


def blocks_alone(looks: pd.DataFrame) -> Rows:
    """10 and 11 where embeddings and head stay in both arms, which only `all` moves."""
    for plan in ("edited", "not-edited"):
        for condition, result in differences(looks, plan, deeper(looks, BLOCKS)):
            yield f"{plan}, {condition}", result, -1


def mostly_removed(looks: pd.DataFrame) -> Rows:
    """10 by itself: where the edited blocks alone move, more than half of the edits are lost; the
    difference is of the share lost from a half, at the end of the tuning.
    """
    for size in BATCHES:
        part = arms(looks, plan="edited", n_edited=size)
        facts = facts_of(chosen(part, "editor", "end")) if len(part) else pd.DataFrame()
        for editor, arm in facts.groupby("editor") if len(facts) else ():
            arm = arm[arm.task == "facts"]
            mean, low, high, *counts = interval(kept(arm))
            yield f"{editor}, {size} edits", (0.5 - mean, 0.5 - high, 0.5 - low, *counts), 1


def early_layers_equal(looks: pd.DataFrame) -> Rows:
    """8. Early blocks are equally good places for an edit."""
    model = looks.model.iloc[0]
    early = [str(block) for block in range(EARLY.get(model, 5))]
    for size in BATCHES:
        part = arms(looks, "layers", task="facts", n_edited=size)
        part = part.assign(layers=part.layers.replace("preset", ROMES.get(model, "3")))
        part = part[(part.editor == "rome") & part.layers.isin(early)]
        part = part.drop_duplicates([*COPY, "step"])  # the preset's block, named as well
        if part.layers.nunique() < 2:
            continue
        facts = facts_of(chosen(part, "layers", "level"))
        first, *others = sorted(set(part.layers), key=int)
        for other in others:
            of = paired(kept(facts, layers=other), kept(facts, layers=first))
            yield f"block {other} less {first}, {size} edits", interval(of, least=-1), 0


def alphaedit_decays_more(looks: pd.DataFrame) -> Rows:
    """9. AlphaEdit's edits decay more than MEMIT's."""
    for size in BATCHES:
        part = arms(looks, n_edited=size)
        part = part[part.editor.isin(["memit", "alphaedit"])]
        for task, pair in part.groupby("task"):
            if pair.editor.nunique() == 2:
                facts = facts_of(chosen(even(pair, "editor"), "editor", "level"))
                of = paired(kept(facts, editor="alphaedit"), kept(facts, editor="memit"), "editor")
                yield f"{task}, {size} edits", interval(of, least=-1), -1


def adapters(looks: pd.DataFrame) -> Rows:
    """12. LoRA and DoRA keep more edits than full tuning, at one task metric."""
    for condition, result in _adapted(looks):
        if condition.endswith("full"):
            yield condition, result, 1


def adapted_blocks(looks: pd.DataFrame) -> Rows:
    """12 against a tuning of all blocks: an adapter leaves embeddings, norms and head too."""
    for condition, result in _adapted(looks):
        if condition.endswith("blocks"):
            yield condition, result, 1


def lora_as_dora(looks: pd.DataFrame) -> Rows:
    """12. LoRA and DoRA keep as many."""
    for condition, result in _adapted(looks):
        if condition.endswith("dora"):
            yield condition, result, 0


def _adapted(looks: pd.DataFrame) -> Iterator[tuple[str, Result]]:
    part = arms(looks, "adapter", "plan", task="facts", n_edited=MIXED[0])
    is_frozen = (part.plan == deeper(looks, BLOCKS)) & (part.adapter == "none")
    part = part.assign(adapter=part.adapter.mask(is_frozen, "blocks"))
    part = part[(part.plan == "all") | is_frozen].assign(plan="all")
    facts = facts_of(chosen(part, "adapter", "level")) if len(part) else None
    pairs = [("lora", "none"), ("dora", "none"), ("lora", "blocks"), ("dora", "blocks")]
    for editor in sorted(set(part.editor)):
        for adapter, other in (*pairs, ("lora", "dora")):
            arm, against = (kept(facts, editor=editor, adapter=one) for one in (adapter, other))
            of = paired(arm, against)
            if len(of):
                condition = f"{editor}, {adapter} less {other.replace('none', 'full')}"
                yield condition, interval(of, least=-1)


def false_as_harmless(looks: pd.DataFrame) -> Rows:
    """13. False edits persist as harmless ones do, whatever moves."""
    for size in MIXED:
        part = arms(looks, "adapter", "plan", task="facts", n_edited=size)
        part = part[part.harmless.str.contains("1")]
        facts = facts_of(chosen(part, "adapter", "end")) if len(part) else pd.DataFrame()
        if len(facts):
            edited = facts[facts.group == "edited"]
            for (editor, adapter, plan), arm in edited.groupby(["editor", "adapter", "plan"]):
                result = interval(kept(arm, harmless=False), kept(arm, harmless=True))
                how = adapter.replace("none", "full") if plan == "all" else plan
                yield f"{editor}, {how}, {size} edits", result, 0


def early_and_finished(looks: pd.DataFrame) -> Rows:
    """14. Edits survive better in the larger or further trained model."""
    part = arms(looks, "revision", task="facts")
    facts = facts_of(part[part.step == part.groupby(COPY).step.transform("max")])
    for editor, arm in facts.groupby("editor"):
        if arm.revision.nunique() == 2:
            finished, early = kept(arm, revision="none"), kept(arm, revision="early")
            yield f"{editor}, finished less early", interval(finished, early), 1


def _ends(looks: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each number of edits at once, and its facts at the end of the usual tuning."""
    for size in BATCHES:
        part = arms(looks, n_edited=size)
        if len(part):
            yield size, facts_of(chosen(part, "editor", "end"))


CLAIMS: list[tuple[str, str, str, Callable[[pd.DataFrame], Rows]]] = [
    ("1", "2507.14198", "edited facts kept less than intrinsic ones", less_than_intrinsic),
    ("2", "2507.14198", "intrinsic facts alike on all tasks", stable_across_tasks),
    ("3", "2507.14198", "lost edits go to related answers more than back to the true one",
     to_related),
    ("4", "2507.14198", "MALMEN best on text, sentiment, instructions, ROME and MEMIT on facts",
     best_editor),
    ("5", "2507.14198", "more statements keep more; three equal intrinsic facts", more_paraphrases),
    ("6", "2507.14198", "moving late blocks alone keeps edits", plans(LATE, ("all",), 1)),
    ("7", "2507.14198", "a window on the edited blocks is the worst", plans(ON_EDIT, WINDOWS, -1)),
    ("8", "2507.14198", "early blocks are equal places for an edit", early_layers_equal),
    ("9", "2511.05852", "AlphaEdit decays more than MEMIT", alphaedit_decays_more),
    ("10", "2511.05852", "moving the edited blocks alone removes more edits than moving all",
     plans("edited", ("all",), -1)),
    ("10, alone", "2511.05852", "moving them alone removes more than half of the edits",
     mostly_removed),
    ("11", "2511.05852", "moving the other blocks alone hurts edits more than moving all",
     plans("not-edited", ("all",), -1)),
    ("10 and 11, blocks", "2511.05852", "both, against moving all blocks but no embeddings or head",
     blocks_alone),
    ("12", "2511.05852", "adapters keep more than full tuning", adapters),
    ("12, blocks", "2511.05852", "adapters keep more than a tuning of all blocks alone",
     adapted_blocks),
    ("12, LoRA", "2511.05852", "LoRA keeps as many edits as DoRA", lora_as_dora),
    ("13", "2511.05852", "false edits persist as harmless ones do", false_as_harmless),
    ("14", "2511.05852", "edits last longer in the better trained model", early_and_finished),
]  # fmt: skip
PUBLISHED = {
    "1": "Llama-3-8B, instructions: ROME .374 and .824, FT .634 and .831, MALMEN .815 and .817",
    "2": "about .8 on each",
    "5": "MEMIT and AlphaEdit, a hundred facts: three reach the .8 of intrinsic ones",
    "6": "GPT-2 XL: blocks above 40 of 48",
    "7": "of five blocks",
    "10": "more than moving all, at a modest cost to the task",
    "11": "more than moving all",
    "9": "AlphaEdit on GPT-J, zsRE: 25 % of the edits lost, the most of all",
}  # of a claim that has a figure: what the study reports


def judged(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a claim, model, setting and condition."""
    rows = []
    looks = looks[~looks.editor.isin(MEMORY)]
    usual_ones = {name: USUAL[name] for name in SETTING}
    for number, paper, text, claim in CLAIMS:
        for (model, *setting), part in looks.groupby(["model", *SETTING]):
            part = part.assign(**usual_ones)
            for condition, (mean, low, high, n, seeds), claimed in claim(part):
                if not n:
                    continue
                row = {"claim": number, "paper": paper, "what": text, "model": model}
                row |= {
                    **dict(zip(SETTING, setting, strict=True)),
                    "condition": condition,
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "n": n,
                    "seeds": seeds,
                }
                rows.append(row | {"verdict": verdict(low, high, claimed, n)})
    return pd.DataFrame(rows)


def by_plan(looks: pd.DataFrame, plans: tuple[str, ...] = MOVES, **setting) -> str:
    """Of editors with several plans: edited and intrinsic facts at the end of each tuning, by what
    moved; of the seeds that all arms have, at the usual rate and data or at these.
    """
    names = ["model", "editor", "edits", "task", "moves", "n", "edits kept", "intrinsic kept"]
    lines = [[*names, "metric", "steps", "distance"]]
    looks = looks[looks.plan.isin(plans)]
    for task, size in itertools.product(("facts", "text"), BATCHES):
        part = even(arms(looks, "plan", task=task, n_edited=size, **setting), "plan")
        for (model, editor), ends in chosen(part, "plan", "end").groupby(["model", "editor"]):
            if ends.plan.nunique() > 1:
                about = [model, editor, str(size), task]
                lines += [[*about, *_plan(ends, plan)] for plan in plans if plan in {*ends.plan}]
    return outcomes.markdown(lines)


def by_size(looks: pd.DataFrame) -> str:
    """MEMIT's edits by how many stand in one model, at the end of each tuning; of the seeds that
    all numbers have.
    """
    names = ["model", "edits at once", "n", "edits kept", "intrinsic kept", "metric", "steps"]
    lines = [names]
    part = arms(looks, "n_edited", editor="memit", task="facts")
    part = even(part[part.n_edited.isin([str(size) for size in BATCHES])], "n_edited")
    ends = part[part.step == part.groupby(COPY).step.transform("max")]
    for model, of_model in ends.groupby("model"):
        if of_model.n_edited.nunique() > 1:
            arms_of = sorted(of_model.groupby("n_edited"), key=lambda arm: int(arm[0]))
            lines += [[model, size, *_plan(arm, "all")[1:-1]] for size, arm in arms_of]
    return outcomes.markdown(lines)


def in_memory(looks: pd.DataFrame) -> str:
    """Edits that leave the weights as they are, beside MEMIT's of the same seeds, at the end of
    each tuning.
    """
    looks = arms(looks)
    seeds = looks[looks.editor.isin(MEMORY)][["model", "task", "seed"]].drop_duplicates()
    beside = looks[looks.editor.isin([*MEMORY, "memit"])].merge(seeds)
    return by_editor(beside)


def by_editor(looks: pd.DataFrame, **setting) -> str:
    """A line a model, task and editor, at the end of each tuning."""
    lines = [["model", "task", "editor", "seeds", "n", "edits kept", "intrinsic kept", "metric"]]
    ends = chosen(arms(looks, **setting), "editor", "end")
    for (model, task, editor), arm in ends.groupby(["model", "task", "editor"]):
        _, n, kept, *cells, _, _ = _plan(arm, "all")
        kept = kept.replace("nan [nan, nan]", "none took")
        lines.append([model, task, editor, str(arm.seed.nunique()), n, kept, *cells])
    return outcomes.markdown(lines)


def by_kinds(looks: pd.DataFrame) -> str:
    """What is kept under facts of other kinds less under those of the edits' own, fact by fact, by
    which blocks moved, at the end of each tuning.
    """
    lines = [["model", "moves", "n", "edits", "intrinsic facts"]]
    looks = looks[looks.task_data.isin(["same-kinds", "other-kinds"])]
    ends = looks[looks.step == looks.groupby(COPY).step.transform("max")]
    for (model, plan), arm in ends.groupby(["model", "plan"]):
        facts = facts_of(arm)
        results = []
        for group in ("edited", "intrinsic"):
            own, other = (
                kept(facts, group, task_data=data) for data in ("same-kinds", "other-kinds")
            )
            results.append(interval(paired(other, own), least=-1))
        cells = [f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]" for mean, low, high, *_ in results]
        lines.append([model, f"`{plan}`", f"{results[0][3]}, {results[1][3]}", *cells])
    return outcomes.markdown(lines)


def _plan(ends: pd.DataFrame, plan: str) -> list[str]:
    arm = ends[ends.plan == plan]
    facts = facts_of(arm)
    cells = [interval(kept(facts, group)) for group in ("edited", "intrinsic")]
    shares = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high, *_ in cells]
    ended = f"{arm.metric.mean():.2f}", f"{arm.step.mean():.0f}", f"{arm.moved.mean():.1f}"
    return [f"`{plan}`", f"{cells[0][3]}, {cells[1][3]}", *shares, *ended]


def against_all(looks: pd.DataFrame) -> str:
    """A line a way to read: of how many arms (models, editors, batches, other plans) more edits are
    kept than where everything moves, and how many differences are told from 0, fact by fact. The
    window that MEMIT writes is its plan `edited`, and counts once. At the usual rate, on the usual
    data.
    """
    lines = [["read at one", "arms", "more kept", "told from 0", "fewer kept", "told from 0"]]
    results = []
    for _, of_model in looks.groupby("model"):
        for plan in (*MOVES[1:], *OF_DEEP):
            part = of_model[of_model.editor == "rome"] if plan == ON_EDIT else of_model
            results += differences(part, plan, "all")
    for how in READ:
        read = [result for condition, result in results if condition.endswith(how)]
        counts = [len(read)]
        for sign in (1, -1):
            counts.append(sum(sign * mean > 0 for mean, *_ in read))
            counts.append(sum(min(sign * low, sign * high) > 0 for _, low, high, *_ in read))
        lines.append([how, *map(str, counts)])
    return outcomes.markdown(lines)


def shown(table: pd.DataFrame) -> str:
    """A line a claim, a column a model: how many conditions hold, and their differences; of blocks
    that move, at one level of the task; at the usual rate and on the usual data.
    """
    table = usually(table)
    names = sorted(set(table.model))
    lines = [["claim", *names]]
    for number, _, what, _ in CLAIMS:
        cells = []
        for name in names:
            part = table[(table.claim == number) & (table.model == name)]
            counts = part.verdict.value_counts()
            words = [f"{verdict} {count}" for verdict, count in counts.items()]
            span = f"{part.difference.min():+.2f} to {part.difference.max():+.2f}"
            counted = [f"{one} {_span(part[one])}" for one in ("n", "seeds")]
            cells.append(
                f"{', '.join(words)} ({span}; {'; '.join(counted)})" if words else "not run"
            )
        lines.append([f"{number}. {what}", *cells])
    return outcomes.markdown(lines)


def verdicts(table: pd.DataFrame) -> str:
    """A line a claim: the study's figure, and a column a model: the condition of most facts (of as
    many, of most seeds; then MEMIT's), with its interval, and how many conditions there are.
    """
    table = usually(table)
    table = table.assign(memit=table.condition.str.contains("memit"))
    table = table.sort_values(["n", "seeds", "memit"], ascending=False, kind="stable")
    names = sorted(set(table.model), key=lambda name: (not name.startswith("world"), name))
    lines = [["claim", "the study's figure", *names]]
    for number, _, what, _ in CLAIMS:
        cells = [PUBLISHED.get(number, "")]
        for name in names:
            part = table[(table.claim == number) & (table.model == name)]
            cells.append(_headline(part) if len(part) else "not run")
        lines.append([f"{number}. {what}", *cells])
    return outcomes.markdown(lines)


def _headline(conditions: pd.DataFrame) -> str:
    first, alike = conditions.iloc[0], (conditions.verdict == conditions.verdict.iloc[0]).sum()
    difference = f"{first.difference:+.2f} [{first.low:+.2f}, {first.high:+.2f}]"
    seeds = f"{first.seeds} seed{'s' if first.seeds > 1 else ''}"
    counted = f"{first.condition.replace(', at one level', '')}; n {first.n}, {seeds}"
    others = f"; {alike} of {len(conditions)}" if len(conditions) > 1 else ""
    return f"**{first.verdict}** {difference} ({counted}{others})"


def _span(counts: pd.Series) -> str:
    return " to ".join(map(str, sorted({counts.min(), counts.max()})))


def usually(table: pd.DataFrame) -> pd.DataFrame:
    """The conditions of the usual rate and data, of blocks at one level of the task."""
    for name in SETTING:
        table = table[table[name] == USUAL[name]]
    return table[~table.condition.str.contains(OTHERWISE)]


def elsewhere(table: pd.DataFrame) -> str:
    """A line a claim and model at another rate or on other data, as of `conditions`."""
    is_usual = (table[SETTING] == [USUAL[name] for name in SETTING]).all(axis=1)
    table = table[~is_usual & ~table.condition.str.contains(OTHERWISE)]
    rates = ("rate " + table.learning_rate).replace("rate usual", "")
    settings = table.task_data.replace("none", "") + rates
    return _lines(table.assign(condition=settings + ": " + table.condition))


def conditions(table: pd.DataFrame) -> str:
    """A line a claim, model and condition; of blocks that move, at one level of the task."""
    return _lines(usually(table))


def _lines(table: pd.DataFrame) -> str:
    lines = [["claim", "model", "condition", "difference", "n", "seeds", "verdict"]]
    for row in table.itertuples():
        difference = f"{row.difference:+.2f} [{row.low:+.2f}, {row.high:+.2f}]"
        counts = str(row.n), str(row.seeds)
        lines.append([row.claim, row.model, row.condition, difference, *counts, row.verdict])
    return outcomes.markdown(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, help="folder of runs to add to looks.csv")
    parser.add_argument("--out", type=Path, default=FINDINGS)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.out / "looks.csv")
    looks = read(options.out / "looks.csv")
    table = judged(looks)
    table.to_csv(options.out / "claims.csv", index=False, float_format="%.3f")
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(table.drop(columns=["paper", "what"]).round(3).to_string(index=False))
    print(shown(table), by_plan(looks), against_all(looks), sep="\n\n")


if __name__ == "__main__":
    main()
