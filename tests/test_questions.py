"""questions.py: every text comes back from a tokenizer, every question as its file has it."""

import http.client
import json
import re
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch

import models
from lab import microworld, questions, scoring

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


def test_language_needs_no_torchvision():
    code = "import train_lm, sys; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=True)


# ---------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizer() -> questions.Tokenizer:
    return questions.microworld_tokenizer()


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
    for own in (tokenizer, questions.Tokenizer(pieces)):
        assert own.decode(own.encode(text)) == text
        assert all(0 <= number < len(own) != own.end for number in own.encode(text))


def test_the_end_is_left_out_and_is_no_text(tokenizer):
    numbers = tokenizer.encode("a box")
    assert tokenizer.decode([*numbers, tokenizer.end]) == "a box"
    assert tokenizer.end not in tokenizer.encode("</s>") and tokenizer.end < len(tokenizer)


@pytest.mark.parametrize("family", microworld.FAMILIES)
def test_microworlds_own_questions_are_spelled_in_whole_pieces(family, tokenizer):
    for split, count in microworld.COUNTS.items():
        for record in microworld.questions(family, split, count):
            question = questions.question(record, "here")
            assert min(tokenizer.encode(question.prompt + question.output)) > tokenizer.end
            for option in question.options:
                assert len(tokenizer.encode(f"{microworld.OUTPUT} {option}")) == 2


def test_a_piece_is_taken_whole_and_the_longest_sentence_first():
    own = questions.Tokenizer(["the box", "the box is", " red", "re"])
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
    own = questions.LlamaTokenizer(checkpoint)
    assert own.end == 1
    for text in [*STRANGE, "the correct answer is answer1"]:
        numbers = own.encode(text)
        assert numbers[0] == 0 and own.end not in numbers
        assert own.decode(numbers) == own.decode([*numbers, own.end]) == text
    (checkpoint / "config.json").write_text('{"eos_token_id": [128, 1]}')
    assert questions.LlamaTokenizer(checkpoint).end == 128


def change_tokenizer(folder: Path, change) -> questions.LlamaTokenizer:
    """The tokenizer in the folder after `change` of the package's own has been saved."""
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(inner)
    inner.save(str(folder / "tokenizer.json"))
    return questions.LlamaTokenizer(folder)


QUESTION = questions.Question(questions.PROMPT.format("Is it?"), "it is true", ("true", "false"), 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda inner: inner.enable_truncation(16),
        lambda inner: inner.enable_padding(length=400),
        lambda inner: (inner.enable_truncation(4, strategy="only_first"), inner.enable_padding()),
    ],
)
def test_a_length_that_was_saved_with_a_tokenizer_neither_cuts_nor_fills(change, checkpoint):
    expected = questions.encode(QUESTION, questions.LlamaTokenizer(checkpoint))
    assert questions.encode(QUESTION, change_tokenizer(checkpoint, change)) == expected
    assert len(expected[0]) > 16


def ending(template: str):
    def change(inner) -> None:
        import tokenizers

        special = [("<s>", 0), ("</s>", 1)]
        template_of = tokenizers.processors.TemplateProcessing
        inner.post_processor = template_of(template, None, special)

    return change


@pytest.mark.parametrize(
    ("template", "begin"),
    [
        ("<s> $A </s>", [0]),
        ("$A </s>", []),
        ("</s> $A </s> </s>", [1]),  # as some begin a text with what ends it
        ("<s> <s> $A", [0, 0]),
    ],
)
def test_what_a_tokenizer_puts_after_a_text_is_left_out(template, begin, checkpoint, monkeypatch):
    plain = questions.LlamaTokenizer(checkpoint).encode(QUESTION.prompt)[1:]
    own = change_tokenizer(checkpoint, ending(template))
    assert own.encode(QUESTION.prompt) == begin + plain
    tokens, start = questions.encode(QUESTION, own)
    assert tokens[-1] == own.end != tokens[-2]
    assert own.decode(tokens[start:]) == QUESTION.output
    given = []
    monkeypatch.setattr(models, "generate", lambda _, prompt, *rest: given.append(prompt) or [])
    assert scoring.speak(None, own, QUESTION) == "" and given == [begin + plain]


def test_special_tokens_beyond_the_models_rows_are_text_and_others_count(checkpoint):
    rows = len(questions.LlamaTokenizer(checkpoint))
    config = {"eos_token_id": 1, "vocab_size": rows}
    (checkpoint / "config.json").write_text(json.dumps(config))
    padded = change_tokenizer(checkpoint, lambda inner: inner.add_special_tokens(["<pad>"]))
    assert len(padded) == rows
    numbers = padded.encode("a <pad>")
    assert max(numbers) < rows and padded.decode(numbers) == "a <pad>"
    worded = change_tokenizer(checkpoint, lambda inner: inner.add_tokens(["Answer format"]))
    assert len(worded) > rows and max(worded.encode("Answer format")) >= rows


def test_an_added_special_token_that_the_model_has_a_row_for_stays_one(checkpoint):
    rows = len(questions.LlamaTokenizer(checkpoint)) + 1
    config = {"eos_token_id": 1, "vocab_size": rows}
    (checkpoint / "config.json").write_text(json.dumps(config))
    own = change_tokenizer(checkpoint, lambda inner: inner.add_special_tokens(["<pad>"]))
    assert own.encode("<pad>") == [0, rows - 1] and len(own) == rows


def test_a_tokenizer_model_alone_is_told_how_to_convert(checkpoint):
    (checkpoint / "tokenizer.json").rename(checkpoint / "tokenizer.model")
    with pytest.raises(OSError, match="convert it: pip install transformers.*save_pretrained"):
        questions.LlamaTokenizer(checkpoint)


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
        questions.LlamaTokenizer(checkpoint)


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


def numbers(asked: list[questions.Question]) -> list[int]:
    """Which examples these are."""
    return [int(re.search(r"Question (\d+) of", q.prompt)[1]) for q in asked]


def test_questions_of_files_are_read_with_their_own_options(files):
    loaded = questions.load_questions(str(files), [*WORDS])
    assert [*loaded.test] == [*loaded.val] == [*loaded.train] == [*WORDS]
    for task, asked in loaded.test.items():
        options = options_of(task)
        assert numbers(asked) == list(range(20, 27))
        for i, question in enumerate(asked, 20):
            assert question.options == options and question.answer == i % len(options)
            assert question.output == f"the correct answer is {options[question.answer]}"
            asked_for = WORDS[task].format(f"Question {i} of {task}?")
            assert question.prompt == questions.PROMPT.format(asked_for)


def test_the_prompt_is_llm_adapters(files):
    first = questions.load_questions(str(files), ["boolq"]).test["boolq"][0]
    assert first.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nQuestion 20 of boolq?\n\n"
        "Answer format: true/false\n\n### Response:\n"
    )


ASKED = {  # of each kind of record: the prompt, what is read of the options, what is scored
    "boolq": (
        "Question: is it so?\nAnswer:",
        [("", " yes"), ("", " no")],
    ),
    "piqa": ("Question: To sit:\nAnswer:", [("", " take a chair."), ("", " take 2: both.")]),
    "social_i_qa": (
        "Question: Ann sat. Why?\nAnswer:",
        [("", " tired"), ("", " to rest"), ("", " the bus")],
    ),
    "hellaswag": (
        "Sitting: How to sit. Find a chair",
        [("", " and sit."), ("", " and stand. Go."), ("", " alone"), ("", " 4")],
    ),
    "winogrande": (
        "The jeans were tight, as I had tried the",
        [(" jeans", " on at home."), (" shirt", " on at home.")],
    ),
    "ARC-Easy": (
        "Question: What burns?\nAnswer:",
        [("", " ice"), ("", " wood"), ("", " air: no")],
    ),
    "ARC-Challenge": (
        "Question: Which?\nAnswer:",
        [("", f" {letter}") for letter in "abcde"],
    ),
    "openbookqa": (
        "Question: The sun is\nAnswer:",
        [("", " hot"), ("", " true"), ("", " A/C"), ("", " 東京")],
    ),
}
INSTRUCTIONS = {  # as LLM-Adapters' files have them
    "boolq": "Please answer the following question with true or false, question: is it so?\n\n"
    "Answer format: true/false",
    "piqa": "Please choose the correct solution to the question: To sit:\n\n"
    "Solution1: take a chair.\n\nSolution2: take 2: both.\n\nAnswer format: solution1/solution2",
    "social_i_qa": "Please choose the correct answer to the question: Ann sat. Why?\n\n"
    "Answer1: tired Answer2: to rest Answer3: the bus\n\nAnswer format: answer1/answer2/answer3",
    "hellaswag": "Please choose the correct ending to complete the given sentence: "
    "Sitting: [header] How to sit [title] Find a chair\n\nEnding1: and sit. Ending2: and stand "
    "[title] Go. [step] Ending3: alone Ending4: 4\n\n"
    "Answer format: ending1/ending2/ending3/ending4",
    "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
    "sentence: The jeans were tight, as I had tried the _ on at home.\n\n"
    "Option1: jeans Option2: shirt Answer format: option1/option2",
    "ARC-Easy": "Please choose the correct answer to the question: What burns?\n\n"
    "Answer1: ice Answer2: wood Answer3: air: no\n\nAnswer format: answer1/answer2/answer3",
    "ARC-Challenge": "Please choose the correct answer to the question: Which?\n\nAnswer1: a "
    "Answer2: b Answer3: c Answer4: d Answer5: e\n\n"
    "Answer format: answer1/answer2/answer3/answer4/answer5",
    "openbookqa": "Please choose the correct answer to the question: The sun is\n\nAnswer1: hot "
    "Answer2: true Answer3: A/C Answer4: 東京\n\nAnswer format: answer1/answer2/answer3/answer4",
}


def record(task: str, answer: int, **entries) -> dict:
    text = INSTRUCTIONS[task]
    name = text.partition("Answer format: ")[2].split("/")[answer]
    output = f"the correct answer is {name}"
    return {"instruction": text, "input": "", "output": output, "answer": name} | entries


@pytest.mark.parametrize("task", questions.EIGHT)
def test_in_words_the_options_texts_are_scored_and_the_right_one_is_learned(task):
    prompt, texts = ASKED[task]
    for answer, (read, scored) in enumerate(texts):
        question = questions.question(record(task, answer), "here", "words")
        assert question.prompt == prompt and question.answer == answer
        found = [question.scored(i) for i in range(len(question.options))]
        assert found == [(prompt + before, after) for before, after in texts]
        assert question.learned() == (prompt + read, scored)
        assert question.prompt + question.output == prompt + read + scored


@pytest.mark.parametrize("task", questions.EIGHT)
def test_as_options_the_instruction_stands_and_the_number_is_scored_and_learned(task):
    question = questions.question(record(task, 1), "here", "options")
    prompt, name = questions.PROMPT.format(INSTRUCTIONS[task]), record(task, 1)["answer"]
    assert question.scored(1) == (f"{prompt}the correct answer is", f" {name}")
    assert question.learned() == (prompt, f"the correct answer is {name}")


def test_a_name_that_fills_the_first_place_of_a_sentence_has_no_space_before_it():
    text = INSTRUCTIONS["winogrande"].replace("The jeans were tight, as I had tried the _", "_")
    question = questions.question(record("winogrande", 0, instruction=text), "here", "words")
    assert question.scored(1) == ("shirt", " on at home.")


def test_options_that_are_words_themselves_are_asked_without_their_list_and_the_input_is_kept():
    text = "Which?\n\nAnswer format: a red box / true / 東京"
    made = record("boolq", 0, instruction=text, input="Look up.")
    question = questions.question(made, "here", "words")
    assert question.prompt == "Question: Which?\n\nLook up.\nAnswer:"
    assert question.options == ("a red box", "true", "東京")


@pytest.mark.parametrize(
    ("task", "old", "new", "words"),
    [
        ("piqa", "Solution2:", "Solution 2:", "list its options as 'solution1: … solution2: …'"),
        ("ARC-Easy", "Answer1: ice ", "", "list its options"),
        ("ARC-Easy", "Answer1: ice Answer2: wood", "Answer2: wood Answer1: ice", "list its opt"),
        ("social_i_qa", "to rest", "", "an empty question or option"),
        ("boolq", "is it so?", "", "an empty question or option"),
        ("winogrande", "_", "pair", "needs one blank"),
        ("winogrande", "as I", "as _", "needs one blank"),
    ],
)
def test_a_record_that_cannot_be_asked_in_words_is_refused_by_file_and_number(
    task, old, new, words, files
):
    path = files / task / "test.json"
    (files / task).mkdir(exist_ok=True)
    broken = INSTRUCTIONS[task].replace(old, new, 1)
    path.write_text(json.dumps([record(task, 0), record(task, 0, instruction=broken)]))
    assert len(questions.read_questions(path)) == 2
    with pytest.raises(OSError, match=words) as caught:
        questions.read_questions(path, ask="words")
    assert str(caught.value).startswith(f"{path}, example 1 ")


def test_drawn_test_questions_are_the_same_for_every_seed_and_in_their_order(files):
    some = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded = questions.load_questions(str(files), ["piqa", "boolq"], test_shots=5)
        some.append([numbers(loaded.test[task]) for task in loaded.test])
        assert len(loaded.train["piqa"]) == 16
    assert some[0] == some[1]
    for own in some[0]:
        assert len(own) == 5 and own == sorted(own) and own != list(range(20, 25))
        assert {*own} < {*range(20, 27)}
    loaded = questions.load_questions(str(files), ["piqa"], test_shots=9)
    assert numbers(loaded.test["piqa"]) == list(range(20, 27))


def test_an_examples_own_answer_format_counts_not_its_tasks(files):
    path = files / "ARC-Challenge" / "test.json"
    content = [example("ARC-Challenge", 0), example("social_i_qa", 1), example("boolq", 2)]
    path.write_text(json.dumps(content))
    asked = questions.read_questions(path)
    assert [len(question.options) for question in asked] == [5, 3, 2]


def test_a_fifth_validates_the_rest_trains_and_no_seed_changes_which(files):
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loaded = questions.load_questions(str(files), ["piqa", "boolq"])
        splits.append([(numbers(loaded.train[t]), numbers(loaded.val[t])) for t in loaded.test])
    assert splits[0] == splits[1]
    for train, val in splits[0]:
        assert len(train) == 16 and len(val) == 4 and sorted(train + val) == list(range(20))
        assert train != sorted(train)


def test_shots_are_the_labelled_questions_of_a_task_validation_among_them(files):
    few = questions.load_questions(str(files), ["piqa", "boolq"], shots=10)
    for task in ("piqa", "boolq"):
        train, val = numbers(few.train[task]), numbers(few.val[task])
        assert len(train) == 8 and len(val) == 2 and len({*train, *val}) == 10
        assert len(few.test[task]) == 7


@pytest.mark.parametrize("shots", [1, 4, 21])
def test_shots_that_a_task_does_not_have_are_refused(shots, files):
    with pytest.raises(ValueError, match="piqa has 20 training examples, too few"):
        questions.load_questions(str(files), ["piqa"], shots=shots)


def test_microworlds_questions_are_its_splits_and_shots_take_some_of_them():
    loaded = questions.load_questions("microworld", ["piqa", "boolq"])
    few = questions.load_questions("microworld", ["piqa", "boolq"], shots=10)
    for task in ("piqa", "boolq"):
        sizes = [len(part[task]) for part in loaded[:3]]
        assert sizes == [800, 200, 500] and [len(part[task]) for part in few[:3]] == [8, 2, 500]
        assert {*few.train[task]} < {*loaded.train[task]} and {*few.val[task]} < {*loaded.val[task]}
        assert few.test == loaded.test


def test_a_training_file_stands_in_place_of_every_train_json(files):
    path = files / "all.json"
    path.write_text(json.dumps([example("boolq", i) for i in range(50)]))
    for task in WORDS:
        (files / task / "train.json").unlink()
    loaded = questions.load_questions(str(files), ["piqa", "boolq"], str(path))
    assert [*loaded.test] == ["piqa", "boolq"] and [*loaded.val] == [*loaded.train] == ["all"]
    assert sorted(numbers(loaded.train["all"] + loaded.val["all"])) == list(range(50))
    assert len(loaded.val["all"]) == 10
    few = questions.load_questions(str(files), ["piqa"], str(path), shots=10)
    assert len(few.train["all"]) == 8 and len(few.val["all"]) == 2
    with pytest.raises(ValueError, match="--train-file goes with --data DIR"):
        questions.load_questions("microworld", ["piqa"], str(path))


GOOD = example("boolq", 0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", "line 1, is not JSON: .*, character 3"),
        ('[\n{},\n{"instruction": }]', "line 3, is not JSON: .*, character 17"),
        ("nonsense", "line 1, is not JSON"),
        ('{}\n\n{"instruction":', "line 3, is not JSON"),
        (b"\xff\xfe[", "line 1, is no text in UTF-8 or UTF-16"),
        (b'[\n"\xe4"]', "line 2, is no text in UTF-8 or UTF-16"),
        ({"instruction": "?"}, "line 1 has no text called 'output'"),
        (f"{json.dumps(GOOD)}\n\n3", "line 3 has no text called 'instruction'"),
        ([], "holds no question"),
        ("", "holds no question"),
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
        questions.load_questions(str(files), ["boolq"])
    message = str(caught.value)
    assert str(path) in message and "\n" not in message and len(message) < 400
    assert "fetch" not in message  # it is the user's own


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("lines", [False, True])
def test_questions_are_read_as_windows_and_others_write_them(encoding, end, lines, files):
    path, content = files / "openbookqa" / "test.json", [example("openbookqa", i) for i in range(5)]
    expected = [questions.question(record, "here") for record in content]
    if lines:
        text = "\n\n".join(json.dumps(record, ensure_ascii=False) for record in content) + "\n"
    else:
        text = json.dumps(content, ensure_ascii=False, indent=2)
    text = text.replace("\n", end)
    if encoding == "utf-16-be-marked":
        path.write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    else:
        path.write_bytes(text.encode(encoding))
    assert questions.read_questions(path) == expected
    assert "東京" in expected[2].options


def test_unknown_tasks_and_folders_are_refused_by_name(files):
    with pytest.raises(ValueError, match="task 'nonsense' is unknown; choose from boolq, piqa"):
        questions.load_questions(str(files), ["boolq", "nonsense"])
    with pytest.raises(ValueError, match="nowhere is neither a folder nor one of microworld"):
        questions.load_questions("nowhere", ["boolq"])


def test_a_missing_file_without_a_network_names_the_address_and_the_place(files):
    path = files / "boolq" / "test.json"
    path.unlink()
    with pytest.raises(OSError, match=f"there is no {path}.*no network.*fetch https://.*/boolq/"):
        questions.load_questions(str(files), ["boolq"])


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
        addresses.append(address.removeprefix(questions.LLM_ADAPTERS))
        return Answer(json.dumps([example("boolq", i) for i in range(10)]).encode())

    monkeypatch.setattr("urllib.request.urlopen", fetch)
    first = questions.load_questions(str(tmp_path), ["boolq"])
    assert sorted(addresses) == ["/dataset/boolq/test.json", "/dataset/boolq/train.json"]
    joint = tmp_path / "commonsense_170k.json"
    questions.load_questions(str(tmp_path), ["boolq"], str(joint))
    assert addresses[2:] == ["/ft-training_set/commonsense_170k.json"]
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert made == {"boolq/test.json", "boolq/train.json", "commonsense_170k.json"}
    monkeypatch.undo()
    assert questions.load_questions(str(tmp_path), ["boolq"]) == first


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
        questions.load_questions(str(tmp_path), ["boolq"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_download_that_cannot_be_written_whole_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path, content):
        with open(path, "wb") as file:
            file.write(content[:1])
        raise OSError("no space left on device")

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Answer(b"[]"))
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="could not write"):
        questions.load_questions(str(tmp_path), ["boolq"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
