import pytest

from workbench.editing import malmen


@pytest.fixture
def hardly_taught(monkeypatch):
    """A few steps on a tiny random model teach no hyper-network to edit; that such a one is refused
    has a test of its own.
    """
    monkeypatch.setattr(malmen, "LEAST_TAKEN", 0)
