"""microworld.py: questions are true to the corpus, and no shortcut answers them.

The facts are read out of the corpus by patterns written here, and every question is put to them.
"""

import functools
import hashlib
import json
import re
from collections import Counter
from typing import NamedTuple

import pytest

import train_lm
from lab import microworld, questions, scoring
from lab.microworld import COUNTS, FAMILIES

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


def asked_by(family: str, split: str) -> list[tuple[str, questions.Question]]:
    """Questions' own words, without what a family's all begin with, and what is read of them."""
    heads = r"Please [\w ]*(?:, question)?: (.*)\n\nAnswer format: .*"
    return [
        (re.fullmatch(heads, record["instruction"])[1], questions.question(record, "here"))
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
        question = questions.question(record, "here")
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
    shares = scoring.guesses(train, asked)
    assert shares.pop("chance") == pytest.approx(1 / OPTIONS[family])
    assert shares.keys() == {"constant", "position", "overlap"}
    assert all(abs(share - 1 / OPTIONS[family]) < 0.05 for share in shares.values()), shares


def test_guesses_find_what_gives_answers_away():
    def asked(stem: str, form: str, answer: int) -> questions.Question:
        text = questions.PROMPT.format(f"Choose: {stem}\n\nAnswer format: {form}")
        return questions.Question(text, "", tuple(form.split("/")), answer)

    boxes = "Answer1: a red bag Answer2: the blue box"
    numbered = [
        asked(f"what is {what}?\n\n{boxes}", "answer1/answer2", answer)
        for what, answer in (("red", 0), ("blue", 1), ("a bag", 0))
    ]
    shares = scoring.guesses([asked("", "answer2/answer1", 0)], numbered)
    assert shares["overlap"] == 1 and shares["constant"] == pytest.approx(1 / 3)
    assert shares["position"] == pytest.approx(2 / 3) and shares["chance"] == 0.5
    words = [asked("is a cat a cat?", "dog/cat", 1), asked("is a bird a bat?", "cat/bat/dog", 0)]
    learned = [asked("", "cat/dog", 0), asked("", "bat/cat", 1), asked("", "dog/bat", 0)]
    shares = scoring.guesses(learned, words)
    assert shares["constant"] == 1 and shares["overlap"] == 0.5
    assert scoring.guesses([], words)["constant"] == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_a_claim_that_repeats_what_was_said_is_guessed_to_be_true():
    text = questions.PROMPT.format(
        "Choose: The cat is there. Was the cat?\n\nAnswer format: true/false"
    )
    assert scoring.overlap_scores(questions.Question(text, "", ("true", "false"), 0))[0] > 0.5


@pytest.mark.parametrize("what", DIGESTS)
def test_the_text_is_the_one_that_the_shipped_weights_have_read(what):
    made = (
        microworld.corpus(2000)
        if what == "corpus"
        else [record for split in COUNTS for record in records(what, split)]
    )
    assert hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16] == DIGESTS[what]
