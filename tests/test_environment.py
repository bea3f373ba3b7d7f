"""environment.yml and constraints.txt say the same as pyproject.toml."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILES = ("pyproject.toml", "environment.yml", "constraints.txt")
CONDA_NAMES = {"torch": "pytorch"}


def differences(pyproject_text: str, environment_text: str, constraints_text: str) -> list[str]:
    """What environment.yml and constraints.txt get wrong, a sentence each."""
    project = tomllib.loads(pyproject_text)["project"]
    required = _bounds(project["dependencies"])
    tested = _bounds(project["optional-dependencies"]["test"])
    return _environment(required, project["requires-python"], environment_text) + _constraints(
        required | tested, constraints_text
    )


def _bounds(lines: list[str]) -> dict:
    requirements = map(Requirement, lines)
    return {
        canonicalize_name(requirement.name): requirement.specifier for requirement in requirements
    }


def _environment(required: dict, python: str, text: str) -> list[str]:
    environment = yaml.safe_load(text)
    found = []
    if environment["channels"] != ["conda-forge", "nodefaults"]:
        found.append(f"environment.yml: channels are {environment['channels']}")

    *conda, last = environment["dependencies"]
    if last != {"pip": ["-e .[test]"]}:
        found.append(
            "environment.yml: the last dependency is not the pip section with `-e .[test]`"
        )
        conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    here = _bounds(conda)
    if here.pop("pip", None) is None:
        found.append("environment.yml: no pip before the pip section")

    expected = {CONDA_NAMES.get(name, name): bound for name, bound in required.items()} | _bounds(
        [f"python{python}"]
    )
    found += [f"environment.yml: lacks {name}" for name in expected.keys() - here.keys()]
    found += [
        f"environment.yml: {name} is not in pyproject.toml"
        for name in here.keys() - expected.keys()
    ]
    shared = expected.keys() & here.keys()
    found += [
        f"environment.yml: {name}{here[name]}, pyproject.toml: {expected[name]}"
        for name in shared
        if here[name] != expected[name]
    ]
    return found


def _constraints(required: dict, text: str) -> list[str]:
    found, pins = [], {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        name, exact, version = line.partition("==")
        if not exact or "+" in version:
            found.append(f"constraints.txt: {line!r} is not name==version without a local part")
        pins[canonicalize_name(name)] = version
    for name, bound in required.items():
        if name not in pins:
            found.append(f"constraints.txt: lacks {name}")
        elif not bound.contains(pins[name], prereleases=True):
            found.append(f"constraints.txt: {name}=={pins[name]}, pyproject.toml: {bound}")
    return found


def test_files_agree():
    assert differences(*((ROOT / name).read_text() for name in FILES)) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("environment.yml", "  - peft>=0.21\n", "", "environment.yml: lacks peft"),
        ("environment.yml", "  - pytorch>=", "  - torch>=", "environment.yml: lacks pytorch"),
        (
            "environment.yml",
            "  - pip\n",
            "  - pip\n  - scipy>=1.0\n",
            "environment.yml: scipy is not in pyproject.toml",
        ),
        (
            "environment.yml",
            "numpy>=2.0",
            "numpy>=1.26",
            "environment.yml: numpy>=1.26, pyproject.toml: >=2.0",
        ),
        (
            "environment.yml",
            "python>=3.11",
            "python>=3.10",
            "environment.yml: python>=3.10, pyproject.toml: >=3.11",
        ),
        ("environment.yml", "  - pip\n", "", "environment.yml: no pip before the pip section"),
        (
            "environment.yml",
            "-e .[test]",
            "-e .",
            "environment.yml: the last dependency is not the pip section with `-e .[test]`",
        ),
        (
            "environment.yml",
            "nodefaults",
            "defaults",
            "environment.yml: channels are ['conda-forge', 'defaults']",
        ),
        (
            "pyproject.toml",
            "torch>=2.9",
            "torch>=99",
            "constraints.txt: torch==2.13.0, pyproject.toml: >=99",
        ),
        ("constraints.txt", "\nnbmake==", "\nnbmade==", "constraints.txt: lacks nbmake"),
        (
            "constraints.txt",
            "\npeft==0.21.2\n",
            "\npeft>=0.21\n",
            "constraints.txt: 'peft>=0.21' is not name==version without a local part",
        ),
        (
            "constraints.txt",
            "torch==2.13.0",
            "torch==2.13.0+cpu",
            "constraints.txt: 'torch==2.13.0+cpu' is not name==version without a local part",
        ),
    ],
)
def test_a_difference_is_found(tmp_path, name, old, new, message):
    for file in FILES:
        text = (ROOT / file).read_text()
        if file == name:
            assert old in text
            text = text.replace(old, new, 1)
        (tmp_path / file).write_text(text)
    assert message in differences(*((tmp_path / file).read_text() for file in FILES))


def test_the_hashes_are_those_of_the_constraints():
    """The same versions, but for torch, and at least one SHA-256 each."""
    pinned = {
        line
        for line in (ROOT / "constraints.txt").read_text().split()
        if "==" in line and not line.startswith("torch==")
    }
    hashed = re.findall(
        r"^(\S+==\S+) \\\n    --hash=sha256:[0-9a-f]{64}",
        (ROOT / "hashes.txt").read_text(),
        re.MULTILINE,
    )
    assert {canonicalize_name(line) for line in hashed} == {
        canonicalize_name(line) for line in pinned
    }
