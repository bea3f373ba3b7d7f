"""Models of the world and edits of them, made once for all tests of the measures."""

from functools import cache

import workbench as wb
from workbench import facts, models
from workbench.facts import EditRequest, Fact

UNEDITED_AND_EDITED = ("", "memit")
OTHERS = ("grace", "incontext")


def cut() -> EditRequest:
    """A fact whose prompt stops a word early, so that the model says a stop word first."""
    fact = facts.named(facts.read("world"), "developer:windows-mobile-6-5", "world").fact
    prompt = fact.prompt.removesuffix(" by")
    assert prompt != fact.prompt
    asked = Fact(id="cut", subject=fact.subject, prompt=prompt, object=fact.object)
    return EditRequest(fact=asked, target="Nokia")


@cache
def studied(count: int) -> list[EditRequest]:
    study = [request for request in facts.read("world") if request.fact.split == "study"]
    return [*study[:: len(study) // count][:count], cut()]


@cache
def loaded(name: str) -> models.Model:
    return models.load(name, device="cpu")


@cache
def edit_of(name: str, editor: str, count: int):
    return wb.edit(loaded(name), studied(count)[:-1], editor)
