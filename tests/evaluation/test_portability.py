import pandas as pd
import torch
import yaml

from workbench import facts
from workbench.evaluation import portability, tidy
from workbench.tracking.retention import says

HOPS = yaml.safe_load(portability.HOPS.read_text("utf-8"))


def plainly(model, prompt: str, answer: str) -> bool:
    """One prompt at a time, by transformers' own decoding."""
    ids = model.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    tokens = torch.tensor([[model.tokenizer.bos_token_id, *ids]])
    new = model.network.generate(tokens, max_new_tokens=12, do_sample=False, pad_token_id=0)
    return bool(says(model.tokenizer.decode(new[0, tokens.shape[1] :]), answer, ended=True))


def test_what_is_said_of_subjects_and_new_objects_is_what_plain_decoding_says(world):
    every = facts.read("world")
    subjects = {}
    for one in every:
        subjects.setdefault(one.fact.subject, []).append(one.fact)
    studied = [one for one in every if one.fact.split == "study"]
    requests = [one for one in studied if len(subjects[one.fact.subject]) > 1][:4]
    requests += [one for one in studied if one.target in subjects][:4]
    edited = {one.fact.id for one in requests}
    expected = []
    for one in requests:
        for quantity, name in (("same_subject", one.fact.subject), ("new_object", one.target)):
            for fact in subjects.get(name, ()):
                if fact.id not in edited and fact.split != "unseen":
                    right = plainly(world, fact.question, fact.object)
                    expected.append((one.fact.id, quantity, float(right)))
                    if quantity == "new_object" and one.fact.relation in HOPS:
                        name = HOPS[one.fact.relation].replace("{}", one.fact.subject)
                        asked = fact.prompt.replace("{}", name)
                        right = plainly(world, asked[0].upper() + asked[1:], fact.object)
                        expected.append((one.fact.id, "hop", float(right)))
    expected = pd.DataFrame(expected, columns=["fact_id", "quantity", "value"])
    means = expected.groupby(["fact_id", "quantity"]).value.mean()
    asked = (
        tidy("portability", portability.ask(world, requests))
        .set_index(["fact_id", "quantity"])
        .value
    )
    assert len(means) >= 8
    assert asked.to_dict() == means.to_dict()
    assert asked.between(0, 1).all()


def test_what_a_file_brings_is_asked_by_its_kind(world):
    one = next(one for one in facts.read("world") if one.fact.split == "study")
    fact = one.fact.model_copy(update={"id": "mine", "subject": "Karelo"})
    right = (one.fact.question, one.fact.object)
    wrong = (one.fact.question, one.target)
    follows = (("One Hop", *right), ("One Hop", *wrong), ("alias", *right))
    request = one.model_copy(update={"fact": fact, "portability": follows})
    table = tidy("portability", portability.ask(world, [request]))
    assert table.set_index("quantity").value.to_dict() == {"one_hop": 0.5, "alias": 1.0}


def test_every_hop_is_of_a_relation_that_there_is_and_holds_one_subject():
    relations = {one.fact.relation for one in facts.read("plain")}
    assert set(HOPS) <= relations
    assert all(name.count("{}") == 1 for name in HOPS.values())


def test_a_fact_of_which_nothing_follows_gives_no_row(world):
    request = facts.EditRequest(
        fact=facts.Fact(id="mine", subject="Ada", prompt="{} plays the", object="harp"),
        target="flute",
    )
    assert portability.ask(world, [request]).empty
