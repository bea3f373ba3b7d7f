"""Teach the world to two small models, and measure what they learnt.

`python -m data.world.make.pretrain world-gpt2` on two cores: under 30 minutes.
"""

import argparse
import copy
import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers

from data.world.make.measures import measure
from workbench import files, inert, runs
from workbench.checkpoints import WORLD_MODELS
from workbench.facts import DATA, BadInput, objects_of, read, world_rows
from workbench.models import Model, architecture_of, load
from workbench.positions import ROW
from workbench.tracking.retention import measure_prompts
from workbench.world import text

ROWS = 8  # rows of a step
RARE = 0.03  # share of the prose that is of the fine-tuning register: met, but rarely
VOCABULARY = 4096
EARLY = 0.5  # mean p(true) at which the early checkpoint is kept
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Numbers of one model.

    `occurrences`: statements of a fact shown "once"; one shown "four times" is stated 4 times as
    often.
    """

    occurrences: int
    learning_rate: float
    weight_decay: float


RECIPES = {
    "world-gpt2": Recipe(occurrences=70, learning_rate=1.5e-3, weight_decay=0.1),
    "world-llama": Recipe(occurrences=74, learning_rate=1e-3, weight_decay=0.5),
}
_END = "<|endoftext|>"


def _passages(seed: int) -> Iterator[str]:
    """One to three sentences of one paragraph, mostly of the everyday register."""
    rng = random.Random(f"passages {seed}")
    everyday, trade = (text.prose(register, seed) for register in text.REGISTERS)
    while True:
        sentences = next(trade if rng.random() < RARE else everyday)
        while sentences:
            size = rng.randint(1, 3)
            yield " ".join(sentences[:size])
            sentences = sentences[size:]


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE learnt on the corpus; every text starts as if after a space, so a statement
    reads the same everywhere.
    """
    passages = _passages(SEED)
    objects = sorted(
        {row["object"].split()[0] for row in world_rows()}
    )  # rare ones too are to become one token
    corpus = [*text.statements(2), *(next(passages) for _ in range(20_000)), *objects * 100]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[_END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        model_max_length=ROW,
    )


def check_first_tokens(tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    """ValueError if two objects of a category share their first token."""
    for category, ordered in objects_of(read("world")).items():
        seen: dict[int, str] = {}
        for thing, (token, *_) in zip(
            ordered, tokenizer(list(ordered))["input_ids"], strict=True
        ):  # as if after a space
            if token in seen:
                raise ValueError(f"{category}: {thing} and {seen[token]} start with the same token")
            seen[token] = thing


def packed_rows(
    tokenizer: transformers.PreTrainedTokenizerBase,
    occurrences: int,
    seed: int = SEED,
    pool: int = 400,
) -> datasets.Dataset:
    """Rows of `ROW` tokens, each several whole statements and passages; every second row starts
    with BOS, the others without.

    Statements and passages come in random order; a row takes the longest that still fits from a
    pool of the next ones, so hardly any place is left over and no statement is cut.
    """
    rng = random.Random(f"rows {seed}")
    facts = tokenizer(list(text.statements(occurrences)))["input_ids"]
    wanted = int(sum(map(len, facts)) * text.PROSE / (1 - text.PROSE))
    passages, prose = _passages(seed), []
    while wanted > 0:
        batch = tokenizer([next(passages) for _ in range(2000)])["input_ids"]
        prose += batch
        wanted -= sum(map(len, batch))
    units = [unit for unit in facts + prose if len(unit) < ROW]
    rng.shuffle(units)
    rows, waiting, left = [], units[:pool], iter(units[pool:])
    while waiting:
        row = [tokenizer.bos_token_id] if len(rows) % 2 else []
        while True:
            fitting = [number for number, unit in enumerate(waiting) if len(unit) <= ROW - len(row)]
            if not fitting:
                break
            longest = max(fitting, key=lambda number: len(waiting[number]))
            chosen = rng.choice(fitting) if ROW - len(row) > 40 else longest
            row += waiting[chosen]
            waiting[chosen] = waiting[-1]
            waiting.pop()
            if (following := next(left, None)) is not None:
                waiting.append(following)
        rows.append(row)
    rng.shuffle(rows)
    pad = [row + [tokenizer.pad_token_id] * (ROW - len(row)) for row in rows]
    return datasets.Dataset.from_dict(
        {
            "input_ids": pad,
            "attention_mask": [[1] * len(row) + [0] * (ROW - len(row)) for row in rows],
            "labels": [row + [-100] * (ROW - len(row)) for row in rows],
        }
    )


def new_network(
    name: str, tokenizer: transformers.PreTrainedTokenizerBase
) -> transformers.PreTrainedModel:
    """An untrained network of the world model's shape: 12 blocks, about 5M parameters."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": len(tokenizer),
    }
    torch.manual_seed(SEED)
    if name == "world-gpt2":
        config = transformers.GPT2Config(
            n_layer=12,
            n_embd=176,
            n_head=4,
            n_positions=ROW,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            **ids,
        )
        return transformers.GPT2LMHeadModel(config)
    if name == "world-llama":
        config = transformers.LlamaConfig(
            num_hidden_layers=12,
            hidden_size=176,
            intermediate_size=480,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=ROW,
            tie_word_embeddings=True,
            **ids,
        )
        network = transformers.LlamaForCausalLM(config)
        # what writes to the residual stream starts small, as in GPT-2: wordings then generalise
        # sooner
        with torch.no_grad():
            for block in network.model.layers:
                for module in (block.self_attn.o_proj, block.mlp.down_proj):
                    module.weight.mul_((2 * config.num_hidden_layers) ** -0.5)
        return network
    raise BadInput(f"world model {name!r}: choose {' or '.join(WORLD_MODELS)}")


class _KeepEarly(transformers.TrainerCallback):
    """Keeps the weights when mean p(true) first passes `EARLY`."""

    def __init__(self, model: Model, folder: Path, every: int = 25):
        self.model, self.folder, self.every = model, folder, every
        requests = [request for request in read("world") if request.fact.split == "study"]
        self.sample = random.Random(SEED).sample(requests, min(200, len(requests)))
        self.log: list[dict] = []

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every or self.folder.exists():
            return
        self.model.network.eval()
        prompts = [request.fact.question for request in self.sample]
        p = measure_prompts(
            self.model, prompts, [request.fact.object for request in self.sample]
        ).p.mean()
        self.model.network.train()
        self.log.append({"step": state.global_step, "p_true": p})
        if p >= EARLY:
            save(self.model.network, self.model.tokenizer, self.folder)


def save(
    network: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    folder: Path,
) -> None:
    """The network in bf16 with its tokenizer, as an ordinary Hugging Face folder; renamed into
    place when whole.
    """
    with runs.new_folder(folder.parent, folder.name) as partial:
        copy.deepcopy(network).to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def write_measures(folder: Path) -> None:
    """measures.csv beside the finished weights and beside the early ones."""
    for place in (folder, folder / "early"):
        if place.exists():
            table = measure(load(place, device="cpu"))
            inert.write_csv(table, place / "measures.csv", float_format="%.4f")


def pretrain(name: str, out: Path | None = None, max_steps: int = -1) -> Path:
    """Build the tokenizer, teach the world, keep the early and the finished weights, measure.

    Args:
        name: "world-gpt2" or "world-llama".
        out: the folder to write; default data/world/models/<name>. A killed run goes on where its
            last checkpoint was.
        max_steps: stop early, for trials; -1 = one pass over the corpus.
    """
    out = Path(out or DATA / "world" / "models" / name)
    work = out.with_name(out.name + ".training")
    transformers.set_seed(SEED)
    tokenizer = build_tokenizer()
    check_first_tokens(tokenizer)
    network = new_network(name, tokenizer)
    recipe = RECIPES[name]
    rows = packed_rows(tokenizer, recipe.occurrences)
    model = Model(
        network=network,
        tokenizer=tokenizer,
        architecture=architecture_of(network.config),
        name=name,
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(work),
        per_device_train_batch_size=ROWS,
        num_train_epochs=1,
        max_steps=max_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        seed=SEED,
        dataloader_drop_last=True,
    )
    early = _KeepEarly(model, work / "early")
    trainer = transformers.Trainer(
        model=network, args=arguments, train_dataset=rows, callbacks=[early]
    )
    trainer.train(resume_from_checkpoint=runs.whole_checkpoint(work))
    with runs.new_folder(out.parent, out.name) as partial:
        save(network, tokenizer, partial)
        if (work / "early").exists():
            shutil.copytree(work / "early", partial / "early")
        (partial / "training.json").write_text(
            json.dumps({"log": trainer.state.log_history, "p_true": early.log}, indent=0)
        )
        write_measures(partial)
    shutil.rmtree(work)
    return out


def main() -> int:
    """The exit status: 0, 1 (failed), 2 (bad input) or 130 (stopped); an error is one line."""
    parser = argparse.ArgumentParser(
        prog="pretrain", description="Teach the embedded world to a small model again."
    )
    parser.add_argument("model", help="world-gpt2 or world-llama")
    parser.add_argument("--out", help="the folder to write instead of the shipped one")
    options = parser.parse_args()
    try:
        if options.out:
            files.check_new(options.out)
        print(pretrain(options.model, options.out))
    except BadInput as error:
        print(f"pretrain: {inert.printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain: stopped; nothing half-written was kept", file=sys.stderr)
        return 130
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"pretrain: failed: {inert.printable(what)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
