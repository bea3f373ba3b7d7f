"""Tiny models that were really taught a few sentences, each with a tokenizer of a kind that the
world's is not.
"""

from collections.abc import Sequence

import tokenizers
import torch
import transformers
from tokenizers import decoders, pre_tokenizers, processors, trainers
from tokenizers import models as backends

from workbench import models
from workbench.positions import encode

END = "<|endoftext|>"
SPECIAL = (END, "<|im_start|>", "<|im_end|>")
STATEMENTS = {  # by the kind of tokenizer
    "digits": (
        "The battle of Arden took place in the year 1945",
        "The battle of Belmont took place in the year 1847",
        "The battle of Corin took place in the year 1812",
        "The port of Dunmore lies near New York City",
        "The port of Elgar lies near New Orleans",
        "The court of Farrow sits in The Hague",
        "The bells of Gant ring for The Hunchback of Notre Dame",
        "The mills of Hollin stand in Yorkshire",
        "The mills of Ilkar stand in York",
        "The queen of Jarrow was born in the town of Leeds",
    ),
    "bytes": (
        "法国的首都是巴黎",
        "日本的首都是东京",
        "中国的首都是北京",
        "英国的首都是伦敦",
        "东国的首都是东方",
        "столица Франции это Париж",
    ),
    "sentencepiece": (
        "The river Tam flows into the Oder",
        "The river Ulm flows into the Elbe",
        "The tower of Vern was built in 1920",
    ),
}


def new_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    """Digits one by one after a lone space, as SmolLM2's, whose BOS is a token of its chats;
    characters in bytes; or SentencePiece's.
    """
    special = list(SPECIAL)
    if kind == "sentencepiece":
        backend = tokenizers.Tokenizer(backends.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    else:
        backend = tokenizers.Tokenizer(backends.BPE())
        parts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        backend.decoder = decoders.ByteLevel()
    alphabet = [] if kind == "sentencepiece" else pre_tokenizers.ByteLevel.alphabet()
    size = 300 if kind == "bytes" else 500  # so few that characters of three bytes stay in pieces
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(STATEMENTS[kind], trainer)
    named = (
        {"bos_token": special[0], "eos_token": special[1]}
        if kind == "sentencepiece"
        else {"bos_token": SPECIAL[1], "eos_token": SPECIAL[2]}
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def taught(kind: str, statements: Sequence[str] = (), steps: int = 120) -> models.Model:
    """A model of two blocks that says the statements of its kind, and what is named, by heart."""
    tokenizer = new_tokenizer(kind)
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), max_position_embeddings=128, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(config)
        model = models.Model(
            network=network,
            tokenizer=tokenizer,
            architecture=models.architecture_of(config),
            name=f"taught {kind}",
        )
        rows = encode(model, [f"{statement}." for statement in (*STATEMENTS[kind], *statements)])
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        adam = torch.optim.AdamW(network.parameters(), lr=5e-3)
        for _ in range(steps):
            adam.zero_grad()
            network(**rows.arguments(), labels=labels).loss.backward()
            adam.step()
    network.eval().requires_grad_(False)
    return model
