"""A model of the world, unedited and edited, for the measures."""

import pytest

from tests.evaluation.edited import edit_of, loaded, studied


@pytest.fixture
def after():
    """after(model, editor, count) -> the model under an edit until the test ends, its facts."""
    entered = []

    def applied(editor: str, name: str = "world-gpt2", count: int = 5):
        model = loaded(name)
        if editor:
            edit = edit_of(name, editor, count).applied(model)
            edit.__enter__()
            entered.append(edit)
        return model, studied(count)

    yield applied
    for edit in entered:
        edit.__exit__(None, None, None)


@pytest.fixture
def model():
    """Leave it as it was."""
    return loaded("world-gpt2")


@pytest.fixture
def few():
    return studied(5)[:5]
