import pytest

from workbench import study
from workbench.panel import Panel


def test_whatever_nobody_touches_passes_through_unchanged():
    spec = study.Spec(max_steps=37, paraphrases=4, layers=[3, 5], editor="ft", seed=9)
    assert Panel(spec).spec is spec
    assert Panel(spec).dropdowns["max_steps"].value == 37
    assert Panel(spec).dropdowns["layers"].value == (3, 5)


@pytest.mark.parametrize(("name", "value"), [("editor", "ft"), ("layers", (7,)), ("paraphrases", 5), ("max_steps", 80)])
def test_a_choice_changes_that_field_alone(name, value):
    panel = Panel(study.Spec(seed=3))
    panel.dropdowns[name].value = value
    assert panel.spec == study.Spec(**({"seed": 3} | {name: value}))


def test_text_of_a_fact_is_shown_as_text():
    spec = study.Spec(subject="<b>Ada</b>", prompt="{} plays", object="harp", target="flute")
    shown = Panel(spec).children[0].value
    assert "<b>Ada" not in shown
    assert "&lt;b&gt;Ada" in shown


def test_every_choice_has_a_name_for_screen_and_keyboard():
    panel = Panel(study.Spec())
    assert all(dropdown.description for dropdown in panel.dropdowns.values())
