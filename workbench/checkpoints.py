"""A model's files: where they are, whether they are whole, what must be fetched.

Nothing is loaded.
"""

import hashlib
import json
import os
from functools import cache
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors

from workbench.facts import DATA, BadInput
from workbench.records import did_you_mean

WORLD_MODELS = ("world-gpt2", "world-llama")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
FILES = (
    "config.json",
    "generation_config.json",
    *WEIGHTS,
    *TOKENIZER,
)  # what is fetched of a Hub repository
UNPACK = "load it with transformers (from_pretrained(folder, gguf_file=...)) and save_pretrained it into a folder"
MERGE = "merge it (peft: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW), the tokenizer beside it)"
CONVERT = "AutoModelForCausalLM.from_pretrained(OLD, use_safetensors=False).save_pretrained(NEW), the tokenizer beside it"


def locate(name: str, revision: str = "") -> tuple[Path | None, str]:
    """The folder of a world model or of a path, and ""; for a Hub id None, and the revision.

    Raises:
        BadInput: no such folder, no config.json in it, not a Hub id, or a revision where there are
            none.
    """
    if name in WORLD_MODELS:
        if revision not in ("", "early"):
            raise BadInput(
                f"{name}: revision {revision!r} does not exist; choose '' (finished) or 'early'"
            )
        folder = DATA / "world" / "models" / name / revision
        if not (folder / "config.json").is_file():
            raise BadInput(
                f"model {name!r}: no config.json in {folder}; `workbench pretrain {name}` makes it"
            )
        return folder, ""
    folder = Path(os.path.expanduser(name))
    if name.startswith((".", "/", "~")) or (name and os.path.exists(folder)):
        if revision:
            raise BadInput(f"model {name!r}: a folder has no revision {revision!r}; leave it out")
        if os.path.isfile(folder / "adapter_config.json"):
            raise BadInput(
                f"model {name!r}: holds an adapter (adapter_config.json), which would be attached unseen; {MERGE}, or take it out"
            )
        if not os.path.isfile(folder / "config.json"):
            if (folder.suffix == ".gguf" and folder.is_file()) or any(folder.glob("*.gguf")):
                raise BadInput(
                    f"model {name!r}: is a GGUF file, which holds rounded weights; {UNPACK}"
                )
            raise BadInput(
                f"model {name!r}: no config.json there; give a folder that save_pretrained wrote, a Hub id, or one of {', '.join(WORLD_MODELS)}"
            )
        return folder, ""
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except errors.HFValidationError:
        raise BadInput(
            f"model {name!r}: no such folder, and not a Hub id (owner/name); the embedded ones are {', '.join(WORLD_MODELS)}"
        ) from None
    if near := did_you_mean(name, WORLD_MODELS):
        raise BadInput(f"model {name!r}{near} The embedded ones are {', '.join(WORLD_MODELS)}")
    return None, revision or "main"


def fetched(name: str, revision: str = "") -> tuple[Path, str]:
    """The folder with all files of a model, and the Hub commit that they are of ("" for a folder);
    what is missing of a Hub id is fetched.

    Raises:
        BadInput: what `locate` and `check` find; or the Hub refuses it, does not know it, or is out
            of reach (what is missing then).
    """
    folder, at = locate(name, revision)
    if folder is None:
        try:
            folder = Path(
                huggingface_hub.snapshot_download(
                    name, revision=commit(name, at), allow_patterns=list(FILES)
                )
            )
        except Exception as error:  # of the Hub's library, its transports, the disk
            raise BadInput(refusal(name, revision, error)) from None
        check(name, folder)
        return folder, folder.name
    check(name, folder)
    return folder, ""


def configuration(name: str, revision: str = "", here: bool = False) -> Path:
    """The folder with a model's config.json; of a Hub id that file is fetched if it is not in the
    cache, unless only what is `here` counts.
    """
    folder, at = locate(name, revision)
    if folder is not None:
        return folder
    try:
        at = at if here else commit(name, at)
        return Path(
            huggingface_hub.hf_hub_download(name, "config.json", revision=at, local_files_only=here)
        ).parent
    except Exception as error:
        raise BadInput(refusal(name, revision, error)) from None


@cache
def commit(name: str, revision: str) -> str:
    """The commit that a Hub revision is at, asked once a process; offline what the cache has, else
    the revision as it is.
    """
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10).sha
    except Exception:  # loading it says why
        kept = cached(name, revision)
        return kept.name if kept else revision


def check(name: str, folder: Path) -> None:
    """BadInput if the folder lacks weights (safetensors only), one of their shards, or the
    tokenizer.
    """
    found = missing(folder)
    if not found:
        return
    pickled = sorted(
        path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern)
    )
    at = f"model {name!r}"
    if WEIGHTS[0] in found:
        held = "no safetensors weights in it"
        if pickled:
            held = f"only pickled weights ({pickled[0]}), refused since they can run code"
        raise BadInput(f"{at}: {held}; convert them where you trust them: {CONVERT}")
    if "tokenizer.json" in found:
        advice = "add the one it was trained with (tokenizer.save_pretrained)"
        raise BadInput(f"{at}: no tokenizer in it; {advice}")
    raise BadInput(f"{at}: {_some(found)} missing; copy or fetch again what is missing")


def missing(folder: Path) -> list[str]:
    """Names of the files that a model folder lacks: configuration, shards of the index, all
    weights, the tokenizer.
    """
    lacking = [] if (folder / "config.json").is_file() else ["config.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise BadInput(
                f"model folder {folder}: {index.name} is broken; copy or fetch it again"
            ) from None
        lacking += sorted(shard for shard in shards if not (folder / shard).is_file())
    elif not any(folder.glob(WEIGHTS[0])):
        lacking.append(WEIGHTS[0])
    if not any(any(folder.glob(pattern)) for pattern in ("tokenizer.*", "vocab.*", "*.model")):
        lacking.append("tokenizer.json")
    return lacking


def downloads(name: str, revision: str = "") -> list[tuple[str, int]] | None:
    """(file, bytes) of what loading would fetch from the Hub; None if the Hub cannot be asked."""
    folder, at = locate(name, revision)
    if folder is not None:
        return []
    try:
        files = huggingface_hub.snapshot_download(
            name, revision=at, allow_patterns=list(FILES), dry_run=True
        )
    except Exception:
        return [] if (kept := cached(name, at)) and not missing(kept) else None
    return [(file.filename, file.file_size or 0) for file in files if file.will_download]


def cached(name: str, revision: str) -> Path | None:
    """Where the Hub's cache keeps this model, whole or not."""
    found = huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision or "main")
    return Path(found).parent if isinstance(found, str) else None


def file_fingerprint(name: str, revision: str = "") -> str:
    """Of a model's files, without loading it: a hash of the folder's weights, configuration and
    tokenizer; for a Hub id the commit in the cache.
    """
    folder, at = locate(name, revision)
    if folder is None:
        return f"{name}@{commit(name, at)}"
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.*")):
        if path.suffix in (".safetensors", ".json", ".txt", ".model", ".jinja"):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def refusal(name: str, revision: str, error: Exception) -> str:
    """One line on why a Hub model cannot be had: gated, unknown, the disk, or out of reach, and
    then what the cache lacks.
    """
    at = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or (
        status in (401, 403) and not isinstance(error, errors.RepositoryNotFoundError)
    ):
        return f"{at}: the Hub refuses it; accept the licence on the model's page and log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError | errors.RepositoryNotFoundError):
        return f"{at}: the Hub has no such model or revision; check the name, or log in with `hf auth login` if it is private"
    if (
        isinstance(error, OSError)
        and error.errno
        and not isinstance(error, ConnectionError | TimeoutError | FileNotFoundError)
    ):
        return f"{at}: cannot be written into the Hub's cache ({error.strerror}); free some space, or name another folder in HF_HOME"
    kept = cached(name, revision)
    lacking = (missing(kept) if kept else []) or ["config.json" if not kept else "a file"]
    return (
        f"{at}: not whole on this machine ({_some(lacking)} missing from the cache), and the Hub is out of reach; fetch it once with "
        f"`hf download {name}{f' --revision {revision}' if revision else ''}`, or use {' or '.join(WORLD_MODELS)}"
    )


def _some(names: list[str]) -> str:
    return (
        f"{names[0]} is"
        if len(names) == 1
        else f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} files) are"
    )
