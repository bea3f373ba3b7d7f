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
