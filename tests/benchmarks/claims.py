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
Intervals are of 95 %, by bootstrap over seeds and facts, a fact's copies (other editors, adapters)
averaged; ten facts of one model share its fate, which of one seed no interval knows. A claim of a
difference holds where its interval lies on the claimed side of 0, does not where it lies on the
other, and is undecided otherwise; one of no difference holds where it lies within .1 of 0, and does
not where it lies wholly beyond; of fewer than 5 facts every claim is undecided. Where a claim names
no two arms, the best and the worst are picked on the very facts that judge (claims 2, 8, the rival
of 4): such a difference is too large by what chance adds.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pandas as pd

from tests.benchmarks.outcomes import drawn_means
from workbench import runs
from workbench.runs import value_name

FINDINGS = Path(__file__).parents[2] / "data" / "findings"
ARM = [
    *("model", "revision", "editor", "layers", "paraphrases", "n_edited"),
    *("task", "plan", "adapter"),
]
COPY = [*ARM, "seed", "edited_model"]
FACT = ["editor", "task", "seed", "place"]
SAME = 0.1  # a share within which two are called equal
FEWEST = 5  # facts that decide anything
READ = ("level", "end", "steps", "distance")
LATE = "after:8"
LATE_OF = {"smollm2-135m": "after:20"}  # of 30 blocks
WINDOWS = ("window:5-7", "window:8-10")
MOVES = (
    *("all", "window:0-11", "not-edited", "after:2", "after:5", "after:8", "after:20"),
    *("edited", "window:2-4", "window:5-7", "window:8-10"),
)
BLOCKS = "window:0-11"  # all of them; embeddings and head stay, as under every plan but `all`
BATCHES = (10, 30, 100)  # edits at once
ON_EDIT = "window:2-4"  # the blocks that MEMIT and AlphaEdit write; ROME writes the middle one


Result = tuple[float, float, float, int]  # mean, low, high, facts


def looked(run: runs.Run) -> pd.DataFrame:
    """The looks of a run, a row each."""
    training = run.training.set_index(["edited_model", "step"])
    harmless = set(run.about["harmless"])
    fields = {name: value_name(run.spec[name]) for name in ARM} | {"seed": run.spec["seed"]}
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
    """Add the looks of the finished runs below a folder; an arm that is there is replaced."""
    tables = [looked(run) for run in runs.collect(folder)]
    if out.exists():
        tables.insert(0, read(out).drop(columns="known"))
    whole = pd.concat(tables).astype(dict.fromkeys(ARM, str))
    whole = whole.drop_duplicates([*COPY, "step"], keep="last").sort_values([*COPY, "step"])
    whole.to_csv(out, index=False, float_format="%.5g")


def read(path: Path) -> pd.DataFrame:
    """With `known`: the intrinsic facts that the edited model says before the tuning."""
    words = dict.fromkeys((*ARM, "edited", "harmless", "intrinsic"), str)
    looks = pd.read_csv(path, dtype=words, keep_default_na=False, na_values={"held_out": [""]})
    starts = looks[looks.step == 0].set_index(COPY).intrinsic.rename("known")
    return looks.join(starts, on=COPY, validate="m:1")


def chosen(looks: pd.DataFrame, varied: str, how: str) -> pd.DataFrame:
    """One look of each copy. `level`: the first at the loosest of the arms' best metrics; `end`:
    the last; `steps`: at the last step that all arms have; `distance`: the last that is no farther
    from the start than the least that an arm went in all.
    """
    if how == "end":
        return looks[looks.step == looks.groupby(COPY).step.transform("max")]
    parts = []
    for _, arms in looks.groupby([name for name in (*ARM, "seed") if name != varied]):
        sign = 1 if arms.task.iloc[0] in ("text", "instructions") else -1
        metric = sign * arms.metric
        copies = arms.groupby(COPY)
        if how == "level":
            level = metric.groupby([arms[name] for name in COPY]).min().max()
            parts.append(arms[metric <= level].drop_duplicates(COPY))
        elif how == "steps":
            common = set.intersection(*(set(one.step) for _, one in copies))
            parts.append(arms[arms.step == max(common)])
        else:
            least = copies.moved.max().min()
            parts.append(arms[arms.moved <= least].drop_duplicates(COPY, keep="last"))
    return pd.concat(parts)


def facts_of(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a fact of each look: `group`, `place`, `kept`, `to` (a letter), `harmless`."""
    rows = []
    for look in looks.to_dict("records"):
        about = {name: look[name] for name in (*ARM, "seed")}
        copy = look["edited_model"]
        for place, (letter, kind) in enumerate(zip(look["edited"], look["harmless"], strict=True)):
            if letter != "-":
                edit = {"group": "edited", "place": f"{copy}:{place}", "kept": letter == "1"}
                rows.append(about | edit | {"to": letter, "harmless": kind == "1"})
        for place, (letter, known) in enumerate(zip(look["intrinsic"], look["known"], strict=True)):
            if known == "1":
                one = {"group": "intrinsic", "place": f"{copy}:{place}", "kept": letter == "1"}
                rows.append(about | one | {"to": "", "harmless": False})
    return pd.DataFrame(rows)


def kept(facts: pd.DataFrame, group: str = "edited", **which) -> pd.Series:
    """1 or 0 of each fact of a group and of these arms, by editor, task, seed and place."""
    rows = facts[facts.group == group]
    for name, value in which.items():
        rows = rows[rows[name] == value]
    return rows.set_index(FACT).kept.astype(float)


def interval(values: pd.Series, others: pd.Series | None = None, least: float = 0) -> Result:
    """Mean, 95 % bootstrap interval and number of the values, less the mean of `others`, drawn
    apart, where they are given; all by seed and place.
    """
    values = values.astype(float).groupby(level=["seed", "place"]).mean()
    middle = values.mean()
    drawn = drawn_means(values, values.index.get_level_values("seed"), least)
    if others is not None:
        others = others.astype(float).groupby(level=["seed", "place"]).mean()
        middle -= others.mean()
        drawn = drawn - drawn_means(others, others.index.get_level_values("seed"), least, seed=1)
    low, high = numpy.quantile(drawn, [0.025, 0.975])
    return float(middle), float(low), float(high), len(values)


def paired(of: pd.Series, against: pd.Series) -> pd.Series:
    """Differences over the facts that both have, a fact's copies averaged."""
    return of.groupby(FACT).mean().sub(against.groupby(FACT).mean()).dropna()


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
    """2. Intrinsic facts are retained alike whatever the task; after MEMIT's edits."""
    facts = facts_of(chosen(_plain(looks), "editor", "end"))
    means = kept(facts, "intrinsic", editor="memit").groupby("task").mean()
    if len(means) > 1:
        best, worst = means.idxmax(), means.idxmin()
        of = kept(facts, "intrinsic", editor="memit", task=best)
        less = kept(facts, "intrinsic", editor="memit", task=worst)
        yield f"{best} less {worst}", interval(of, less), 0


def to_related(looks: pd.DataFrame) -> Rows:
    """3. Lost edits go to related tokens, not back to the true one."""
    for size, facts in _ends(looks):
        for task, part in facts[(facts.group == "edited") & ~facts.kept].groupby("task"):
            part = part.set_index(FACT)
            differences = (part.to == "r").astype(int) - (part.to == "t")
            yield f"{task}, {size} edits", interval(differences, least=-1), 1


def best_editor(looks: pd.DataFrame) -> Rows:
    """4. MALMEN retains most on text, sentiment and instructions, ROME and MEMIT on facts."""
    facts = facts_of(chosen(_plain(looks), "editor", "end"))
    edited = kept(facts)
    for task, part in edited.groupby("task"):
        claimed = ["rome", "memit"] if task == "facts" else ["malmen"]
        editors = part.index.get_level_values("editor")
        if not set(claimed) <= set(editors):
            continue
        is_claimed = editors.isin(claimed)
        rival = part[~is_claimed].groupby("editor").mean().idxmax()
        condition = f"{task}: {' and '.join(claimed)} less {rival}"
        yield condition, interval(part[is_claimed], part[editors == rival]), 1


def more_paraphrases(looks: pd.DataFrame) -> Rows:
    """5. An edit of more statements is retained more; three equal intrinsic facts."""
    part = of_facts(looks)
    part = part[part.plan == "all"]
    facts = facts_of(chosen(part, "paraphrases", "level"))
    for editor in sorted(set(part[part.paraphrases == "10"].editor)):
        one = kept(facts, editor=editor, paraphrases="1")
        ten = kept(facts, editor=editor, paraphrases="10")
        yield f"{editor}, 10 less 1", interval(paired(ten, one), least=-1), 1
        three = kept(facts, editor=editor, paraphrases="3")
        intrinsic = kept(facts, "intrinsic", editor=editor, paraphrases="3")
        yield f"{editor}, 3 less intrinsic", interval(three, intrinsic), 0


def plans(of: str, against: tuple[str, ...], claimed: int) -> Callable[[pd.DataFrame], Rows]:
    """What a plan keeps less what others do, of every editor and batch that were tuned by all."""

    def rows(looks: pd.DataFrame) -> Rows:
        names = {LATE_OF.get(model, LATE) for model in looks.model} if of == LATE else {of}
        [plan] = names
        for size in BATCHES:
            for editor, part in of_blocks(looks, size).groupby("editor"):
                arms = part[part.plan.isin((plan, *against))]
                if set(arms.plan) != {plan, *against}:
                    continue
                for how in READ:
                    facts = facts_of(chosen(arms, "plan", how))
                    rest = pd.concat([kept(facts, plan=other) for other in against])
                    differences = paired(kept(facts, plan=plan), rest)
                    condition = f"{editor}, {size} edits, at one {how}"
                    yield condition, interval(differences, least=-1), claimed

    return rows


def of_facts(looks: pd.DataFrame, n_edited: int = 10) -> pd.DataFrame:
    """Of facts, so many edited at once by the presets' blocks, no adapter. Runs of another number
    are of other facts.
    """
    part = looks[(looks.task == "facts") & (looks.n_edited == str(n_edited))]
    return part[_is_preset(part) & part.adapter.isin(["", "none"])]


def of_blocks(looks: pd.DataFrame, n_edited: int = 10) -> pd.DataFrame:
    """The same, of one statement; whatever may move."""
    part = of_facts(looks, n_edited)
    return part[part.paraphrases == "1"]


def blocks_alone(looks: pd.DataFrame) -> Rows:
    """10 and 11 where embeddings and head stay in both arms, which only `all` moves."""
    for plan in ("edited", "not-edited"):
        for condition, result, claimed in plans(plan, (BLOCKS,), -1)(looks):
            yield f"{plan}, {condition}", result, claimed


def early_layers_equal(looks: pd.DataFrame) -> Rows:
    """8. Early blocks are equally good places for an edit."""
    part = looks[(looks.task == "facts") & (looks.editor == "rome") & (looks.plan == "all")]
    part = part[
        (part.paraphrases == "1") & part.layers.isin([value_name([one]) for one in range(5)])
    ]
    if part.layers.nunique() < 2:
        return
    facts = facts_of(chosen(part, "layers", "level"))
    edited = facts[facts.group == "edited"]
    means = edited.groupby("layers").kept.mean()
    best, worst = means.idxmax(), means.idxmin()
    differences = paired(kept(edited, layers=best), kept(edited, layers=worst))
    yield f"block {best} less {worst}", interval(differences, least=-1), 0


def alphaedit_decays_more(looks: pd.DataFrame) -> Rows:
    """9. AlphaEdit's edits decay more than MEMIT's."""
    part = _plain(looks)
    part = part[part.editor.isin(["memit", "alphaedit"])]
    for task, arms in part.groupby("task"):
        if arms.editor.nunique() == 2:
            facts = facts_of(chosen(arms, "editor", "level"))
            alphaedit, memit = (
                kept(facts, editor=one).droplevel("editor") for one in ("alphaedit", "memit")
            )
            yield task, interval(alphaedit.sub(memit).dropna(), least=-1), -1


def adapters(looks: pd.DataFrame) -> Rows:
    """12. LoRA and DoRA keep more edits than full tuning at one task metric."""
    part = looks[(looks.n_edited == "20") & (looks.task == "facts") & (looks.plan == "all")]
    facts = facts_of(chosen(part, "adapter", "level")) if len(part) else None
    for editor in sorted(set(part.editor)):
        full = kept(facts, editor=editor, adapter=value_name(""))
        for adapter in ("lora", "dora"):
            tuned = kept(facts, editor=editor, adapter=adapter)
            if len(tuned):
                differences = paired(tuned, full)
                yield f"{editor}, {adapter} less full", interval(differences, least=-1), 1


def false_as_harmless(looks: pd.DataFrame) -> Rows:
    """13. False edits persist as harmless ones do."""
    part = looks[looks.harmless.str.contains("1")]
    facts = facts_of(chosen(part, "adapter", "end")) if len(part) else pd.DataFrame()
    if len(facts):
        edited = facts[facts.group == "edited"]
        for editor, arm in edited.groupby("editor"):
            yield editor, interval(kept(arm, harmless=False), kept(arm, harmless=True)), 0


def early_and_finished(looks: pd.DataFrame) -> Rows:
    """14. Edits survive better in the larger or further trained model."""
    part = looks[(looks.task == "facts") & (looks.plan == "all") & (looks.n_edited == "10")]
    part = part[(part.paraphrases == "1") & _is_preset(part)]
    facts = facts_of(part[part.step == part.groupby(COPY).step.transform("max")])
    edited = facts[facts.group == "edited"]
    for editor, arm in edited.groupby("editor"):
        by = {name: kept(one) for name, one in arm.groupby("revision")}
        if len(by) == 2:
            names = sorted(by, key=lambda name: name == "early")
            yield f"{editor}, finished less early", interval(by[names[0]], by[names[1]]), 1


def _plain(looks: pd.DataFrame, n_edited: int = 10) -> pd.DataFrame:
    """The preset's blocks, one statement, everything moving."""
    plain = (looks.plan == "all") & (looks.paraphrases == "1") & (looks.n_edited == str(n_edited))
    return looks[plain & _is_preset(looks) & looks.adapter.isin(["", "none"])]


def _ends(looks: pd.DataFrame) -> Iterator[tuple[int, pd.DataFrame]]:
    """Each number of edits at once, and its facts at the end of the tuning."""
    for size in BATCHES:
        part = _plain(looks, size)
        if len(part):
            yield size, facts_of(chosen(part, "editor", "end"))


def _is_preset(looks: pd.DataFrame) -> pd.Series:
    return looks.layers == value_name([])


CLAIMS: list[tuple[str, str, str, Callable[[pd.DataFrame], Rows]]] = [
    ("1", "2507.14198", "edited less than intrinsic: Llama-3-8B, instructions: ROME .374 and .824",
     less_than_intrinsic),
    ("2", "2507.14198", "intrinsic facts alike on all tasks: about .8", stable_across_tasks),
    ("3", "2507.14198", "lost edits go to related answers more than back to the true one",
     to_related),
    ("4", "2507.14198", "MALMEN best on text, sentiment, instructions, ROME and MEMIT on facts",
     best_editor),
    ("5", "2507.14198", "more statements keep more; three equal intrinsic facts", more_paraphrases),
    ("6", "2507.14198", "moving late blocks alone keeps edits", plans(LATE, ("all",), 1)),
    ("7", "2507.14198", "a window on the edited blocks is the worst", plans(ON_EDIT, WINDOWS, -1)),
    ("8", "2507.14198", "early blocks are equal places for an edit", early_layers_equal),
    ("9", "2511.05852", "AlphaEdit decays more than MEMIT", alphaedit_decays_more),
    ("10", "2511.05852", "moving the edited blocks alone removes edits",
     plans("edited", ("all",), -1)),
    ("11", "2511.05852", "moving the other blocks alone hurts edits more than moving all",
     plans("not-edited", ("all",), -1)),
    ("10 and 11, blocks", "2511.05852", "both, against moving all blocks but no embeddings or head",
     blocks_alone),
    ("12", "2511.05852", "adapters keep more than full tuning", adapters),
    ("13", "2511.05852", "false edits persist as harmless ones do", false_as_harmless),
    ("14", "2511.05852", "edits last longer in the better trained model", early_and_finished),
]  # fmt: skip


def judged(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a claim, model and condition."""
    rows = []
    for number, paper, text, claim in CLAIMS:
        for model, part in looks.groupby("model"):
            if claim is not early_and_finished:
                part = part[part.revision != "early"]
            for condition, (mean, low, high, n), claimed in claim(part):
                row = {"claim": number, "paper": paper, "what": text, "model": model}
                row |= {
                    "condition": condition,
                    "difference": mean,
                    "low": low,
                    "high": high,
                    "n": n,
                }
                rows.append(row | {"verdict": verdict(low, high, claimed, n)})
    return pd.DataFrame(rows)


def by_plan(looks: pd.DataFrame) -> str:
    """Of editors with several plans: edited and intrinsic facts at the end of each tuning on facts,
    by what moved.
    """
    ends = pd.concat(chosen(of_blocks(looks, size), "plan", "end") for size in BATCHES)
    names = ["model", "editor", "batch", "moves", "n", "edits kept", "intrinsic kept"]
    lines = [[*names, "metric", "steps", "distance"]]
    for (model, editor, batch), arms in ends.groupby(["model", "editor", "n_edited"]):
        if arms.plan.nunique() == 1:
            continue
        for plan in (one for one in MOVES if one in set(arms.plan)):
            arm = arms[arms.plan == plan]
            facts = facts_of(arm)
            cells = [interval(kept(facts, group)) for group in ("edited", "intrinsic")]
            shares = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high, _ in cells]
            ended = f"{arm.metric.mean():.2f}", f"{arm.step.mean():.0f}", f"{arm.moved.mean():.1f}"
            counts = f"{cells[0][3]}, {cells[1][3]}"
            lines.append([model, editor, batch, f"`{plan}`", counts, *shares, *ended])
    return _markdown(lines)


def against_all(looks: pd.DataFrame) -> str:
    """A line a way to read: of how many arms (models, editors, other plans) more edits are kept
    than where everything moves, and how many differences are told from 0, fact by fact.
    """
    lines = [["read at one", "arms", "more kept", "told from 0", "fewer kept", "told from 0"]]
    for how in READ:
        results = []
        for _, models in looks.groupby("model"):
            for plan in MOVES[1:]:
                rows = list(plans(plan, ("all",), 1)(models))
                results += [result for condition, result, _ in rows if condition.endswith(how)]
        counts = [len(results)]
        for sign in (1, -1):
            counts.append(sum(sign * mean > 0 for mean, *_ in results))
            ends = [(low, high) for _, low, high, _ in results]
            counts.append(sum(min(sign * low, sign * high) > 0 for low, high in ends))
        lines.append([how, *map(str, counts)])
    return _markdown(lines)


def shown(table: pd.DataFrame) -> str:
    """A line a claim, a column a model: how many conditions hold, and their differences; of blocks
    that move, at one level of the task.
    """
    table = table[~table.condition.str.contains("at one (?:end|steps|distance)")]
    names = sorted(set(table.model))
    lines = [["claim", *names]]
    for number, _, what, _ in CLAIMS:
        cells = []
        for name in names:
            part = table[(table.claim == number) & (table.model == name)]
            counts = part.verdict.value_counts()
            words = [f"{verdict} {count}" for verdict, count in counts.items()]
            span = f"{part.difference.min():+.2f} to {part.difference.max():+.2f}"
            facts = "n " + " to ".join(map(str, sorted({part.n.min(), part.n.max()})))
            cells.append(f"{', '.join(words)} ({span}; {facts})" if words else "not run")
        lines.append([f"{number}. {what}", *cells])
    return _markdown(lines)


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rest])


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
    finished = looks[looks.revision != "early"]
    print(shown(table), by_plan(finished), against_all(finished), sep="\n\n")


if __name__ == "__main__":
    main()
