"""Places of subject and target among the tokens, against places found in the bytes of the tokens
alone.
"""

import random
import types
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, islice

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from workbench import positions
from workbench.facts import BadInput, fill, read, relations
from workbench.positions import Encoded, statement, subject_end
from workbench.world import text as world_text

KINDS = ("world", "gpt2", "sentencepiece", "own bos")
BOS = "<s>"
CASES = 2500  # of each kind
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(byte): byte for byte in VISIBLE} | {
    chr(256 + n): byte for n, byte in enumerate(sorted(set(range(256)) - set(VISIBLE)))
}

ODD_SUBJECTS = (
    "Zoë Ünal",
    "O'Neill's \"Two\"",
    "Apollo 11",
    "1984",
    "😀",
    "the 👩‍👩‍👧 sign",
    "東京タワー",
    "two  spaces",
    "C++ {x}",
    "Ёлка",
    "cafe\u0301",
    "١٢٣",
    "I.B.M.",
    "rock 'n' roll",
    "x",
)
ODD_PROMPTS = (
    "{} is",
    "Who made {}?",
    "In 1984  {} met",
    "{}'s owner is",
    "({}) lies in",
    "“{}”, they say,",
    "A{}B means",
    "the 😀 of {} and {{x}}  ",
    "{}: ",
)
PREFIXES = (
    "",
    "",
    "Then we all went home. ",
    "Yes 😀. ",
    "It  was  1984. ",
    "Ça va. ",
    " And so. ",
)
ODD_TARGETS = ("São Paulo", "42", "😀", "東京", "O'Hara", "b")


def spoken(tokenizer, start: str = "") -> types.SimpleNamespace:
    """What `positions` reads of a model."""
    return types.SimpleNamespace(tokenizer=tokenizer, start=start, name="a model", in_force=[])


def encode(tokenizer, texts, start: str = "", bare: bool = False) -> Encoded:
    model = spoken(tokenizer, start)
    return positions.encode(model, texts, bare=True) if bare else positions.encode(model, texts)


@dataclass(frozen=True)
class Case:
    prefix: str
    prompt: str
    subject: str
    target: str

    @property
    def before(self) -> str:
        return self.prefix + fill(self.prompt, self.subject)

    @property
    def text(self) -> str:
        return self.prefix + statement(fill(self.prompt, self.subject), self.target)

    @property
    def up_to_subject(self) -> str:
        return self.prefix + self.prompt[: self.prompt.index("{}")] + self.subject


@cache
def sentences() -> tuple[str, ...]:
    prose = (sentence for paragraph in world_text.prose("everyday", 0) for sentence in paragraph)
    return (*islice(prose, 300), *(request.fact.question for request in read("world")[::20]))


@cache
def tokenizer_of(kind: str):
    return new_tokenizer(kind)


def new_tokenizer(kind: str, bos: str | None = BOS, eos: str | None = None, normalizer=None):
    """A small one trained here, of the kind of the world's, GPT-2's, SentencePiece's with bytes for
    rare letters, or one that adds BOS itself.
    """
    special = [BOS]
    if kind == "sentencepiece":
        backend = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        special += ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "world")
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "world")
    if kind == "own bos":
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 0)]
        )
    if normalizer:
        backend.normalizer = normalizer
    alphabet = [] if kind == "sentencepiece" else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(sentences(), trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos
    )


@cache
def cases(kind: str) -> tuple[Case, ...]:
    rng = random.Random(f"positions {kind}")
    requests = read("world")
    templates = [
        template for relation in relations().values() for template in relation["templates"]
    ]

    def case() -> Case:
        request = rng.choice(requests)
        return Case(
            prefix=rng.choice(PREFIXES),
            prompt=rng.choice(templates if rng.random() < 0.7 else ODD_PROMPTS),
            subject=request.fact.subject if rng.random() < 0.6 else rng.choice(ODD_SUBJECTS),
            target=request.target if rng.random() < 0.8 else rng.choice(ODD_TARGETS),
        )

    return tuple(case() for _ in range(CASES))


@cache
def encoded_cases(kind: str):
    return encode(tokenizer_of(kind), [case.text for case in cases(kind)])


def bytes_of(token: str, kind: str) -> bytes:
    if kind != "sentencepiece":
        return bytes(BYTE_OF[letter] for letter in token)
    if token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


@cache
def spelled(kind: str) -> tuple[tuple[list[bytes], list[int]], ...]:
    """For each case the bytes of each token after BOS, and where in the text's UTF-8 each ends.

    Knows nothing of offsets.
    """
    encoded, found = encoded_cases(kind), []
    for case, ids, length in zip(
        cases(kind), encoded.input_ids.tolist(), encoded.lengths.tolist(), strict=True
    ):
        pieces = [
            bytes_of(token, kind)
            for token in tokenizer_of(kind).convert_ids_to_tokens(ids[1:length])
        ]
        whole, text = b"".join(pieces), case.text.encode()
        assert whole in (text, b" " + text)
        found.append(
            (pieces, list(accumulate(map(len, pieces), initial=len(text) - len(whole)))[1:])
        )
    return tuple(found)


def place(encoded: Encoded, row: int, character: int) -> int | None:
    try:
        return encoded.token_at(row, character)
    except BadInput:
        return None


def misplaced_subjects(kind: str, shift: int = 0) -> list[str]:
    """Texts whose subject, sought `shift` characters off, ends in another token than its last byte
    does.
    """
    encoded, found = encoded_cases(kind), []
    for row, (case, (_, ends)) in enumerate(zip(cases(kind), spelled(kind), strict=True)):
        expected = 1 + next(
            token for token, end in enumerate(ends) if end >= len(case.up_to_subject.encode())
        )
        if (
            place(encoded, row, len(case.prefix) + subject_end(case.prompt, case.subject) + shift)
            != expected
        ):
            found.append(case.text)
    return found


def misplaced_targets(kind: str, shift: int = 0) -> list[str]:
    """Texts whose target, sought `shift` characters off, is not exactly the last tokens, those that
    spell it.
    """
    encoded, found = encoded_cases(kind), []
    for row, (case, (pieces, _)) in enumerate(zip(cases(kind), spelled(kind), strict=True)):
        tokens = encoded.tokens_from(row, len(case.before.rstrip()) + shift)
        written = b"".join(pieces[token - 1] for token in tokens).decode(errors="replace")
        if written.strip() != case.target or tokens != list(range(1 + len(pieces)))[-len(tokens) :]:
            found.append(case.text)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_ends_in_the_token_that_holds_its_last_byte(kind):
    assert misplaced_subjects(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_is_the_tokens_that_spell_it(kind):
    assert misplaced_targets(kind) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_place_one_character_off_would_be_noticed(kind):
    assert len(misplaced_subjects(kind, shift=-1)) > CASES / 20
    assert len(misplaced_targets(kind, shift=-1)) > CASES / 2


@pytest.mark.parametrize("kind", KINDS)
def test_target_tokens_decode_to_the_target(kind):
    encoded = encoded_cases(kind)
    for row, case in enumerate(cases(kind)[:150]):
        tokens = encoded.input_ids[row, encoded.tokens_from(row, len(case.before.rstrip()))]
        assert tokenizer_of(kind).decode(tokens).strip() == case.target


@pytest.mark.parametrize("kind", KINDS)
def test_no_place_falls_on_bos_or_padding(kind):
    encoded = encoded_cases(kind)
    for row, case in enumerate(cases(kind)[:150]):
        tokens = encoded.tokens_from(row, 0)
        assert 0 < tokens[0] <= tokens[-1] < len(encoded.offsets[row])
        assert encoded.tokens_from(row, len(case.text)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_bos_stands_in_front_once(kind):
    encoded = encoded_cases(kind)
    bos = tokenizer_of(kind).bos_token_id
    assert (encoded.input_ids[:, 0] == bos).all()
    assert ((encoded.input_ids[:, 1:] == bos) & encoded.attention_mask[:, 1:].bool()).sum() == 0
    assert {pairs[0] for pairs in encoded.offsets} == {(0, 0)}


def test_one_of_the_tokenizers_adds_bos_by_itself():
    assert [
        tokenizer_of(kind)("so")["input_ids"][0] == tokenizer_of(kind).bos_token_id
        for kind in KINDS
    ] == [False, False, False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_without_bos_the_rest_is_the_same(kind):
    texts = [case.text for case in cases(kind)[:50]]
    bare, full = encode(tokenizer_of(kind), texts, bare=True), encode(tokenizer_of(kind), texts)
    assert torch.equal(bare.input_ids, full.input_ids[:, 1:])
    assert bare.offsets == tuple(pairs[1:] for pairs in full.offsets)


def test_end_of_text_stands_in_for_a_missing_bos():
    tokenizer = new_tokenizer("gpt2", bos=None, eos=BOS)
    assert encode(tokenizer, ["so it is"]).input_ids[0, 0] == tokenizer.eos_token_id


def test_bos_goes_before_end_of_text():
    tokenizer = new_tokenizer("sentencepiece", bos=BOS, eos="<unk>")
    assert (
        encode(tokenizer, ["so it is"]).input_ids[0, 0]
        == tokenizer.bos_token_id
        != tokenizer.eos_token_id
    )


CHAT = "<|im_start|>"
END = "<|endoftext|>"


def instruct_tokenizer():
    """As SmolLM2's: its BOS begins the turns of a chat, it puts nothing before plain text, and
    documents were set apart by another token.
    """
    tokenizer = new_tokenizer("gpt2", bos=None)
    tokenizer.add_special_tokens({"bos_token": CHAT, "eos_token": "<|im_end|>"})
    tokenizer.add_tokens([END], special_tokens=True)
    return tokenizer


def test_the_bos_of_a_chat_does_not_stand_before_plain_text():
    tokenizer = instruct_tokenizer()
    assert positions.front_text(spoken(tokenizer)) == END
    assert encode(tokenizer, ["so it is"]).input_ids[0, 0] == tokenizer.get_vocab()[END]


def test_what_the_tokenizer_itself_adds_goes_before_all_else():
    tokenizer = new_tokenizer("own bos")
    tokenizer.add_tokens([END], special_tokens=True)
    assert positions.front_text(spoken(tokenizer)) == BOS
    assert (
        encode(tokenizer, ["so it is"]).input_ids[0].tolist() == tokenizer("so it is")["input_ids"]
    )


@pytest.mark.parametrize(
    ("start", "front"),
    [("none", ""), ("bos", CHAT), ("eos", "<|im_end|>"), (CHAT, CHAT), (END, END), ("", END)],
)
def test_a_start_that_is_named_overrides_the_rule(start, front):
    tokenizer = instruct_tokenizer()
    assert positions.front_text(spoken(tokenizer, start)) == front
    encoded, plain = (
        encode(tokenizer, ["so it is", "x"], start),
        encode(tokenizer, ["so it is", "x"], bare=True),
    )
    more = len(positions.front(spoken(tokenizer, start)))
    assert (encoded.lengths - plain.lengths).tolist() == [more, more]
    assert torch.equal(encoded.input_ids[:, more:], plain.input_ids)
    subject = [found.token_at(0, len("so it") - 1) for found in (encoded, plain)]
    assert subject[0] - subject[1] == more


def test_sampling_begins_with_a_token_even_where_nothing_stands_in_front(tiny):
    assert positions.any_front(tiny) == positions.front(tiny) != ()
    assert positions.any_front(replace(tiny, start="none")) == positions.front(tiny)


def test_a_start_that_is_no_token_is_one_clear_line():
    with pytest.raises(BadInput) as caught:
        encode(tokenizer_of("gpt2"), ["so it is"], "<|nothing|>")
    assert "<|nothing|>" in str(caught.value)
    assert "none" in str(caught.value)


def test_a_tokenizer_without_bos_and_eos_is_one_clear_line():
    assert "BOS" in complaint(new_tokenizer("gpt2", bos=None))


def test_a_tokenizer_without_offsets_is_one_clear_line():
    assert "ByT5Tokenizer" in complaint(transformers.ByT5Tokenizer())


def complaint(tokenizer) -> str:
    with pytest.raises(BadInput) as caught:
        encode(tokenizer, ["so it is"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_stands_on_the_right(kind):
    encoded = encoded_cases(kind)
    columns = torch.arange(encoded.input_ids.shape[1])
    assert torch.equal(encoded.attention_mask, (columns < encoded.lengths[:, None]).long())
    assert encoded.lengths.tolist() == [len(pairs) for pairs in encoded.offsets]
    assert encoded.lengths.max() == encoded.input_ids.shape[1]


@pytest.mark.parametrize("kind", KINDS)
def test_settings_left_on_the_tokenizer_change_nothing(kind):
    texts = [case.text for case in cases(kind)[:50]]
    tokenizer = new_tokenizer(kind)
    tokenizer.pad_token, tokenizer.padding_side, tokenizer.truncation_side = BOS, "left", "left"
    tokenizer(texts, padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(direction="left", length=40)
    encoded, plain = encode(tokenizer, texts), encode(tokenizer_of(kind), texts)
    assert torch.equal(
        encoded.input_ids * encoded.attention_mask, plain.input_ids * plain.attention_mask
    )
    assert encoded.offsets == plain.offsets


def test_no_texts_and_empty_texts_have_a_shape():
    tokenizer = tokenizer_of("gpt2")
    assert encode(tokenizer, []).input_ids.shape[0] == 0
    assert encode(tokenizer, ["", "so"]).lengths.tolist()[0] == 1
    assert encode(tokenizer, ["", ""], bare=True).lengths.tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 37, 400, 4096, 10**9])
def test_batches_take_every_row_once_within_the_budget(kind, budget):
    encoded = encoded_cases(kind).rows(range(200))
    batches, lengths = list(encoded.batches(budget)), encoded.lengths
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget


def test_batches_are_full_where_the_budget_is_a_whole_number_of_rows():
    encoded = encode(tokenizer_of("world"), ["so"] * 9)
    length = encoded.input_ids.shape[1]
    assert [len(batch) for batch in encoded.batches(4 * length)] == [4, 4, 1]
    assert [len(batch) for batch in encoded.batches(4 * length - 1)] == [3, 3, 3]


def test_batches_leave_little_room_unused():
    encoded = encoded_cases("world").rows(range(400))
    taken = [len(batch) * int(encoded.lengths[batch].max()) for batch in encoded.batches(1000)]
    assert min(taken[:-1]) > 900


def test_no_rows_are_no_batches():
    assert list(encode(tokenizer_of("world"), []).batches()) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("indices", [[3], [5, 0, 5], [700, 2, 9, 41]])
def test_rows_are_those_texts_encoded_alone(kind, indices):
    part = encoded_cases(kind).rows(indices)
    alone = encode(tokenizer_of(kind), [cases(kind)[index].text for index in indices])
    assert torch.equal(part.input_ids, alone.input_ids)
    assert torch.equal(part.attention_mask, alone.attention_mask)
    assert part.offsets == alone.offsets


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_keeps_the_first_tokens_of_each_text(kind, sealed):
    whole = encoded_cases(kind).rows(range(20))
    lengths = (whole.lengths - torch.arange(20) % 5).clamp(min=1)
    part = whole.cut(lengths)
    assert part.lengths.tolist() == lengths.tolist()
    assert part.input_ids.shape == part.attention_mask.shape == (20, lengths.max())
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(part.input_ids[row, :length], whole.input_ids[row, :length])
        assert part.attention_mask[row].tolist() == [1] * length + [0] * (lengths.max() - length)
        assert part.offsets[row] == whole.offsets[row][:length]
    sealed(part)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_keeps_everything(kind):
    part = encoded_cases(kind).rows([1, 2])
    moved = part.to("cpu")
    assert torch.equal(moved.input_ids, part.input_ids)
    assert moved.offsets == part.offsets


def test_a_character_that_no_token_covers_is_one_clear_line():
    with pytest.raises(BadInput) as caught:
        encode(tokenizer_of("world"), ["so", ""]).token_at(1, 0)
    assert "character 0 of text 1" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "target", "whole"),
    [
        ("it is", "red", "it is red"),
        ("it is ", "red", "it is red"),
        ("it is", " red", "it is red"),
        ("it is ", " red ", "it is red"),
        ("it is\n", "red", "it is\nred"),
        ("it is\t", "red", "it is\tred"),
        ("it is\u00a0", "red", "it is\u00a0red"),
        ("it is:", "東京", "it is: 東京"),
        ("首都是", "东京", "首都是东京"),
        ("首都は：", "東京", "首都は：東京"),
        ("เมืองหลวงคือ", "กรุงเทพ", "เมืองหลวงคือกรุงเทพ"),
        ("수도는", "서울", "수도는 서울"),
        ("столица —", "Москва", "столица — Москва"),
        ("it is", "dark  red", "it is dark  red"),
    ],
)
def test_a_statement_has_one_space_before_the_target_where_words_have_one(prompt, target, whole):
    assert statement(prompt, target) == whole


@pytest.mark.parametrize(
    ("prompt", "subject", "up_to"),
    [
        ("{} is", "Aral", "Aral"),
        ("The {} is", "Aral", "The Aral"),
        ("The {} is", "Aral ", "The Aral"),
        ("The {} is", " Aral", "The  Aral"),
        ("Aral and {} and Aral", "Aral", "Aral and Aral"),
        ("{} is", "a{}b", "a{}b"),
        ("“{}” is", "😀", "“😀"),
        ("is it {}", "x", "is it x"),
    ],
)
def test_the_subject_ends_with_its_last_character(prompt, subject, up_to):
    assert fill(prompt, subject)[: subject_end(prompt, subject) + 1] == up_to


@pytest.mark.parametrize("letters", ["café", "cafe\u0301"], ids=["composed", "decomposed"])
def test_a_subject_has_its_place_though_the_tokenizer_composes_letters(letters):
    tokenizer = new_tokenizer("gpt2", normalizer=normalizers.NFC())
    encoded = encode(tokenizer, [f"the {letters} is"])
    end = encoded.token_at(0, subject_end("the {} is", letters))
    assert tokenizer.decode(encoded.input_ids[0, 1 : end + 1]) == "the café"


# --- rows of running text -------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["", "none"])
def test_packed_rows_are_the_running_text_behind_what_stands_in_front(tiny, start):
    model = replace(tiny, start=start)
    first = list(positions.front(model))
    texts = [" ".join(sentences) for sentences in islice(world_text.prose("everyday", 0), 100)]
    stream = [token for text in texts for token in encode_bare(model, text)]
    rows = list(positions.packed(model, iter(texts), most=50))
    assert {len(row) for row in rows} == {50}
    assert all(row[: len(first)] == first for row in rows)
    text = [token for row in rows for token in row[len(first) :]]
    assert text == stream[: len(text)]
    assert len(stream) - len(text) < 50 - len(first)


def encode_bare(model, text) -> list[int]:
    return positions.encode(model, [text], bare=True).input_ids[0].tolist()


def test_rows_are_no_longer_than_the_model_has_positions(tiny):
    config = types.SimpleNamespace()
    model = spoken(tiny.tokenizer)
    model.network = types.SimpleNamespace(config=config)
    assert positions.row_length(model) == positions.ROW
    config.max_position_embeddings = 9
    assert positions.row_length(model) == 9
    row = next(positions.packed(model, ["a lot of text and more text"] * 5))
    assert len(row) == 9


@pytest.mark.parametrize("rows", [[], [[]], [[1, 2], [], [3]]])
def test_rows_are_filled_up_on_the_right(rows):
    filled = positions.pad(rows, filler=-100)
    length = max(map(len, rows), default=0)
    assert filled.tolist() == [row + [-100] * (length - len(row)) for row in rows]
    assert filled.shape == (len(rows), length)
    assert filled.dtype == torch.long
