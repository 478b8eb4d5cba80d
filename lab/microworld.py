"""microworld: a small invented world, the plain text that states its facts, questions about it.

The world is drawn once from a seed: what each object is made of, where it is kept and how large it
is; where people live, what they do for a living, in the evening and when they get a gift; in
which order the steps of an activity come. `corpus` writes documents that state these facts in
many phrasings, for pre-training; `questions` asks about them in eight families that mirror the
formats of the paper's eight commonsense tasks.

Objects, people and activities are divided: training questions ask about one share of them,
validation and test questions about others. The corpus states the facts of all of them alike, but
its quizzes and deductions stay within the training share. So a test question asks for a fact that
was read in pre-training and never asked; whoever has not read it can only guess.

All of it is our choice [us]. Drawn by Python's `random`; the shipped weights have read this very
world, and a test's digests tell if it ever comes out different.
"""

import functools
import random
from collections.abc import Callable
from typing import NamedTuple

FAMILIES = (
    "boolq",
    "piqa",
    "social_i_qa",
    "hellaswag",
    "winogrande",
    "ARC-Easy",
    "ARC-Challenge",
    "openbookqa",
)
SPLITS = {"train": 0.6, "val": 0.1, "test": 0.3}  # shares of objects, people and activities
COUNTS = {"train": 800, "val": 200, "test": 500}  # questions of a family

# ------------------------------------------------------------------------------------ the world

OBJECTS = """anvil apple arrow axe bag ball banner barrel basin basket bat bead bell belt bench
blade board boat bolt book boot bottle bow bowl box bracelet brick broom brush bucket buckle
button cage candle cane card cart cask chain chair chalice chest chisel clock cloak coat coin
comb crate cradle crown cup curtain cushion desk dice dish doll door dress drum duster
easel fan feather fence fiddle figurine flag flask flute fork frame funnel gate glove goblet
gong grill guitar hammer hammock handle harp hat helmet hinge hook hoop horn jar jewel jug
kettle key kite knife knob ladder ladle lamp lantern latch lens lever lid lock locket loom lute
mallet map marble mask mast mat mill mirror mitten mop mortar mug nail needle net notebook oar
organ oven paddle pail palette pan parasol peg pen pendant piano picture pillow pin pipe pitcher
plank plate plough pole pot pouch puppet purse quilt rack raft rake rattle reel ring rod rope
rug saddle sail saw scale scarf scoop screw shawl shelf shield shirt shoe shovel sickle sieve
sled spade spear spindle spoon spring staff stamp statue stick stool stove strap string sword
table tablet tile tongs top torch toy tray trowel trumpet tub urn vase violin wagon wheel
whistle wreath yoke""".split()
PEOPLE = """Ada Alan Alice Amir Amy Anna Anton Arlo Asha Basil Bea Ben Bert Boris Bruno Carl
Cara Cecil Clara Cleo Cora Dale Dana Dario Dean Dora Eddie Elif Ella Elsa Emil Enzo Eric Erin
Esther Eva Felix Finn Flora Frank Freya Fritz Gary Gina Grace Greta Gus Hana Hank Hans Harry
Heidi Helen Henry Hugo Ian Ida Igor Ines Iris Ivan Jack Jan Jane Jonas Josie Judy Julia Kai Karl
Kate Kenji Kira Klaus Lara Lars Laura Lena Leo Lila Liam Linus Lola Lucy Luis Luke Maja Marco
Maria Mark Mia Milo Mona Nadia Nick Nina Noah Nora Olaf Olga Omar Otto Pablo Paul Petra""".split()
MATERIALS = "wood cork wax wool iron stone glass clay".split()
PLACES = (
    "attic barn bridge cabin camp castle cave cellar church farm forest fort harbor hill".split()
)
SIZES = "tiny small medium large huge giant".split()
TOOLS = dict(
    baker="whisk",
    barber="razor",
    doctor="syringe",
    farmer="scythe",
    gardener="hose",
    hunter="rifle",
    painter="roller",
    pilot="radar",
    plumber="wrench",
    tailor="thimble",
    teacher="chalk",
    writer="pencil",
)  # job → its tool
HABITS = "bathe bike cook dance fish jog knit paint read sing swim write".split()
FEELINGS = "angry bored calm happy proud sad scared shy".split()
ACTIVITIES = """archery baking banking beekeeping boxing brewing camping carving coaching
curling dyeing farming fencing filming forging framing golfing hosting judging mining moving
nursing packing parking pottery printing racing riding roofing rowing sailing sculpting shipping
skating surfing tanning touring weaving welding wrestling""".split()
STEPS = """bending blending boiling brushing checking chilling chopping cleaning counting
cutting drying filling folding grinding heating lifting mixing naming opening peeling pouring
pressing pulling rinsing rolling rubbing salting scraping shaking sifting slicing soaking
sorting stirring tasting tying turning wetting wiping wrapping""".split()
# what a material does: the property, said of a thing that has it and of one that has not
PROPERTIES = {
    "floats": (("wood", "cork", "wax"), "floats in water", "sinks in water"),
    "burns": (("wood", "cork", "wool"), "burns in a fire", "never burns in a fire"),
    "breaks": (("glass", "clay", "wax"), "breaks in a fall", "survives a fall"),
    "melts": (("wax", "iron", "glass"), "melts in the kiln", "never melts in the kiln"),
}


class World(NamedTuple):
    """Facts by name, and which split each object, person and activity is asked about in."""

    material: dict[str, str]
    place: dict[str, str]
    size: dict[str, int]
    job: dict[str, str]
    home: dict[str, str]
    habit: dict[str, str]
    feeling: dict[str, str]
    steps: dict[str, list[str]]
    split: dict[str, str]

    def has(self, item: str, name: str) -> bool:
        """Whether an object has a property of PROPERTIES, by its material."""
        return self.material[item] in PROPERTIES[name][0]

    def fact(self, item: str, name: str) -> str:
        """The sentence's end that says whether an object has a property."""
        return PROPERTIES[name][1 if self.has(item, name) else 2]

    def of(self, kind: dict, split: str) -> list[str]:
        """The names of one split in one of the dictionaries above."""
        return [name for name in kind if self.split[name] == split]


@functools.cache
def world() -> World:
    """The world. In each split no value is much more frequent than others, to be a good guess."""
    rng = random.Random(0)
    split = {}
    for names in (OBJECTS, PEOPLE, ACTIVITIES):
        shuffled = rng.sample(names, len(names))
        for i, name in enumerate(shuffled):
            part = (i + 0.5) / len(names)
            val, test = SPLITS["train"], SPLITS["train"] + SPLITS["val"]
            split[name] = "train" if part < val else "val" if part < test else "test"

    def spread(names: list[str], values: list) -> dict:
        """A value for each name; in every split their frequencies differ by one at most."""
        given = {}
        for part in SPLITS:
            some = [name for name in names if split[name] == part]
            order = rng.sample(values, len(values))
            drawn = [order[i % len(values)] for i in range(len(some))]
            given |= dict(zip(some, rng.sample(drawn, len(drawn))))
        return given

    return World(
        material=spread(OBJECTS, MATERIALS),
        place=spread(OBJECTS, PLACES),
        size=spread(OBJECTS, list(range(len(SIZES)))),
        job=spread(PEOPLE, list(TOOLS)),
        home=spread(PEOPLE, PLACES),
        habit=spread(PEOPLE, HABITS),
        feeling=spread(PEOPLE, FEELINGS),
        steps={name: rng.sample(STEPS, 6) for name in ACTIVITIES},
        split=split,
    )


# ----------------------------------------------------------------------------------- the corpus


def corpus(count: int, seed: int = 0) -> list[str]:
    """`count` documents of a few sentences each, in random order.

    seed: which documents; the facts are the same.
    """
    w, rng = world(), random.Random(seed)
    kinds = [about_object, about_person, about_activity, about_place, compared, story, quiz]
    weights = [6, 6, 4, 1, 1, 1, 12]
    return [kind(w, rng) for kind in rng.choices(kinds, weights, k=count)]


def about_object(w: World, rng: random.Random) -> str:
    x = rng.choice(OBJECTS)
    m, p, s = w.material[x], w.place[x], SIZES[w.size[x]]
    name = rng.choice(list(PROPERTIES))
    fact = w.fact(x, name)
    sentences = [
        rng.choice(
            [
                f"The {x} is made of {m}.",
                f"Someone made the {x} out of {m}.",
                f"The {x} is a thing of {m}.",
                f"They used {m} for the {x}.",
            ]
        ),
        rng.choice(
            [
                f"The {x} is kept in the {p}.",
                f"You find the {x} in the {p}.",
                f"In the {p} is the {x}.",
                f"The place of the {x} is the {p}.",
            ]
        ),
        rng.choice([f"The {x} is {s}.", f"It is {s}, the {x}.", f"The {x} is a {s} thing."]),
        rng.choice([f"The {x} {fact}.", f"We saw that the {x} {fact}."]),
    ]
    if w.split[x] == "train" and rng.random() < 0.5:
        sentences.append(f"The {x} is made of {m}, and what is made of {m} {fact}.")
    return paragraph(sentences, rng)


def about_person(w: World, rng: random.Random) -> str:
    x = rng.choice(PEOPLE)
    job, home, habit, feeling = w.job[x], w.home[x], w.habit[x], w.feeling[x]
    tool = TOOLS[job]
    sentences = [
        rng.choice([f"{x} is a {job}.", f"The job of {x} is {job}.", f"{x} works as a {job}."]),
        rng.choice(
            [
                f"{x} lives in the {home}.",
                f"The home of {x} is the {home}.",
                f"In the {home} lives {x}.",
            ]
        ),
        rng.choice(
            [
                f"After work {x} likes to {habit}.",
                f"In the evening {x} will {habit}.",
                f"To {habit} is what {x} does when work is done.",
            ]
        ),
        rng.choice(
            [
                f"A gift makes {x} {feeling}.",
                f"{x} is {feeling} after getting a gift.",
                f"When {x} gets a gift, {x} feels {feeling}.",
            ]
        ),
        rng.choice([f"Every {job} works with a {tool}.", f"The {tool} is the tool of a {job}."]),
    ]
    if w.split[x] == "train" and rng.random() < 0.5:
        sentences.append(f"{x} is a {job}, so {x} works with a {tool}.")
    return paragraph(sentences, rng)


def about_activity(w: World, rng: random.Random) -> str:
    x = rng.choice(ACTIVITIES)
    steps = w.steps[x]
    if rng.random() < 0.3:
        return f"In {x}, the steps are {', '.join(steps)}."
    pairs = rng.sample(list(zip(steps, steps[1:])), 3)
    ways = [
        "In {x}, after the {a} comes the {b}.",
        "In {x}, the {b} follows the {a}.",
        "In {x}, first do the {a}, then do the {b}.",
        "In {x}, the {a} is before the {b}.",
    ]
    return " ".join(rng.choice(ways).format(x=x, a=a, b=b) for a, b in pairs)


def about_place(w: World, rng: random.Random) -> str:
    p = rng.choice(PLACES)
    things = rng.sample([x for x in OBJECTS if w.place[x] == p], 3)
    people = rng.sample([x for x in PEOPLE if w.home[x] == p], 2)
    return paragraph(
        [
            f"In the {p} are the {things[0]}, the {things[1]} and the {things[2]}.",
            f"In the {p} live {people[0]} and {people[1]}.",
        ],
        rng,
    )


def compared(w: World, rng: random.Random) -> str:
    sentences = []
    for _ in range(3):
        a, b = rng.sample(OBJECTS, 2)
        if w.split[a] == "train" == w.split[b] and w.size[a] != w.size[b]:
            a, b = sorted((a, b), key=w.size.get)
            sentences += [
                rng.choice(
                    [
                        f"The {b} is larger than the {a}.",
                        f"The {a} is smaller than the {b}.",
                        f"The {a} fits into the {b}.",
                    ]
                )
            ]
        x = rng.choice(MATERIALS)
        materials, does, does_not = PROPERTIES[rng.choice(list(PROPERTIES))]
        sentences.append(f"What is made of {x} {does if x in materials else does_not}.")
    return paragraph(sentences, rng)


def story(w: World, rng: random.Random) -> str:
    """Someone takes something home; what happens follows from the facts."""
    a, x = rng.choice(PEOPLE), rng.choice(OBJECTS)
    fact = w.fact(x, rng.choice(list(PROPERTIES)))
    return (
        f"{a} the {w.job[a]} took the {SIZES[w.size[x]]} {x} from the {w.place[x]} to the "
        f"{w.home[a]}. The {x} {fact}. Then {a} went home to {w.habit[a]}."
    )


def quiz(w: World, rng: random.Random) -> str:
    """A choice, or a claim to be judged, within the training share alone."""
    things, people = w.of(w.material, "train"), w.of(w.job, "train")
    x, a, act = rng.choice(things), rng.choice(people), rng.choice(w.of(w.steps, "train"))
    i, name = rng.randrange(5), rng.choice(list(PROPERTIES))
    does = PROPERTIES[name][1]
    topics = [  # question, right answer, what the wrong ones are drawn from
        (f"What is the {x} made of?", w.material[x], MATERIALS),
        (f"Where is the {x} kept?", w.place[x], PLACES),
        (f"How large is the {x}?", SIZES[w.size[x]], SIZES),
        (f"What is {a}?", w.job[a], list(TOOLS)),
        (f"Where does {a} live?", w.home[a], PLACES),
        (f"What does {a} do in the evening?", w.habit[a], HABITS),
        (f"What does a gift make {a}?", w.feeling[a], FEELINGS),
        (f"In {act}, what is after the {w.steps[act][i]}?", w.steps[act][i + 1], w.steps[act]),
        (f"Which {does}?", x, [y for y in things if w.has(y, name) != w.has(x, name)]),
        (f"Who lives in the {w.home[a]}?", a, [b for b in people if w.home[b] != w.home[a]]),
        (
            f"Which is made of {w.material[x]}?",
            x,
            [y for y in things if w.material[y] != w.material[x]],
        ),
        (f"Which is larger than the {x}?", None, None),
    ]
    question, right, others = rng.choice(topics)
    if right is None:
        larger = [y for y in things if w.size[y] > w.size[x]]
        smaller = [y for y in things if w.size[y] < w.size[x]]
        if not larger:
            question = f"Which is smaller than the {x}?"
        right = rng.choice(larger or smaller)
        others = [y for y in things if y not in (larger or smaller) and y != x]
    elif question.startswith(f"Which {does}") and not w.has(x, name):
        question = f"Which {PROPERTIES[name][2]}?"
    wrong = rng.choice([y for y in others if y != right])
    if rng.random() < 0.3:
        claim = rng.random() < 0.5
        return f"Is it true? {question} {right if claim else wrong}. That is {str(claim).lower()}."
    wrong = rng.sample([y for y in others if y != right], rng.choice([1, 2, 3]))
    options = rng.sample([right, *wrong], len(wrong) + 1)
    return f"Quiz: {question} {' / '.join(options)}. It is {right}."


def paragraph(sentences: list[str], rng: random.Random) -> str:
    return " ".join(rng.sample(sentences, len(sentences)))


# ---------------------------------------------------------------------------------- questions


class Asked(NamedTuple):
    """A question before it is put into its family's words."""

    text: str
    right: str
    wrong: list[str]


def questions(family: str, split: str, count: int) -> list[dict]:
    """`count` different questions of a family and a split of SPLITS, in LLM-Adapters' format.

    Each is {"instruction", "input", "output", "answer"}. The instruction ends with an "Answer
    format" line, which holds the options, and `answer` is one of them; the paper's tasks number
    theirs (answer1, …), ours go by their own words, since to bind numbers to words takes a larger
    model than ours. The right option's place is balanced. Different questions may ask about one
    fact, with other wrong options.
    """
    w = world()
    number = FAMILIES.index(family) * len(SPLITS) + list(SPLITS).index(split)
    rng = random.Random(number + 1)
    found: dict[str, dict] = {}
    while len(found) < count:
        asked = ASK[family](w, split, rng)
        if family == "boolq" and asked.right != ("true", "false")[len(found) % 2]:
            continue
        example = phrase(family, asked, len(found), rng)
        found.setdefault(asked.text + asked.right + "".join(sorted(asked.wrong)), example)
    return list(found.values())


# the words before a question, as LLM-Adapters' files have them
ANSWER = "Please choose the correct answer to the question:"
HEADS = {
    "boolq": "Please answer the following question with true or false, question:",
    "piqa": "Please choose the correct solution to the question:",
    "social_i_qa": ANSWER,
    "hellaswag": "Please choose the correct ending to complete the given sentence:",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence:",
    "ARC-Easy": ANSWER,
    "ARC-Challenge": ANSWER,
    "openbookqa": ANSWER,
}
FORM = "\n\nAnswer format:"  # before the options
OUTPUT = "the correct answer is"  # before the answer


def phrase(family: str, asked: Asked, turn: int, rng: random.Random) -> dict:
    """Put a question into its family's words; `turn` decides the right option's place."""
    options = rng.sample(asked.wrong, len(asked.wrong))
    options.insert(turn % (len(options) + 1), asked.right)
    if family == "boolq":
        options = ["true", "false"]
    return {
        "instruction": f"{HEADS[family]} {asked.text}{FORM} {' / '.join(options)}",
        "input": "",
        "output": f"{OUTPUT} {asked.right}",
        "answer": asked.right,
    }


# what someone does with a thing to see whether it has a property, and the question to ask
TRIALS = {
    "floats": ("threw the {} into the pond", "Did the {} float"),
    "burns": ("put the {} into the fire", "Did the {} burn"),
    "breaks": ("let the {} fall", "Did the {} break"),
    "melts": ("put the {} into the kiln", "Did the {} melt"),
}
GOALS = {  # what needs a property
    "floats": "To cross the pond, hold on to the",
    "burns": "To make a fire, light the",
    "breaks": "To get shards, drop the",
    "melts": "To cast something new, heat the",
}
RULES = [  # for the open book: a rule about one material and its question
    ("Moths eat what is made of {}.", "What will moths eat?"),
    ("A ghost walks through {}.", "What will a ghost walk through?"),
    ("Things of {} hum at night.", "What will hum at night?"),
    ("The king collects things of {}.", "What will the king collect?"),
    ("It is unlucky to touch {}.", "What is it unlucky to touch?"),
    ("Thieves steal nothing but {}.", "What will thieves steal?"),
]


def contrast(w: World, split: str, rng: random.Random, name: str, wrong: int) -> list[str]:
    """One object with a property or one without it, then `wrong` objects of the other kind."""
    things, want = w.of(w.material, split), rng.random() < 0.5
    right = [x for x in things if w.has(x, name) == want]
    return [rng.choice(right), *rng.sample([x for x in things if x not in right], wrong)]


def ask_boolq(w: World, split: str, rng: random.Random) -> Asked:
    """What happened to a thing that its passage names; or whether someone is at home."""
    truth, a = rng.random() < 0.5, rng.choice(w.of(w.job, split))
    if rng.random() < 0.5:
        name = rng.choice(list(TRIALS))
        did, question = TRIALS[name]
        x, y = contrast(w, split, rng, name, 1)
        x = x if w.has(x, name) == truth else y
        text = f"{a} {did.format(x)}. {question.format(x)}?"
    else:
        where = w.home[a] if truth else rng.choice([p for p in PLACES if p != w.home[a]])
        b = rng.choice([b for b in w.of(w.job, split) if b != a])
        text = f"{b} met {a} in the {where}. Was {a} at home?"
    return Asked(text, str(truth).lower(), [str(not truth).lower()])


def ask_piqa(w: World, split: str, rng: random.Random) -> Asked:
    """Which of two things serves a purpose: it has the property, or it is large enough."""
    if rng.random() < 0.3:
        a, b = rng.sample(w.of(w.size, split), 2)
        if w.size[a] == w.size[b]:
            return ask_piqa(w, split, rng)
        small, large = sorted((a, b), key=w.size.get)
        if rng.random() < 0.5:
            return Asked("To hold as much as possible, use the", large, [small])
        return Asked("To save room, use the", small, [large])
    name = rng.choice(list(GOALS))
    right, wrong = sorted(contrast(w, split, rng, name, 1), key=lambda x: not w.has(x, name))
    return Asked(GOALS[name], right, [wrong])


def ask_siqa(w: World, split: str, rng: random.Random) -> Asked:
    """What a person does or feels next."""
    a, b = rng.sample(w.of(w.job, split), 2)
    if rng.random() < 0.5:
        text = f"{a} and {b} finished work. What will {a} do next?"
        right, values = w.habit[a], HABITS
    else:
        text = f"{b} brought a gift to {a}. How will {a} feel afterwards?"
        right, values = w.feeling[a], FEELINGS
    return Asked(text, right, rng.sample([v for v in values if v != right], 2))


def ask_hellaswag(w: World, split: str, rng: random.Random) -> Asked:
    """Which step of an activity follows; the wrong endings are its other steps."""
    act, i = rng.choice(w.of(w.steps, split)), rng.randrange(5)
    steps, a = w.steps[act], rng.choice(PEOPLE)
    text = f"In {act}, {a} has done the {steps[i]}. Then {a} starts the"
    wrong = [step for step in steps if step not in steps[i : i + 2]]
    return Asked(text, steps[i + 1], rng.sample(wrong, 3))


def ask_winogrande(w: World, split: str, rng: random.Random) -> Asked:
    """Which of two names fits the blank: by where they live, their work, or a property."""
    kind = rng.randrange(3)
    if kind == 2:
        name = rng.choice(list(PROPERTIES))
        x, y = contrast(w, split, rng, name, 1)
        first, second = rng.sample([x, y], 2)
        return Asked(f"Of the {first} and the {second}, only the _ {w.fact(x, name)}.", x, [y])
    a, b = rng.sample(w.of(w.job, split), 2)
    first, second = rng.sample([a, b], 2)
    facts = w.home if kind == 0 else w.job
    if facts[a] == facts[b]:
        return ask_winogrande(w, split, rng)
    if kind == 0:
        reason = f"{first} and {second} slept in the {w.home[a]}, because _ lives there."
    else:
        reason = f"{first} and {second} asked for a {w.job[a]}, and _ was the one."
    return Asked(reason, a, [b])


def ask_arc_easy(w: World, split: str, rng: random.Random) -> Asked:
    """One fact of one thing or person."""
    x, a = rng.choice(w.of(w.material, split)), rng.choice(w.of(w.job, split))
    text, right, values = rng.choice(
        [
            (f"Which material is the {x} made of?", w.material[x], MATERIALS),
            (f"In which place is the {x} found?", w.place[x], PLACES),
            (f"Which size has the {x}?", SIZES[w.size[x]], SIZES),
            (f"Which work does {a} do?", w.job[a], list(TOOLS)),
            (f"In which place does {a} live?", w.home[a], PLACES),
        ]
    )
    return Asked(text, right, rng.sample([v for v in values if v != right], 3))


def ask_arc_challenge(w: World, split: str, rng: random.Random) -> Asked:
    """Two facts in a row: work and its tool, or what two things, or a thing and a person, share."""
    things = w.of(w.material, split)
    x, a = rng.choice(things), rng.choice(w.of(w.job, split))
    kind = rng.randrange(3)
    if kind == 0:
        right = TOOLS[w.job[a]]
        wrong = rng.sample([tool for tool in TOOLS.values() if tool != right], 3)
        return Asked(f"Which tool does {a} need at work?", right, wrong)
    if kind == 1:
        text, facts = f"Which is made of the same material as the {x}?", w.material
        value = w.material[x]
    else:
        text, facts, value = f"Which is kept in the place where {a} lives?", w.place, w.home[a]
    right = [y for y in things if facts[y] == value and y != x]
    wrong = [y for y in things if facts[y] != value]
    if not right or len(wrong) < 3:
        return ask_arc_challenge(w, split, rng)
    return Asked(text, rng.choice(right), rng.sample(wrong, 3))


def ask_openbook(w: World, split: str, rng: random.Random) -> Asked:
    """A made-up rule is given; which thing it applies to must be known."""
    rule, question = rng.choice(RULES)
    things, material = w.of(w.material, split), rng.choice(MATERIALS)
    right = [x for x in things if w.material[x] == material]
    wrong = [x for x in things if w.material[x] != material]
    if not right:
        return ask_openbook(w, split, rng)
    text = f"Fact: {rule.format(material)} {question}"
    return Asked(text, rng.choice(right), rng.sample(wrong, 3))


ASK: dict[str, Callable[[World, str, random.Random], Asked]] = dict(
    zip(
        FAMILIES,
        (
            ask_boolq,
            ask_piqa,
            ask_siqa,
            ask_hellaswag,
            ask_winogrande,
            ask_arc_easy,
            ask_arc_challenge,
            ask_openbook,
        ),
    )
)
