"""lab/scoring.py, and questions as batches: loss and scores are the naive ones."""

import argparse

import pytest
import torch
from asking import CPU, QUESTIONS, args_for, asked, differences, naive_scores, tiny_model

import models
import train_lm
from lab import methods, questions, scoring

each_method = pytest.mark.parametrize("method", train_lm.LEARNING_RATES)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tokenizer) -> models.LLaMA:
    return tiny_model(len(tokenizer))


# ------------------------------------------------------------------------------------ the loss


@torch.no_grad()
def naive_loss(model: models.LLaMA, question: questions.Question, tokenizer) -> tuple[float, int]:
    """−log p of the answer's tokens and the end after the prompt, summed; and how many they are."""
    prompt, output = tokenizer.encode(question.prompt), tokenizer.encode(question.output)
    tokens = torch.tensor([[*prompt, *output, tokenizer.end]])
    logs = model(tokens)[0].double().log_softmax(-1)
    places = range(len(prompt), tokens.shape[1])
    return -sum(logs[i - 1, tokens[0, i]].item() for i in places), len(places)


@torch.no_grad()
def test_the_loss_is_over_the_answers_tokens_and_the_end_alone(model, tokenizer):
    for question in QUESTIONS:
        batch = questions.collate([questions.encode(question, tokenizer)])
        total, count = naive_loss(model, question, tokenizer)
        assert questions.token_loss(model, *batch).item() == pytest.approx(total / count, rel=1e-5)
        tokens, labels = batch
        learned = labels[labels != questions.IGNORE].tolist()
        assert tokenizer.decode(learned) == question.output and learned[-1] == tokenizer.end
        assert tokenizer.decode(tokens[0].tolist()) == question.prompt + question.output


@torch.no_grad()
def test_padding_changes_no_questions_loss(model, tokenizer):
    pairs = [questions.encode(question, tokenizer) for question in QUESTIONS]
    tokens, labels = questions.collate(pairs)
    assert tokens.shape == labels.shape == (5, max(len(t) for t, _ in pairs) - 1)
    sums, counts = zip(*(naive_loss(model, question, tokenizer) for question in QUESTIONS))
    loss = questions.token_loss(model, tokens, labels)
    assert loss.item() == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    for row, (pair, _) in enumerate(sorted(pairs, key=lambda pair: len(pair[0]))):
        tokens[row, len(pair) - 1 :] = 300
    assert torch.equal(questions.token_loss(model, tokens, labels), loss)


@torch.no_grad()
def test_each_part_of_a_batch_is_read_up_to_its_own_longest(model, tokenizer, monkeypatch):
    pairs = [questions.encode(question, tokenizer) for question in QUESTIONS]
    features, read = model.features, []
    monkeypatch.setattr(model, "features", lambda x: read.append(x.shape) or features(x))
    for part in zip(*(tensor.chunk(5) for tensor in questions.collate(pairs))):
        questions.token_loss(model, *part)
    lengths = sorted(len(tokens) - 1 for tokens, _ in pairs)
    assert read == [(1, length) for length in lengths] and lengths[0] < lengths[-1]


def test_where_a_tokenizer_joins_prompt_and_answer_the_joint_is_learned():
    joining = questions.Tokenizer(["\nthe"])
    tokens, start = questions.encode(QUESTIONS[0], joining)
    assert tokens[start] == 257 and joining.decode(tokens[start:]) == "\nthe correct answer is true"
    assert joining.decode(tokens[:start]) == QUESTIONS[0].prompt.removesuffix("\n")


# -------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("together", [1, 2, 5])
def test_likelihoods_are_the_naive_ones_of_options_in_sequences_of_their_own(
    together, model, tokenizer
):
    largest = 0
    for first in range(0, len(QUESTIONS), together):
        some = QUESTIONS[first : first + together]
        branches = [scoring.branch(question, tokenizer) for question in some]
        found = scoring.likelihoods(model, branches, CPU)
        assert found.shape == (len(some), max(len(q.options) for q in some))
        for row, question in zip(found, some, strict=True):
            expected = differences(naive_scores(model, question, tokenizer))
            count, largest = len(question.options), max(largest, *map(abs, expected))
            assert differences(row[:count]) == pytest.approx(expected, abs=1e-4)
            assert (row[count:] == scoring.ABSENT).all()
    assert largest > 1


@pytest.mark.parametrize("method", ["ssf", "san", "san+dora"])
def test_likelihoods_are_the_naive_ones_of_an_adapted_model(method, tokenizer):
    model = tiny_model(len(tokenizer))
    methods.adapt(
        model,
        method,
        argparse.Namespace(
            wiring="san", mode="both", shift=0, rank=2, alpha=None, norms=True, gamma_std=0.0
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    branches = [scoring.branch(question, tokenizer) for question in QUESTIONS]
    for row, question in zip(scoring.likelihoods(model, branches, CPU), QUESTIONS, strict=True):
        expected = differences(naive_scores(model, question, tokenizer))
        assert differences(row[: len(expected)]) == pytest.approx(expected, abs=1e-4)


def test_the_prompt_runs_once_however_many_options_there_are(model, tokenizer):
    read = []
    hook = model.embed.register_forward_hook(lambda _, inputs, __: read.append(inputs[0].numel()))
    for question in QUESTIONS:
        prompt = len(tokenizer.encode(question.prompt))
        tails = [len(tokenizer.encode(" " + option)) for option in question.options]
        branch = scoring.branch(question, tokenizer)
        scoring.likelihoods(model, [branch], CPU)
        assert read.pop() == branch.length <= prompt + 1 + sum(tails) and not read
    hook.remove()


# options that begin alike, one that begins another, a single token, and a blank to be filled
IN_WORDS = [
    questions.Question("Question: Which?\nAnswer:", " ", ("the bow", "the bowl", "x", "a bat"), 1),
    questions.Question("Question: Is it so?\nAnswer:", " ", ("yes", "no"), 0),
    questions.Question("They slept, for the", " ", ("bat", "red bowl"), 1, " was in 東京."),
    questions.Question("", "", ("Ann", "Bo"), 1, "'s house."),
]


@torch.no_grad()
def naive_likelihoods(model, question: questions.Question, tokenizer) -> list[float]:
    """log p of what is scored after what is read, every option in a full sequence of its own."""
    sums = []
    for option in range(len(question.options)):
        read, scored = question.scored(option)
        before, tokens = tokenizer.encode(read), tokenizer.encode(read + scored)
        assert tokens[: len(before)] == before
        logs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        sums.append(sum(logs[i - 1, tokens[i]].item() for i in range(len(before), len(tokens))))
    return sums


@pytest.mark.parametrize("tokens", [1, 100, 10_000])
def test_in_words_every_token_of_an_option_counts_however_much_is_batched(
    tokens, model, tokenizer, monkeypatch
):
    monkeypatch.setattr(scoring, "TOKENS", tokens)
    monkeypatch.setattr(scoring, "PADDED", 9)
    for own in (tokenizer, questions.Tokenizer([])):
        found = scoring.answer(model, IN_WORDS, own, args_for())
        for row, question in zip(found, IN_WORDS, strict=True):
            expected = naive_likelihoods(model, question, own)
            assert row[: len(expected)].tolist() == pytest.approx(expected, abs=1e-3)


def test_a_likelihood_per_character_is_over_the_text_that_is_scored_without_its_space():
    scores = torch.tensor([[-14.0, -8, -1, -15], [-6, -2, scoring.ABSENT, scoring.ABSENT]])
    found = scoring.per_character(scores, IN_WORDS[:2])
    assert found[0].tolist() == [-2, -1, -1, -3] and found[1, :2].tolist() == [-2, -1]
    assert scoring.accuracy(scores, IN_WORDS[:2]) == 0
    scores[0, 2] = -9
    assert scoring.accuracy(scoring.per_character(scores, IN_WORDS[:2]), IN_WORDS[:2]) == 0.5
    blank = scoring.per_character(torch.tensor([[-20.0, -10]]), IN_WORDS[2:3])
    assert blank.tolist() == [[-2, -1]]


def test_the_head_reads_asked_places_alone_and_none_twice(model, tokenizer):
    places = []
    hook = model.head.register_forward_hook(lambda _, inputs, __: places.append(len(inputs[0])))
    for question in (
        QUESTIONS[4],
        IN_WORDS[1],
    ):  # four options that begin alike, and two that do not
        own = scoring.branch(question, tokenizer)
        scoring.likelihoods(model, [own], CPU)
        assert places.pop() == own.length - (own.starts[0] - 1) < sum(map(len, own.tails)) + 1
    hook.remove()


def test_batches_hold_what_fits_the_shortest_first_and_a_long_row_stands_alone(monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS", 30)
    found = [*scoring.batched([10, 50, 9, 11, 8, 12], scoring.fits_in_batch)]
    assert found == [[4, 2], [0, 3], [5], [1]]
    assert [*scoring.batched([3, 1, 2], lambda own: len(own) <= 2)] == [[1, 2], [0]]


def test_answers_come_in_the_order_of_the_questions_whatever_is_batched(model, tokenizer):
    found = scoring.answer(model, QUESTIONS, tokenizer, args_for(batch_size=1))
    assert found.shape == (5, 5)
    for row, question in zip(found, QUESTIONS, strict=True):
        expected = differences(naive_scores(model, question, tokenizer))
        assert differences(row[: len(expected)]) == pytest.approx(expected, abs=1e-4)
        assert (row[len(expected) :] == scoring.ABSENT).all()


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("the correct answer is answer2", 1),
        ("answer3, not answer1", 2),
        ("the correct answer is", -1),
        ("", -1),
    ],
)
def test_the_first_option_that_a_text_names_is_its_answer(text, first):
    assert scoring.first_named(text, ["answer1", "answer2", "answer3"]) == first


@pytest.mark.parametrize(("text", "first"), [("it is bowl", 1), ("it is pendant", -1)])
def test_an_option_within_a_longer_word_is_not_named(text, first):
    assert scoring.first_named(text, ["bow", "bowl", "pen"]) == first


def test_generated_answers_are_right_where_they_name_the_right_option_first(
    model, tokenizer, monkeypatch
):
    texts = ["it is true", "answer4 or answer5", "the small bag of the baker", "", "ending4"]
    said = {question.prompt: text for question, text in zip(QUESTIONS, texts)}
    monkeypatch.setattr(scoring, "speak_batch", lambda *a: [said[q.prompt] for q in a[2]])
    scores = scoring.answer(model, QUESTIONS, tokenizer, args_for(score="generate"))
    rights = [scoring.accuracy(scores[i : i + 1], QUESTIONS[i : i + 1]) for i in range(5)]
    assert rights == [1, 0, 1, 0, 1]


def test_texts_generated_in_batches_are_those_of_each_question_alone(model, tokenizer):
    alone = [scoring.speak(model, tokenizer, question) for question in QUESTIONS]
    assert scoring.speak_batch(model, tokenizer, QUESTIONS) == alone and len({*alone}) == len(alone)


def test_a_model_speaks_its_likeliest_tokens_until_the_end(model, tokenizer, monkeypatch):
    question, tokens = QUESTIONS[0], tokenizer.encode(QUESTIONS[0].prompt)
    prompt, said = len(tokens), []
    for _ in range(scoring.ANSWER_TOKENS):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    text = tokenizer.decode(tokens[prompt:]).strip()
    assert scoring.speak(model, tokenizer, question) == text
    end = tokens[prompt + 3]
    said = tokens[prompt : tokens.index(end, prompt)]
    monkeypatch.setattr(tokenizer, "end", end)
    assert scoring.speak(model, tokenizer, question) == tokenizer.decode(said).strip()


def test_accuracy_counts_right_answers_and_ties_are_wrong():
    absent = scoring.ABSENT
    scores = torch.tensor([[2.0, 1, absent], [1, 2, 3], [0, 0, absent], [3, 3, 1], [-9, -5, -7]])
    right = [asked("?", ["a", "b", "c"], answer) for answer in (0, 2, 0, 0, 0)]
    assert scoring.accuracy(scores, right) == pytest.approx(2 / 5)
