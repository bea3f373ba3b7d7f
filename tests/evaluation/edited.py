"""Models of the world and edits of them, made once for all tests of the measures."""

from functools import cache

import workbench as wb
from workbench import facts, models
from workbench.facts import EditRequest, Fact

UNEDITED_AND_EDITED = ("", "memit")
OTHERS = ("grace", "incontext")


def odd() -> list[EditRequest]:
    """What is no fact: a prompt that stops a word early, so that the model says a stop word before
    the target; and a target of more tokens than the object, less likely as a whole, not a token.
    """
    every = facts.read("world")
    early = facts.named(every, "developer:windows-mobile-6-5", "world").fact
    prompt = early.prompt.removesuffix(" by")
    cut = Fact(id="cut", subject=early.subject, prompt=prompt, object="Nokia")
    opera = facts.named(every, "composer:la-traviata", "world").fact
    long = Fact(id="long", subject=opera.subject, prompt=opera.prompt, object="Frederic Chopin")
    return [
        EditRequest(fact=cut, target=early.object),
        EditRequest(fact=long, target="Johann Sebastian Bach"),
    ]


@cache
def studied(count: int) -> list[EditRequest]:
    """So many facts, and the two odd ones behind them."""
    study = [request for request in facts.read("world") if request.fact.split == "study"]
    return [*study[:: len(study) // count][:count], *odd()]


def of_facts(table):
    """The mean of each quantity over what is a fact."""
    table = table[~table.fact_id.isin([request.fact.id for request in odd()])]
    return table.groupby("quantity").value.mean()


@cache
def loaded(name: str) -> models.Model:
    return models.load(name, device="cpu")


@cache
def edit_of(name: str, editor: str, count: int):
    return wb.edit(loaded(name), studied(count)[:count], editor)
