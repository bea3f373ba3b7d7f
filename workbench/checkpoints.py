"""A model's files: where they are, whether they are whole, what must be fetched.

Nothing is loaded.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from workbench import files, quantised
from workbench.facts import DATA, BadInput
from workbench.quantised import PACKAGED
from workbench.records import did_you_mean, listed, refused

WORLD_MODELS = ("world-gpt2", "world-llama")
EMBEDDED = " or ".join(WORLD_MODELS)  # in messages
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
# What is fetched of a Hub repository.
FILES = ("config.json", "generation_config.json", *WEIGHTS, *TOKENIZER, "chat_template*")
MERGE = "merge it (merge_and_unload) and save_pretrained it with its tokenizer, or take it out"
CONVERT = "pickled ones are refused, for they can run code; to convert them: from_pretrained(OLD, "
CONVERT += "use_safetensors=False).save_pretrained(NEW), the tokenizer beside it"
OWN_TOKENIZER = "add the one it was trained with (tokenizer.save_pretrained)"
MEND = {WEIGHTS[0]: CONVERT, "tokenizer.json": OWN_TOKENIZER}  # what to do about a missing file


def locate(name: str, revision: str = "", here: bool = False) -> tuple[Path | None, str]:
    """The folder of a model, and what its weights are rounded to ("" = not); for a Hub id None, and
    the revision.

    A GGUF file (a path, a folder with one, owner/name:FILE.gguf on the Hub, or a model that a
    package brings) is unpacked, once.

    Raises:
        BadInput: no such folder, no config.json in it, not a Hub id, or a revision where there are
            none.
    """
    if name in WORLD_MODELS:
        if revision not in ("", "early"):
            raise BadInput(f"{name}: revision {revision!r} does not exist; choose '' or 'early'")
        folder = DATA / "world" / "models" / name / revision
        _check_kind(name, folder)
        return folder, ""
    path = _quantised(name, revision, here)
    if path:
        return quantised.unpacked(path)
    folder = Path(os.path.expanduser(name))
    if name.startswith((".", "/", "~")) or (name and os.path.exists(folder)):
        _check_no_revision(name, revision)
        _check_kind(name, folder)
        return folder, ""
    with refused(f"model {name!r}: no such folder, nor a Hub id", f"give one, or {EMBEDDED}"):
        validate_repo_id(name)
    near = did_you_mean(name, (*WORLD_MODELS, *PACKAGED))
    if near:
        raise BadInput(f"model {name!r}{near} The embedded ones are {EMBEDDED}")
    return None, revision or "main"


def source_of(name: str) -> str:
    """The facts that a model was taught, or such as any may know."""
    return "world" if is_world(name) else "plain"


def is_world(name: str) -> bool:
    """Whether a model was taught the world: an embedded one, or a folder made of one, which has
    its tokenizer.
    """
    if name in WORLD_MODELS:
        return True
    embedded = DATA / "world" / "models" / WORLD_MODELS[0] / "tokenizer.json"
    path = Path(os.path.expanduser(name)) / embedded.name
    with suppress(OSError, ValueError, LookupError, TypeError):  # loading it says why
        # a large one takes long to read, and is asked for many times in a sweep; ours has 265 kB
        return path.stat().st_size < 2**20 and _vocabulary(path) == _vocabulary(embedded)
    return False


def _vocabulary(path: Path) -> dict[str, int]:
    return json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]


def _check_no_revision(name: str, revision: str) -> None:
    if revision:
        raise BadInput(f"model {name!r}: a folder has no revision {revision!r}; leave it out")


def _quantised(name: str, revision: str, here: bool) -> Path | None:
    """The GGUF file that a name means, fetched if it is the Hub's, unless only what is `here`
    counts; None if it means another.
    """
    repository, _, file = name.partition(":")
    if file.endswith(".gguf") and not os.path.exists(name):
        fetch = partial(huggingface_hub.hf_hub_download, repository, file, local_files_only=here)
        return _fetched(f"{repository} {file}", revision, "it", fetch, revision or None)
    if name in PACKAGED:
        path: Path | None = quantised.packaged(name)
    else:
        path = quantised.in_folder(Path(os.path.expanduser(name)))
    if path:
        _check_no_revision(name, revision)
    return path


def _check_kind(name: str, folder: Path) -> None:
    """BadInput if a folder holds no model in Hugging Face layout, or an adapter beside it."""
    if os.path.isfile(folder / "adapter_config.json"):
        raise BadInput(f"model {name!r}: an adapter, which would be attached unseen; {MERGE}")
    if not os.path.isfile(folder / "config.json"):
        advice = f"give a folder that save_pretrained wrote, a Hub id, {EMBEDDED}"
        raise BadInput(f"model {name!r}: no config.json there; {advice}")


def fetched(name: str, revision: str = "") -> tuple[Path, str]:
    """The folder with all files of a model, and their Hub commit or what they are rounded to.

    What is missing of a Hub id is fetched.

    Raises:
        BadInput: what `locate` and `check` find; or the Hub's library cannot have it.
    """
    folder, pinned = locate(name, revision)
    if folder is None:
        fetch = partial(huggingface_hub.snapshot_download, name, allow_patterns=list(FILES))
        folder = _fetched(name, revision, "its files", fetch, commit(name, pinned))
        pinned = folder.name
    check(name, folder)
    return folder, pinned


def configuration(name: str, revision: str = "", here: bool = False) -> Path:
    """The folder with a model's config.json.

    Of a Hub id that file is fetched if it is not in the cache, unless only what is `here` counts.
    """
    folder, at = locate(name, revision, here)
    if folder is not None:
        return folder
    if not here:
        at = commit(name, at)
    fetch = partial(huggingface_hub.hf_hub_download, name, "config.json", local_files_only=here)
    return _fetched(name, revision, "config.json", fetch, at).parent


def _fetched(
    name: str, revision: str, what: str, fetch: Callable[..., str], at: str | None
) -> Path:
    """What the Hub's library fetches; BadInput with its reason: gated, unknown, offline, the disk.

    Args:
        at: the commit of the revision, or what names one.
    """
    try:
        return Path(fetch(revision=at))
    except Exception as error:  # of the library, its transports, the disk
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:80]
        command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        advice = f"`{command}`, after `hf auth login` if it is gated or private, or use {EMBEDDED}"
        what = f"model {name!r}: {what} cannot be had from cache or Hub ({reason})"
        raise BadInput(f"{what}; {advice}") from None


@cache
def commit(name: str, revision: str) -> str:
    """The commit of a Hub revision, asked once; offline the cache's, else the revision."""
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception:  # loading it says why
        path = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision)
        return Path(path).parent.name if isinstance(path, str) else revision


def check(name: str, folder: Path) -> None:
    """BadInput if the folder lacks weights (safetensors only), one of their shards, or the
    tokenizer.
    """
    lacking: list[str] = []
    index = folder / WEIGHTS[1]
    if index.is_file() and not (folder / "model.safetensors").is_file():
        with refused(f"{folder}: {index.name} is broken", "copy or fetch it again"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        lacking += sorted(shard for shard in shards if not (folder / shard).is_file())
    elif not any(folder.glob(WEIGHTS[0])):
        lacking.append(WEIGHTS[0])
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer.*", "vocab.*", "*.model")):
        lacking.append("tokenizer.json")
    if lacking:
        problem = f"missing {listed(lacking, most=3)} ({len(lacking)} in all)"
        advice = MEND.get(lacking[0], "copy or fetch again what is missing")
        raise BadInput(f"model {name!r}: {problem}; {advice}")


def file_fingerprint(name: str, revision: str = "") -> str:
    """A hash of a folder's weights, configuration and tokenizer; for a Hub id its commit."""
    folder, at = locate(name, revision)
    if folder is None:
        return f"{name}@{commit(name, at)}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"):
            digest.update(path.name.encode() + files.digest(path).encode())
    return digest.hexdigest()
