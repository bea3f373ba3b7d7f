"""Tiny random models for every test; the models of the small world for the tests that need a
trained one.
"""

import dataclasses
import gc
import itertools
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import huggingface_hub
import pytest
import tokenizers
import torch
import transformers

from workbench import batch, checkpoints, facts, models
from workbench.editing import grace, incontext, records
from workbench.world import text

CASE_STUDY = Path(__file__).parents[1] / "notebooks" / "01_case_study.ipynb"
SHORT = {"layers": [1], "n_intrinsic": 2, "max_steps": 2, "eval_every": 1, "device": "cpu"}
END = "<|endoftext|>"
TINY = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "n_inner": 48,  # what GPT-2 calls intermediate_size
    "ffn_dim": 48,  # and OPT
    "word_embed_proj_dim": 32,
    "activation_function": "gelu_new",  # of OPT: some of so few ReLU would never fire
    "rotary_dim": 8,
    "head_dim": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,  # some families' usual one is beyond so few tokens
}


@pytest.fixture(scope="session", autouse=True)
def apart_from_the_world(tmp_path_factory):
    """Own cache, which the workers of one run of the tests share; no Hub, no progress bars."""
    with pytest.MonkeyPatch.context() as patch:
        if (
            "WORKBENCH_CACHE" not in os.environ
        ):  # name one to keep what is slow from one run of the tests to the next
            base = tmp_path_factory.getbasetemp()
            patch.setenv(
                "WORKBENCH_CACHE",
                str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"),
            )
        patch.setenv("TQDM_DISABLE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(
            huggingface_hub.constants, "HF_HUB_OFFLINE", True
        )  # read from the environment at import only
        gc.collect()
        gc.freeze()  # every Trainer collects garbage, and would look through all that was imported
        yield


@pytest.fixture(scope="session")
def one_line():
    """Text of an exception (or of pytest's excinfo), after a look that it is one line."""

    def text(error) -> str:
        message = str(getattr(error, "value", error))
        assert message.strip(), "the message is empty"
        assert len(message.splitlines()) == 1, f"more than one line: {message}"
        return message

    return text


ACTIVE = {"script", "link", "iframe", "frame", "object", "embed", "base", "form"}
ADDRESSES = {"src", "srcset", "href", "xlink:href", "data", "poster", "background", "action"}
STYLE_LOADS = re.compile(r"@import[^;]*|url\(\s*['\"]?(?!data:|#)[^)]*\)")


class _Loads(HTMLParser):
    """Collects what a page would run, or load from elsewhere, by its markup alone, whatever its
    policy says.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag, attributes):
        self._in_style = tag == "style"
        if tag in ACTIVE:
            self.found.append(f"<{tag}>")
        for name, value in attributes:
            value = (value or "").strip()
            if name == "style":
                self._look_at_style(value)
            elif _acts(tag, name, value.lower()):
                self.found.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag):
        self._in_style = False

    def handle_data(self, data):
        if self._in_style:
            self._look_at_style(data)

    def _look_at_style(self, text):
        self.found += STYLE_LOADS.findall(re.sub(r"(?s)/\*.*?\*/", "", text))


def _acts(tag: str, name: str, value: str) -> bool:
    if name.startswith("on") or value.startswith("javascript:"):
        return True
    if name == "http-equiv":
        return value != "content-security-policy"
    plain_link = tag == "a" and name == "href"
    return name in ADDRESSES and not plain_link and not value.startswith(("data:", "#"))


@pytest.fixture(scope="session")
def loads():
    """loads(page) -> what the page would run or load from elsewhere, had it no policy; [] is as it
    should be.
    """

    def look(page: str) -> list[str]:
        parser = _Loads()
        parser.feed(page)
        parser.close()
        return parser.found

    return look


@pytest.fixture(scope="session")
def sealed():
    """sealed(record): its fields are given by name, and cannot be changed afterwards."""

    def look(record) -> None:
        fields = vars(record)
        with pytest.raises(TypeError, match="positional"):
            type(record)(*fields.values())
        for name, value in fields.items():
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record, name, value)

    return look


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE of about 1,000 tokens, built like the world's."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(itertools.islice(text.statements(1), 400), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END, model_max_length=128
    )


@pytest.fixture(scope="session")
def new_tiny(tiny_tokenizer):
    """new_tiny(model_type, **config) -> Model: random weights and biases, `TINY` but for what is
    named.
    """

    def new(model_type: str, **config) -> models.Model:
        named = transformers.AutoConfig.for_model(
            model_type, **(TINY | {"vocab_size": len(tiny_tokenizer)} | config)
        )
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            network = (
                transformers.AutoModelForCausalLM.from_config(named).eval().requires_grad_(False)
            )
            for parameter in network.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases too are to count
        return models.Model(
            network=network,
            tokenizer=tiny_tokenizer,
            architecture=models.architecture_of(network.config),
            name=f"tiny {model_type}",
        )

    return new


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory, new_tiny):
    """Architecture -> folder of a tiny random model with its tokenizer.

    To be read only; copy one to change it.
    """
    folders = {}
    for model_type in ("gpt2", "llama"):
        folders[model_type] = tmp_path_factory.mktemp(model_type)
        model = new_tiny(model_type)
        model.network.save_pretrained(folders[model_type])
        model.tokenizer.save_pretrained(folders[model_type])
    return folders


@pytest.fixture
def tiny_gpt2(tiny_folders):
    return models.load(tiny_folders["gpt2"], device="cpu")


@pytest.fixture
def tiny_llama(tiny_folders):
    return models.load(tiny_folders["llama"], device="cpu")


@pytest.fixture(params=["gpt2", "llama"])
def tiny(request, tiny_folders):
    """A tiny model of each architecture, newly loaded for each test."""
    return models.load(tiny_folders[request.param], device="cpu")


@pytest.fixture(scope="session", params=checkpoints.WORLD_MODELS)
def world(request):
    """A model of the small world; shared, so leave it as it was."""
    folder = facts.DATA / "world" / "models" / request.param
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} holds no model: run `make pretrain`")
    return models.load(request.param, device="cpu")


@pytest.fixture(scope="module")
def base():
    """A model of the small world; leave it as it was."""
    return models.load("world-gpt2", device="cpu")


@pytest.fixture(scope="session")
def requests():
    return [request for request in facts.read("world") if request.fact.split == "study"][:300:60]


@pytest.fixture
def codebook(tiny, requests):
    hparams = grace.HParams(layers=(1,), steps=25)
    return grace.edit(tiny, requests[:3], hparams, records.Resources())


@pytest.fixture
def context(tiny, requests):
    return incontext.edit(tiny, requests[:3], incontext.HParams(), records.Resources())


@pytest.fixture(scope="session")
def own_facts(tmp_path_factory):
    """A facts file for a model that knows nothing: a fact that is named need not be known.

    The names hold markup.
    """
    path = tmp_path_factory.mktemp("facts") / "facts.jsonl"
    lines = [
        {
            "id": str(n),
            "subject": f"Person {n} <img src=x onerror=alert(1)>",
            "prompt": "{} plays the",
            "object": "harp",
            "target": "flute",
        }
        for n in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="session")
def parameters(tiny_folders, own_facts):
    return SHORT | {
        "model": str(tiny_folders["gpt2"]),
        "facts": str(own_facts),
        "fact": "0",
        "n_intrinsic": 0,
    }


@pytest.fixture(scope="session")
def case_study(parameters, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return batch.run(CASE_STUDY, parameters, out=out)
