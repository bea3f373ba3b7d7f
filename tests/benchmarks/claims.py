"""What two studies claim of edits under fine-tuning, judged on runs of the grids of data/findings.

    workbench sweep data/findings/retention.yaml --out runs/findings   # and the other grids
    python -m tests.benchmarks.claims --collect runs/findings          # runs -> looks.csv
    python -m tests.benchmarks.claims                                  # looks.csv -> claims.csv

Arms that are compared are alike in every field but the one that the claim is about. A claim of a
difference holds where its interval lies on the claimed side of 0, does not where it lies on the
other, and is undecided otherwise; one of no difference holds where it lies within .1 of 0, and does
not where it lies wholly beyond; of fewer than 5 facts every claim is undecided.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from tests.benchmarks.facts_kept import (
    COPY,
    FACT,
    MIXED,
    SETTING,
    USUAL,
    Result,
    arms,
    chosen,
    collect,
    even,
    facts_of,
    interval,
    kept,
    paired,
    read,
)
from tests.benchmarks.outcomes import FINDINGS

SAME = 0.1  # a share within which two are called equal
FEWEST = 5  # facts that decide anything
READ = ("level", "end", "steps", "distance")
LATE = "after:8"
WINDOWS = ("window:5-7", "window:8-10")
BLOCKS = "window:0-11"  # all of them; embeddings and head stay, as under every plan but `all`
BATCHES = (1, 10, 30, 100)  # edits at once
MEMORY = ("grace", "incontext")  # editors that leave the weights as they are
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
        lost = facts[(facts.group == "edited") & ~facts.kept & (facts.to != "n")]
        for (editor, task), part in lost.groupby(["editor", "task"]):
            part = part.set_index(FACT)
            differences = (part.to == "r").astype(int) - (part.to == "t")
            yield f"{editor}, {task}, {size} edits", interval(differences, least=-1), 1


def best_editor(claimed: set[str], tasks: tuple[str, ...]) -> Callable[[pd.DataFrame], Rows]:
    """4. These editors' edits are retained most, of the seeds that have all of them."""

    def rows(looks: pd.DataFrame) -> Rows:
        for size, facts in _ends(looks):
            for task, part in kept(facts[facts.task.isin(tasks)]).groupby("task"):
                editors = part.groupby("seed").transform(
                    lambda one: claimed <= {*one.index.get_level_values("editor")}
                )
                part = part[editors.astype(bool)]
                editors = part.index.get_level_values("editor")
                for rival in sorted({*editors} - claimed):
                    of, against = part[editors.isin(claimed)], part[editors == rival]
                    condition = f"{' and '.join(sorted(claimed))} less {rival}, {task}"
                    result = interval(paired(of, against, "editor"), least=-1)
                    yield f"{condition}, {size} edits", result, 1

    return rows


def more_paraphrases(looks: pd.DataFrame) -> Rows:
    """5. An edit of more statements is retained more."""
    most = MOST.get(looks.model.iloc[0], "10")
    for size in BATCHES:
        part = arms(looks, "paraphrases", task="facts", n_edited=size)
        for editor, arm in part.groupby("editor"):
            result = interval(pair(arm, "paraphrases", most, "1"), least=-1)
            yield f"{editor}, {most} less 1, {size} edits", result, 1


def as_intrinsic(looks: pd.DataFrame) -> Rows:
    """5. Edits of three statements are retained as intrinsic facts are, at the end."""
    for size in BATCHES:
        part = arms(looks, task="facts", n_edited=size, paraphrases=3)
        for editor, facts in facts_of(chosen(part, "paraphrases", "end")).groupby("editor"):
            result = interval(kept(facts), kept(facts, "intrinsic"))
            yield f"{editor}, {size} edits", result, 0


def pair(looks: pd.DataFrame, varied: str, of: str, against: str, how: str = "level") -> pd.Series:
    """What the edits of one arm are kept more than another's, fact by fact, read alike (`chosen`)
    of the seeds that both have.
    """
    both = looks[looks[varied].isin((of, against))]
    if both[varied].nunique() < 2:
        return pd.Series(index=pd.MultiIndex.from_tuples([], names=FACT), dtype=float)
    facts = facts_of(chosen(even(both, varied), varied, how))
    return paired(kept(facts, **{varied: of}), kept(facts, **{varied: against}), varied)


def differences(looks: pd.DataFrame, plan: str, against: str) -> Iterator[tuple[str, Result]]:
    """What a plan keeps less what another does, of each editor and batch that both tuned."""
    for size in BATCHES:
        part = arms(looks, "plan", task="facts", n_edited=size)
        for editor, arm in part.groupby("editor"):
            for how in READ:
                result = interval(pair(arm, "plan", plan, against, how), least=-1)
                if result[3]:
                    yield f"{editor}, {size} edits, at one {how}", result


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
        part = arms(looks, plan="edited", task="facts", n_edited=size)
        for editor, arm in facts_of(chosen(part, "editor", "end")).groupby("editor"):
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
        first, *others = sorted(set(part.layers), key=int) or [""]
        for other in others:
            result = interval(pair(part, "layers", other, first), least=-1)
            yield f"block {other} less {first}, {size} edits", result, 0


def alphaedit_decays_more(looks: pd.DataFrame) -> Rows:
    """9. AlphaEdit's edits decay more than MEMIT's."""
    for size in BATCHES:
        for task, part in arms(looks, n_edited=size).groupby("task"):
            result = interval(pair(part, "editor", "alphaedit", "memit"), least=-1)
            yield f"{task}, {size} edits", result, -1


def adapted(against: str, claimed: int, *which: str) -> Callable[[pd.DataFrame], Rows]:
    """12. What adapters keep more than this; "blocks": a tuning of all of them, which leaves
    embeddings, norms and head as an adapter does.
    """

    def rows(looks: pd.DataFrame) -> Rows:
        part = arms(looks, "adapter", "plan", task="facts", n_edited=MIXED[0])
        is_frozen = (part.plan == deeper(looks, BLOCKS)) & (part.adapter == "none")
        part = part.assign(adapter=part.adapter.mask(is_frozen, "blocks"))
        part = part[(part.plan == "all") | is_frozen].assign(plan="all")
        for editor, arm in part.groupby("editor"):
            for adapter in which:
                result = interval(pair(arm, "adapter", adapter, against), least=-1)
                yield f"{editor}, {adapter} less {against.replace('none', 'full')}", result, claimed

    return rows


def false_as_harmless(looks: pd.DataFrame) -> Rows:
    """13. False edits persist as harmless ones do, whatever moves."""
    for size in MIXED:
        part = arms(looks, "adapter", "plan", task="facts", n_edited=size)
        part = part[part.harmless.str.contains("1")]
        facts = facts_of(chosen(part, "adapter", "end"))
        for (editor, adapter, plan), arm in facts.groupby(["editor", "adapter", "plan"]):
            result = interval(kept(arm, harmless=False), kept(arm, harmless=True))
            how = adapter.replace("none", "full") if plan == "all" else plan
            yield f"{editor}, {how}, {size} edits", result, 0


def early_and_finished(looks: pd.DataFrame) -> Rows:
    """14. Edits survive better in the larger or further trained model."""
    part = arms(looks, "revision", task="facts")
    facts = facts_of(chosen(part, "revision", "end"))
    for editor, arm in facts.groupby("editor"):
        if arm.revision.nunique() == 2:
            finished, early = kept(arm, revision="none"), kept(arm, revision="early")
            yield f"{editor}, finished less early", interval(finished, early), 1


def _ends(looks: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each number of edits at once, and its facts at the end of the usual tuning."""
    for size in BATCHES:
        yield size, facts_of(chosen(arms(looks, n_edited=size), "editor", "end"))


CLAIMS: list[tuple[str, str, str, Callable[[pd.DataFrame], Rows]]] = [
    ("1", "2507.14198", "edited facts kept less than intrinsic ones", less_than_intrinsic),
    ("2", "2507.14198", "intrinsic facts alike on all tasks", stable_across_tasks),
    ("3", "2507.14198", "lost edits go to related answers more than back to the true one",
     to_related),
    ("4", "2507.14198", "MALMEN best on text, sentiment and instructions",
     best_editor({"malmen"}, ("text", "sentiment", "instructions"))),
    ("4, facts", "2507.14198", "ROME and MEMIT best on facts",
     best_editor({"rome", "memit"}, ("facts",))),
    ("5", "2507.14198", "more statements keep more", more_paraphrases),
    ("5, three", "2507.14198", "edits of three statements are kept as intrinsic facts are",
     as_intrinsic),
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
    ("12", "2511.05852", "adapters keep more than full tuning",
     adapted("none", 1, "lora", "dora")),
    ("12, blocks", "2511.05852", "adapters keep more than a tuning of all blocks alone",
     adapted("blocks", 1, "lora", "dora")),
    ("12, LoRA", "2511.05852", "LoRA keeps as many edits as DoRA", adapted("dora", 0, "lora")),
    ("13", "2511.05852", "false edits persist as harmless ones do", false_as_harmless),
    ("14", "2511.05852", "edits last longer in the better trained model", early_and_finished),
]  # fmt: skip


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
                row |= {"claimed": claimed, "verdict": verdict(low, high, claimed, n)}
                rows.append(row)
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collect", type=Path, help="folder of runs to add to looks.csv")
    parser.add_argument("--out", type=Path, default=FINDINGS)
    options = parser.parse_args()
    if options.collect:
        collect(options.collect, options.out / "looks.csv")
    table = judged(read(options.out / "looks.csv"))
    table.to_csv(options.out / "claims.csv", index=False, float_format="%.3f")
    with pd.option_context("display.max_rows", None, "display.width", 200):
        print(table.drop(columns=["paper", "what"]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
