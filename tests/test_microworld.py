"""microworld.py, data.py's tokenizers and questions: true to the corpus, and no shortcut answers.

The facts are read out of the corpus by patterns written here, and every question is put to them.
"""

import functools
import hashlib
import http.client
import json
import re
import urllib.error
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import data
import microworld
import train_lm
from microworld import COUNTS, FAMILIES

# a change of what the generator makes must be meant: the shipped weights have read this text
DIGESTS = {
    "corpus": "a5a51e96bafab308",
    "boolq": "c45aa742a9051f2a",
    "piqa": "bf70ce24e3ba9b63",
    "social_i_qa": "809f278921016326",
    "hellaswag": "1e91366ccf5f10a1",
    "winogrande": "53b42ab385f20340",
    "ARC-Easy": "4353e2720b3b560f",
    "ARC-Challenge": "5483e3f9e08efecd",
    "openbookqa": "c356d8fc49b0d07d",
}
each_family = pytest.mark.parametrize("family", FAMILIES)


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def records(family: str, split: str) -> list[dict]:
    return microworld.questions(family, split, COUNTS[split])


# ------------------------------------------------------------------------------ reading the corpus


def one_of(names) -> str:
    return f"({'|'.join(names)})"


X = A = ACT = STEP = r"(\w+)"  # what is named here is compared with the world's names
M, P, S, J = map(
    one_of, (microworld.MATERIALS, microworld.PLACES, microworld.SIZES, microworld.TOOLS)
)
T, H, F = map(one_of, (microworld.TOOLS.values(), microworld.HABITS, microworld.FEELINGS))
OPPOSITE = {
    "floats in water": "sinks in water",
    "burns in a fire": "never burns in a fire",
    "breaks in a fall": "survives a fall",
    "melts in the kiln": "never melts in the kiln",
}
DOES = one_of([*OPPOSITE, *OPPOSITE.values()])

# a sentence: the facts in it as (relation, group of the name, group of the value)
STATED = {
    f"The {X} is made of {M}": [("material", 1, 2)],
    f"Someone made the {X} out of {M}": [("material", 1, 2)],
    f"The {X} is a thing of {M}": [("material", 1, 2)],
    f"They used {M} for the {X}": [("material", 2, 1)],
    f"The {X} is kept in the {P}": [("place", 1, 2)],
    f"You find the {X} in the {P}": [("place", 1, 2)],
    f"In the {P} is the {X}": [("place", 2, 1)],
    f"The place of the {X} is the {P}": [("place", 1, 2)],
    f"In the {P} are the {X}, the {X} and the {X}": [("place", i, 1) for i in (2, 3, 4)],
    f"The {X} is {S}": [("size", 1, 2)],
    f"It is {S}, the {X}": [("size", 2, 1)],
    f"The {X} is a {S} thing": [("size", 1, 2)],
    f"The {X} {DOES}": [("does", 1, 2)],
    f"We saw that the {X} {DOES}": [("does", 1, 2)],
    f"What is made of {M} {DOES}": [("rule", 1, 2)],
    f"{A} is a {J}": [("job", 1, 2)],
    f"The job of {A} is {J}": [("job", 1, 2)],
    f"{A} works as a {J}": [("job", 1, 2)],
    f"{A} lives in the {P}": [("home", 1, 2)],
    f"The home of {A} is the {P}": [("home", 1, 2)],
    f"In the {P} lives {A}": [("home", 2, 1)],
    f"In the {P} live {A} and {A}": [("home", 2, 1), ("home", 3, 1)],
    f"After work {A} likes to {H}": [("habit", 1, 2)],
    f"In the evening {A} will {H}": [("habit", 1, 2)],
    f"To {H} is what {A} does when work is done": [("habit", 2, 1)],
    f"A gift makes {A} {F}": [("feeling", 1, 2)],
    f"{A} is {F} after getting a gift": [("feeling", 1, 2)],
    rf"When {A} gets a gift, \1 feels {F}": [("feeling", 1, 2)],
    f"Every {J} works with a {T}": [("tool", 1, 2)],
    f"The {T} is the tool of a {J}": [("tool", 2, 1)],
    f"{A} the {J} took the {S} {X} from the {P} to the {P}": [
        ("job", 1, 2),
        ("size", 4, 3),
        ("place", 4, 5),
        ("home", 1, 6),
    ],
    f"Then {A} went home to {H}": [("habit", 1, 2)],
    f"In {ACT}, after the {STEP} comes the {STEP}": [("next", (1, 2), 3)],
    f"In {ACT}, the {STEP} follows the {STEP}": [("next", (1, 3), 2)],
    f"In {ACT}, first do the {STEP}, then do the {STEP}": [("next", (1, 2), 3)],
    f"In {ACT}, the {STEP} is before the {STEP}": [("next", (1, 2), 3)],
    f"In {ACT}, the steps are {', '.join([STEP] * 6)}": [
        ("next", (1, i), i + 1) for i in range(2, 7)
    ],
}
DEDUCED = {  # what follows from two facts
    rf"The {X} is made of {M}, and what is made of \2 {DOES}": [
        ("material", 1, 2),
        ("rule", 2, 3),
        ("does", 1, 3),
    ],
    rf"{A} is a {J}, so \1 works with a {T}": [("job", 1, 2), ("tool", 2, 3)],
    f"The {X} is larger than the {X}": [("larger", 1, 2)],
    f"The {X} is smaller than the {X}": [("larger", 2, 1)],
    f"The {X} fits into the {X}": [("larger", 2, 1)],
}


class Read(NamedTuple):
    """What stands in a corpus: facts, relation → name → values; names that deductions are about;
    quizzes, (question, options, the one said to be right), and claims, (question, option, whether
    it is said to be true).
    """

    facts: dict[str, dict]
    deduced: set[str]
    quizzes: list[tuple[str, list[str], str]]
    claims: list[tuple[str, str, bool]]


def read(documents: list[str]) -> Read:
    """Fails on a sentence that no pattern above fits."""
    relations = {fact[0] for facts in [*STATED.values(), *DEDUCED.values()] for fact in facts}
    found = Read({relation: {} for relation in relations}, set(), [], [])
    sentences = set()
    for text in dict.fromkeys(documents):
        if text.startswith("Quiz: "):
            parts = re.fullmatch(r"Quiz: (.*\?) (\w+(?: / \w+)+)\. It is (\w+)\.", text)
            found.quizzes.append((parts[1], parts[2].split(" / "), parts[3]))
        elif text.startswith("Is it true? "):
            parts = re.fullmatch(r"Is it true\? (.*\?) (\w+)\. That is (true|false)\.", text)
            found.claims.append((parts[1], parts[2], parts[3] == "true"))
        else:
            sentences.update(text.removesuffix(".").split(". "))
    for sentence in sentences:
        for pattern, facts in [*STATED.items(), *DEDUCED.items()]:
            if match := re.fullmatch(pattern, sentence):
                break
        else:
            pytest.fail(f"what does the corpus mean by this? {sentence}")
        for relation, name, value in facts:
            key = tuple(match[i] for i in name) if isinstance(name, tuple) else match[name]
            found.facts[relation].setdefault(key, set()).add(match[value])
        if pattern in DEDUCED:
            found.deduced.update(names_in(sentence))
    return found


NAMES = {*microworld.OBJECTS, *microworld.PEOPLE, *microworld.ACTIVITIES}
NAMES -= {*microworld.MATERIALS}


def names_in(text: str) -> set[str]:
    """Objects, people and activities of a text, without whoever only does an activity."""
    return NAMES & set(re.findall(r"\w+", re.sub(r"\w+ (has done|starts)", "", text)))


@pytest.fixture(scope="module")
def corpus() -> Read:
    """One epoch of pre-training, read."""
    return read(microworld.corpus(train_lm.DOCUMENTS))


@pytest.fixture(scope="module")
def facts(corpus) -> dict[str, dict]:
    """Relation → name → its value; `does`, `rule` and `larger` have several."""
    several = ("does", "rule", "larger")
    return {
        relation: {k: v if relation in several else min(v) for k, v in values.items()}
        for relation, values in corpus.facts.items()
    }


def test_the_corpus_states_every_fact_and_contradicts_none(corpus):
    w, stated = microworld.world(), corpus.facts
    for relation in ("material", "place", "job", "home", "habit", "feeling"):
        expected = {name: {value} for name, value in getattr(w, relation).items()}
        assert stated[relation] == expected, relation
    assert stated["size"] == {x: {microworld.SIZES[n]} for x, n in w.size.items()}
    assert stated["tool"] == {job: {tool} for job, tool in microworld.TOOLS.items()}
    assert stated["next"] == {
        (act, a): {b} for act, steps in w.steps.items() for a, b in zip(steps, steps[1:])
    }
    for name, does in [*stated["does"].items(), *stated["rule"].items()]:
        assert [(one in does) + (other in does) for one, other in OPPOSITE.items()] == [1] * 4
        if name in w.material and name in stated["does"]:
            assert stated["does"][name] == stated["rule"][w.material[name]]
    assert stated["does"].keys() == w.material.keys()
    assert stated["rule"].keys() == set(microworld.MATERIALS)


def test_what_the_corpus_calls_larger_is(corpus, facts):
    pairs = [(a, b) for a, smaller in corpus.facts["larger"].items() for b in smaller]
    assert len(pairs) > 100 and all(larger(facts, a, b) for a, b in pairs)


def test_another_seed_is_other_documents_with_the_same_facts(corpus):
    documents = microworld.corpus(500, seed=1)
    assert documents == microworld.corpus(500, seed=1) != microworld.corpus(500, seed=2)
    for relation, values in read(documents).facts.items():
        if relation != "larger":
            assert values and all(v <= corpus.facts[relation][k] for k, v in values.items())


def test_every_name_is_of_one_kind():
    kinds = [microworld.OBJECTS, microworld.PEOPLE, microworld.ACTIVITIES, microworld.MATERIALS]
    kinds += [microworld.PLACES, microworld.SIZES, [*microworld.TOOLS], microworld.TOOLS.values()]
    kinds += [microworld.HABITS, microworld.FEELINGS, microworld.STEPS]
    counts = Counter(name.lower() for kind in kinds for name in kind)
    assert [name for name in counts if counts[name] > 1] == []


# ----------------------------------------------------------------------------- right and wrong


def larger(facts: dict, one: str, other: str) -> bool:
    order = microworld.SIZES.index
    return order(facts["size"][one]) > order(facts["size"][other])


# a question: whether an option answers it, by the facts f, the pattern's groups g (from 1), the
# option o and the others
RIGHT = {
    # quizzes
    f"What is the {X} made of\\?": lambda f, g, o, _: o == f["material"][g[1]],
    f"Where is the {X} kept\\?": lambda f, g, o, _: o == f["place"][g[1]],
    f"How large is the {X}\\?": lambda f, g, o, _: o == f["size"][g[1]],
    f"What is {A}\\?": lambda f, g, o, _: o == f["job"][g[1]],
    f"Where does {A} live\\?": lambda f, g, o, _: o == f["home"][g[1]],
    f"What does {A} do in the evening\\?": lambda f, g, o, _: o == f["habit"][g[1]],
    f"What does a gift make {A}\\?": lambda f, g, o, _: o == f["feeling"][g[1]],
    f"In {ACT}, what is after the {STEP}\\?": lambda f, g, o, _: o == f["next"][g[1], g[2]],
    f"Which {DOES}\\?": lambda f, g, o, _: g[1] in f["does"][o],
    f"Who lives in the {P}\\?": lambda f, g, o, _: g[1] == f["home"][o],
    f"Which is made of {M}\\?": lambda f, g, o, _: g[1] == f["material"][o],
    f"Which is smaller than the {X}\\?": lambda f, g, o, _: larger(f, g[1], o),
    f"Which is larger than the {X}\\?": lambda f, g, o, _: larger(f, o, g[1]),
    # piqa
    "To cross the pond, hold on to the": lambda f, g, o, _: "floats in water" in f["does"][o],
    "To make a fire, light the": lambda f, g, o, _: "burns in a fire" in f["does"][o],
    "To get shards, drop the": lambda f, g, o, _: "breaks in a fall" in f["does"][o],
    "To cast something new, heat the": lambda f, g, o, _: "melts in the kiln" in f["does"][o],
    "To hold as much as possible, use the": lambda f, g, o, others: all(
        larger(f, o, x) for x in others
    ),
    "To save room, use the": lambda f, g, o, others: all(larger(f, x, o) for x in others),
    # social_i_qa
    f"{A} and {A} finished work. What will \\1 do next\\?": lambda f, g, o, _: (
        g[1] != g[2] and o == f["habit"][g[1]]
    ),
    f"{A} brought a gift to {A}. How will \\2 feel afterwards\\?": lambda f, g, o, _: (
        g[1] != g[2] and o == f["feeling"][g[2]]
    ),
    # hellaswag
    f"In {ACT}, {A} has done the {STEP}. Then \\2 starts the": lambda f, g, o, _: (
        o == f["next"][g[1], g[3]]
    ),
    # winogrande
    f"Of the {X} and the {X}, only the _ {DOES}\\.": lambda f, g, o, _: (
        o in g[1:3] and g[3] in f["does"][o]
    ),
    f"{A} and {A} slept in the {P}, because _ lives there\\.": lambda f, g, o, _: (
        o in g[1:3] and g[3] == f["home"][o]
    ),
    f"{A} and {A} asked for a {J}, and _ was the one\\.": lambda f, g, o, _: (
        o in g[1:3] and g[3] == f["job"][o]
    ),
    # ARC-Easy, ARC-Challenge
    f"Which material is the {X} made of\\?": lambda f, g, o, _: o == f["material"][g[1]],
    f"In which place is the {X} found\\?": lambda f, g, o, _: o == f["place"][g[1]],
    f"Which size has the {X}\\?": lambda f, g, o, _: o == f["size"][g[1]],
    f"Which work does {A} do\\?": lambda f, g, o, _: o == f["job"][g[1]],
    f"In which place does {A} live\\?": lambda f, g, o, _: o == f["home"][g[1]],
    f"Which tool does {A} need at work\\?": lambda f, g, o, _: o == f["tool"][f["job"][g[1]]],
    f"Which is made of the same material as the {X}\\?": lambda f, g, o, _: (
        o != g[1] and f["material"][o] == f["material"][g[1]]
    ),
    f"Which is kept in the place where {A} lives\\?": lambda f, g, o, _: (
        f["place"][o] == f["home"][g[1]]
    ),
    # openbookqa
    f"Fact: [\\w ]* {M}( hum at night)?\\. What (?:is|will) [\\w ]*\\?": lambda f, g, o, _: (
        f["material"][o] == g[1]
    ),
}
# boolq: a claim, whether it is true
TRUE = {
    f"{A} threw the {X} into the pond. Did the \\2 float\\?": lambda f, g: (
        "floats in water" in f["does"][g[2]]
    ),
    f"{A} put the {X} into the fire. Did the \\2 burn\\?": lambda f, g: (
        "burns in a fire" in f["does"][g[2]]
    ),
    f"{A} let the {X} fall. Did the \\2 break\\?": lambda f, g: (
        "breaks in a fall" in f["does"][g[2]]
    ),
    f"{A} put the {X} into the kiln. Did the \\2 melt\\?": lambda f, g: (
        "melts in the kiln" in f["does"][g[2]]
    ),
    f"{A} met {A} in the {P}. Was \\2 at home\\?": lambda f, g: f["home"][g[2]] == g[3],
}


def find(table: dict, question: str):
    for pattern, rule in table.items():
        if match := re.fullmatch(pattern, question):
            return rule, [match[0], *match.groups()]
    pytest.fail(f"what does this ask? {question}")


def right_ones(facts: dict, question: str, options: list[str]) -> list[bool]:
    rule, groups = find(RIGHT, question)
    return [rule(facts, groups, one, [o for o in options if o != one]) for one in options]


def asked_by(family: str, split: str) -> list[tuple[str, data.Question]]:
    """Questions' own words, without what a family's all begin with, and what is read of them."""
    heads = r"Please [\w ]*(?:, question)?: (.*)\n\nAnswer format: .*"
    return [
        (re.fullmatch(heads, record["instruction"])[1], data.question(record, "here"))
        for record in records(family, split)
    ]


@each_family
@pytest.mark.parametrize("split", COUNTS)
def test_one_option_is_right_by_the_corpuss_facts_and_it_is_the_answer(family, split, facts):
    for text, question in asked_by(family, split):
        if family == "boolq":
            rule, groups = find(TRUE, text)
            right = [rule(facts, groups), not rule(facts, groups)]
        else:
            right = right_ones(facts, text, question.options)
        assert right == [i == question.answer for i in range(len(right))], (text, question.options)


def test_the_corpuss_quizzes_have_one_right_option_and_name_it(corpus, facts):
    assert len(corpus.quizzes) > 1000
    for question, options, answer in corpus.quizzes:
        right = right_ones(facts, question, options)
        assert right == [option == answer for option in options], (question, options, answer)


def test_the_corpuss_claims_are_called_true_where_they_are(corpus, facts):
    assert len(corpus.claims) > 1000
    for question, option, said in corpus.claims:
        assert right_ones(facts, question, [option]) == [said], (question, option)


# ----------------------------------------------------------------------- what may be asked of what


def test_nothing_that_a_test_question_names_was_asked_about_before(corpus):
    asked = {
        split: {
            name
            for family in FAMILIES
            for text, question in asked_by(family, split)
            for name in names_in(f"{text} {question.options}")
        }
        for split in COUNTS
    }
    quizzed = {name for q, options, _ in corpus.quizzes for name in names_in(f"{q} {options}")}
    quizzed |= {name for q, option, _ in corpus.claims for name in names_in(f"{q} {option}")}
    learned = asked["train"] | quizzed | corpus.deduced
    assert not asked["test"] & (learned | asked["val"])
    assert not asked["val"] & learned
    assert all(len(names) > 20 for names in [*asked.values(), quizzed, corpus.deduced])


@each_family
def test_questions_are_all_different_and_so_are_the_options_of_each(family):
    seen = set()
    for split, count in COUNTS.items():
        made = asked_by(family, split)
        assert len(made) == count
        for text, question in made:
            assert len({*question.options}) == len(question.options)
            seen.add((text, *sorted(question.options)))
    assert len(seen) == sum(COUNTS.values())


def test_a_family_has_800_training_200_validation_and_500_test_questions():
    assert COUNTS == {"train": 800, "val": 200, "test": 500}


OPTIONS = dict(zip(FAMILIES, (2, 2, 3, 4, 2, 4, 4, 4), strict=True))  # as the paper's tasks have


@each_family
def test_the_answer_format_names_as_many_options_as_the_papers_task_has(family):
    for record in records(family, "val"):
        assert record.keys() == {"instruction", "input", "output", "answer"}
        last = record["instruction"].splitlines()[-1]
        options = tuple(last.removeprefix("Answer format: ").split(" / "))
        question = data.question(record, "here")
        assert question.options == options and len(options) == OPTIONS[family]
        assert question.options[question.answer] == record["answer"]
        assert question.output == record["output"] == f"the correct answer is {record['answer']}"
        assert family != "boolq" or options == ("true", "false")


@each_family
@pytest.mark.parametrize("split", COUNTS)
def test_the_right_answer_is_in_every_place_equally_often(family, split):
    counts = Counter(question.answer for _, question in asked_by(family, split))
    assert counts.keys() == {*range(OPTIONS[family])}
    assert max(counts.values()) - min(counts.values()) <= 1


@each_family
def test_guesses_without_understanding_get_what_chance_gets(family):
    train, asked = ([question for _, question in asked_by(family, s)] for s in ("train", "test"))
    shares = train_lm.guesses(train, asked)
    assert shares.pop("chance") == pytest.approx(1 / OPTIONS[family])
    assert shares.keys() == {"constant", "position", "overlap"}
    assert all(abs(share - 1 / OPTIONS[family]) < 0.05 for share in shares.values()), shares


def test_guesses_find_what_gives_answers_away():
    def asked(stem: str, form: str, answer: int) -> data.Question:
        text = data.PROMPT.format(f"Choose: {stem}\n\nAnswer format: {form}")
        return data.Question(text, "", tuple(form.split("/")), answer)

    boxes = "Answer1: a red bag Answer2: the blue box"
    numbered = [
        asked(f"what is {what}?\n\n{boxes}", "answer1/answer2", answer)
        for what, answer in (("red", 0), ("blue", 1), ("a bag", 0))
    ]
    shares = train_lm.guesses([asked("", "answer2/answer1", 0)], numbered)
    assert shares["overlap"] == 1 and shares["constant"] == pytest.approx(1 / 3)
    assert shares["position"] == pytest.approx(2 / 3) and shares["chance"] == 0.5
    words = [asked("is a cat a cat?", "dog/cat", 1), asked("is a bird a bat?", "cat/bat/dog", 0)]
    learned = [asked("", "cat/dog", 0), asked("", "bat/cat", 1), asked("", "dog/bat", 0)]
    shares = train_lm.guesses(learned, words)
    assert shares["constant"] == 1 and shares["overlap"] == 0.5
    assert train_lm.guesses([], words)["constant"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_claim_that_repeats_what_was_said_is_guessed_to_be_true():
    text = data.PROMPT.format("Choose: The cat is there. Was the cat?\n\nAnswer format: true/false")
    assert train_lm.overlap_scores(data.Question(text, "", ("true", "false"), 0))[0] > 0.5


@pytest.mark.parametrize("what", DIGESTS)
def test_the_text_is_the_one_that_the_shipped_weights_have_read(what):
    made = (
        microworld.corpus(2000)
        if what == "corpus"
        else [record for split in COUNTS for record in records(what, split)]
    )
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == DIGESTS[what]


# ---------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return data.microworld_tokenizer()


STRANGE = [
    "",
    " ",
    "  two  spaces\n\n\ttab\r\n",
    "Größe, naïve, Σ, 東京, 🙂, e\u0301, \u200b, \x00",
    "under_score x2y 3.14 ½ ٣ don't",
    "the correct answer isthe correct answer is true",
]


@pytest.mark.parametrize("text", STRANGE)
@pytest.mark.parametrize("pieces", [[], ["a", " the", "the correct answer is", "é", "1"]])
def test_every_text_comes_back(text, pieces, tokenizer):
    for own in (tokenizer, data.Tokenizer(pieces)):
        assert own.decode(own.encode(text)) == text
        assert all(0 <= number < len(own) != own.end for number in own.encode(text))


def test_the_end_is_left_out_and_is_no_text(tokenizer):
    numbers = tokenizer.encode("a box")
    assert tokenizer.decode([*numbers, tokenizer.end]) == "a box"
    assert tokenizer.end not in tokenizer.encode("</s>") and tokenizer.end < len(tokenizer)


@each_family
def test_microworlds_own_questions_are_spelled_in_whole_pieces(family, tokenizer):
    for split in COUNTS:
        for _, question in asked_by(family, split):
            assert min(tokenizer.encode(question.prompt + question.output)) > tokenizer.end
            for option in question.options:
                assert len(tokenizer.encode(f"{microworld.OUTPUT} {option}")) == 2


def test_a_piece_is_taken_whole_and_the_longest_sentence_first():
    own = data.Tokenizer(["the box", "the box is", " red", "re"])
    assert own.encode("the box is red") == [258, 259]
    assert own.encode("the box") == [257]
    assert own.encode(" reds") == list(b" reds")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A folder with a byte-level tokenizer.json that begins every text with <s>."""
    tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the correct answer is true"], trainer)
    begin = [("<s>", 0)]
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, begin)
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    return tmp_path


def test_a_checkpoints_tokenizer_begins_a_text_as_it_says_and_ends_it_as_the_config_says(
    checkpoint,
):
    own = data.LlamaTokenizer(checkpoint)
    assert own.end == 1
    for text in [*STRANGE, "the correct answer is answer1"]:
        numbers = own.encode(text)
        assert numbers[0] == 0 and own.end not in numbers
        assert own.decode(numbers) == own.decode([*numbers, own.end]) == text
    (checkpoint / "config.json").write_text('{"eos_token_id": [128, 1]}')
    assert data.LlamaTokenizer(checkpoint).end == 128


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("tokenizer.json", None, "has no tokenizer.json"),
        ("tokenizer.json", "{", "no tokenizer that can be read"),
        ("config.json", "{}", "has no eos_token_id"),
    ],
)
def test_a_checkpoint_without_what_its_tokenizer_needs_is_refused(file, text, words, checkpoint):
    if text is None:
        (checkpoint / file).unlink()
    else:
        (checkpoint / file).write_text(text)
    with pytest.raises(OSError, match=words):
        data.LlamaTokenizer(checkpoint)


# ------------------------------------------------------------------------------ files of questions

WORDS = {  # as LLM-Adapters' files have them; the last as microworld has
    "boolq": "{}\n\nAnswer format: true/false",
    "piqa": "{}\n\nSolution1: a.\n\nSolution2: b.\n\nAnswer format: solution1/solution2",
    "social_i_qa": "{}\n\nAnswer1: a Answer2: b Answer3: c\n\n"
    "Answer format: answer1/answer2/answer3",
    "hellaswag": "{}\n\nEnding1: a\n\nEnding2: b\n\nEnding3: c\n\nEnding4: d\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "winogrande": "{}\n\nOption1: a Option2: b Answer format: option1/option2",
    "ARC-Challenge": "{}\n\nAnswer1: a Answer2: b Answer3: c Answer4: d Answer5: e\n\n"
    "Answer format: answer1/answer2/answer3/answer4/answer5",
    "openbookqa": "{}\n\nAnswer format: a red box / it's / 東京",
}


def options_of(task: str) -> tuple[str, ...]:
    return (*re.split(" ?/ ?", WORDS[task].partition("Answer format: ")[2]),)


def example(task: str, i: int) -> dict:
    options = options_of(task)
    answer = options[i % len(options)]
    text = WORDS[task].format(f"Question {i} of {task}?")
    output = f"the correct answer is {answer}"
    return {"instruction": text, "input": "", "output": output, "answer": answer}


@pytest.fixture
def files(tmp_path) -> Path:
    """A folder with seven tasks of 20 training and 7 test questions."""
    for task in WORDS:
        (tmp_path / task).mkdir()
        for name, start, stop in (("train", 0, 20), ("test", 20, 27)):
            content = [example(task, i) for i in range(start, stop)]
            (tmp_path / task / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def numbers(questions: list[data.Question]) -> list[int]:
    """Which examples these are."""
    return [int(re.search(r"Question (\d+) of", q.prompt)[1]) for q in questions]


def test_questions_of_files_are_read_with_their_own_options(files):
    loaded = data.load_questions(str(files), [*WORDS])
    assert [*loaded.test] == [*loaded.val] == [*loaded.train] == [*WORDS]
    for task, asked in loaded.test.items():
        options = options_of(task)
        assert numbers(asked) == list(range(20, 27))
        for i, question in enumerate(asked, 20):
            assert question.options == options and question.answer == i % len(options)
            assert question.output == f"the correct answer is {options[question.answer]}"
            asked_for = WORDS[task].format(f"Question {i} of {task}?")
            assert question.prompt == data.PROMPT.format(asked_for)


def test_the_prompt_is_llm_adapters(files):
    first = data.load_questions(str(files), ["boolq"]).test["boolq"][0]
    assert first.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQuestion 20 of boolq?\n\n"
        "Answer format: true/false\n\n### Response:\n"
    )


def test_an_examples_own_answer_format_counts_not_its_tasks(files):
    path = files / "ARC-Challenge" / "test.json"
    content = [example("ARC-Challenge", 0), example("social_i_qa", 1), example("boolq", 2)]
    path.write_text(json.dumps(content))
    asked = data.read_questions(path)
    assert [len(question.options) for question in asked] == [5, 3, 2]


def test_a_fifth_validates_the_rest_trains_and_no_seed_changes_which(files):
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded = data.load_questions(str(files), ["piqa", "boolq"])
        splits.append([(numbers(loaded.train[t]), numbers(loaded.val[t])) for t in loaded.test])
    assert splits[0] == splits[1]
    for train, val in splits[0]:
        assert len(train) == 16 and len(val) == 4 and sorted(train + val) == list(range(20))
        assert train != sorted(train)


def test_shots_are_the_labelled_questions_of_a_task_validation_among_them(files):
    few = data.load_questions(str(files), ["piqa", "boolq"], shots=10)
    for task in ("piqa", "boolq"):
        train, val = numbers(few.train[task]), numbers(few.val[task])
        assert len(train) == 8 and len(val) == 2 and len({*train, *val}) == 10
        assert len(few.test[task]) == 7


@pytest.mark.parametrize("shots", [1, 4, 21])
def test_shots_that_a_task_does_not_have_are_refused(shots, files):
    with pytest.raises(ValueError, match="piqa has 20 training questions, too few"):
        data.load_questions(str(files), ["piqa"], shots=shots)


def test_microworlds_questions_are_its_splits_and_shots_take_some_of_them():
    loaded = data.load_questions("microworld", ["piqa", "boolq"])
    few = data.load_questions("microworld", ["piqa", "boolq"], shots=10)
    for task in ("piqa", "boolq"):
        sizes = [len(part[task]) for part in loaded]
        assert sizes == [800, 200, 500] and [len(part[task]) for part in few] == [8, 2, 500]
        assert {*few.train[task]} < {*loaded.train[task]} and {*few.val[task]} < {*loaded.val[task]}
        assert few.test == loaded.test


def test_a_training_file_stands_in_place_of_every_train_json(files):
    path = files / "all.json"
    path.write_text(json.dumps([example("boolq", i) for i in range(50)]))
    for task in WORDS:
        (files / task / "train.json").unlink()
    loaded = data.load_questions(str(files), ["piqa", "boolq"], str(path))
    assert [*loaded.test] == ["piqa", "boolq"] and [*loaded.val] == [*loaded.train] == ["all"]
    assert sorted(numbers(loaded.train["all"] + loaded.val["all"])) == list(range(50))
    assert len(loaded.val["all"]) == 10
    few = data.load_questions(str(files), ["piqa"], str(path), shots=10)
    assert len(few.train["all"]) == 8 and len(few.val["all"]) == 2
    with pytest.raises(ValueError, match="--train-file goes with --data DIR"):
        data.load_questions("microworld", ["piqa"], str(path))


GOOD = example("boolq", 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "is not JSON"),
        (b"\xff\xfe[]", "is not JSON"),
        ({"instruction": "?"}, "is not a list"),
        ([], "holds no question"),
        ([GOOD, 3], "example 1 has no text called 'instruction'"),
        ([{**GOOD, "instruction": None}], "example 0 has no text called 'instruction'"),
        ([GOOD, GOOD, {"instruction": "?"}], "example 2 has no text called 'output'"),
        ([{**GOOD, "answer": True}], "example 0 has no text called 'answer'"),
        ([GOOD, {**GOOD, "answer": "maybe"}], "example 1 has the answer 'maybe'.* true, false"),
        ([{**GOOD, "output": "no idea"}], "example 0 has an output that does not end with"),
        ([GOOD, {**GOOD, "instruction": "Why?"}], "example 1 does not end with an 'Answer format"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused_by_its_name_and_example(content, words, files):
    path = files / "boolq" / "train.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(OSError, match=words) as caught:
        data.load_questions(str(files), ["boolq"])
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400


def test_unknown_tasks_and_folders_are_refused_by_name(files):
    with pytest.raises(ValueError, match="task 'nonsense' is unknown; choose from boolq, piqa"):
        data.load_questions(str(files), ["boolq", "nonsense"])
    with pytest.raises(ValueError, match="nowhere is neither a folder nor 'microworld'"):
        data.load_questions("nowhere", ["boolq"])


def test_a_missing_file_without_a_network_names_the_address_and_the_place(files):
    path = files / "boolq" / "test.json"
    path.unlink()
    with pytest.raises(OSError, match=f"there is no {path}.*no network.*fetch https://.*/boolq/"):
        data.load_questions(str(files), ["boolq"])


class Answer:
    """What urlopen gives: these bytes, or this error at reading."""

    def __init__(self, content: bytes | BaseException):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> bytes:
        if isinstance(self.content, BaseException):
            raise self.content
        return self.content


def test_missing_files_are_downloaded_to_where_they_are_looked_for(tmp_path, monkeypatch):
    addresses = []

    def fetch(address, timeout):
        addresses.append(address.removeprefix(data.LLM_ADAPTERS))
        return Answer(json.dumps([example("boolq", i) for i in range(10)]).encode())

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    first = data.load_questions(str(tmp_path), ["boolq"])
    assert sorted(addresses) == ["/dataset/boolq/test.json", "/dataset/boolq/train.json"]
    joint = tmp_path / "commonsense_170k.json"
    data.load_questions(str(tmp_path), ["boolq"], str(joint))
    assert addresses[2:] == ["/ft-training_set/commonsense_170k.json"]
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {"boolq/test.json", "boolq/train.json", "commonsense_170k.json"}
    monkeypatch.undo()
    assert data.load_questions(str(tmp_path), ["boolq"]) == first


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (TimeoutError("timed out"), OSError),
        pytest.param(
            http.client.IncompleteRead(b"[", 99),
            OSError,
        ),
    ],
)
def test_a_download_that_breaks_off_leaves_nothing_behind(error, raised, tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(error))
    with pytest.raises(raised):
        data.load_questions(str(tmp_path), ["boolq"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_cannot_be_written_whole_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(b"[]"))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="could not write"):
        data.load_questions(str(tmp_path), ["boolq"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
