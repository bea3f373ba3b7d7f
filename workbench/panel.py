"""The panel: a Spec in dropdowns. Whatever nobody touches is passed through unchanged, so a value outside a list is never clamped."""

import html

import ipywidgets

from workbench.editing import EDITORS
from workbench.facts import BadInput
from workbench.study import Spec

CHOICES = {  # field -> (label, values offered)
    "editor": ("Editor", None),
    "layers": ("Edited layer", None),
    "paraphrases": ("Paraphrases", (1, 2, 3, 5, 10)),
    "max_steps": ("Fine-tuning steps", (0, 20, 40, 80, 120, 240)),
}


class Panel(ipywidgets.VBox):
    """Dropdowns over a Spec; `.spec` is the Spec as chosen, `.message` says in place what is wrong with a choice.

    Args:
        spec: the starting point; its own values are always among those offered.
        n_blocks: of the model, for the list of layers.
    """

    def __init__(self, spec: Spec, n_blocks: int = 12):
        self.spec = spec
        offered = {name: values for name, (_, values) in CHOICES.items()}
        offered["editor"] = tuple(EDITORS)
        offered["layers"] = ((), *((layer,) for layer in range(n_blocks)))
        self.dropdowns = {}
        for name, values in offered.items():
            current = getattr(spec, name)
            values = values if current in values else (current, *values)
            options = [(self._text(name, value), value) for value in values]
            dropdown = ipywidgets.Dropdown(options=options, value=current, description=CHOICES[name][0], style={"description_width": "9em"})
            dropdown.observe(lambda change, name=name: self._changed(name, change["new"]), "value")
            self.dropdowns[name] = dropdown
        self.message = ipywidgets.HTML()
        fact = ipywidgets.HTML(
            f"Fact: <code>{html.escape(spec.fact or spec.subject or 'a sample')}</code>, model <code>{html.escape(spec.model)}</code>"
        )
        super().__init__([fact, *self.dropdowns.values(), self.message], _dom_classes=("workbench-panel",))

    @staticmethod
    def _text(name: str, value) -> str:
        if name == "layers":
            return ", ".join(map(str, value)) or "the preset's"
        return "the task's" if name == "max_steps" and value == 0 else str(value)

    def _changed(self, name: str, value) -> None:
        try:
            self.spec = Spec(**(self.spec.model_dump() | {name: value}))
            self.message.value = "Run the cells below to see the effect."
        except BadInput as error:
            self.message.value = f"<b>{html.escape(str(error))}</b>"
