"""A tiny LLaMA, and questions to ask it."""

import argparse
from pathlib import Path

import torch

import models
import san
from lab import microworld, questions

TINY = dict(dim=32, depth=2, heads=4, kv_heads=2, hidden=48, context=96)
CPU = torch.device("cpu")


@torch.no_grad()
def tiny_model(vocab: int, **changes) -> models.LLaMA:
    """A random LLaMA in which everything matters, its logits far from equal."""
    torch.manual_seed(0)
    model = models.LLaMA(vocab, **TINY | changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.normal_(mean=1, std=0.3)
        else:
            parameter.normal_(std=1 if "embed" in name else parameter.shape[1] ** -0.5)
    return model.eval()


def save_as_run(model: models.LLaMA, tokenizer: questions.Tokenizer, path: Path) -> Path:
    """The model in a file, as a run would save it."""
    content = {"tokenizer": tokenizer.pieces, "numbers": model.config}
    san.write(content | {"state_dict": model.state_dict()}, path)
    return path


def asked(text: str, options: list[str], answer: int = 0) -> questions.Question:
    prompt, lead = questions.PROMPT.format(text), f"{microworld.OUTPUT} "
    return questions.Question(prompt, lead, tuple(options), answer)


# one-token tails, tails of several tokens and of several lengths, bytes; prompts of many lengths
QUESTIONS = [
    asked("Is it?", ["true", "false"]),
    asked("Which of the five? " * 5, [f"answer{i}" for i in range(1, 6)], 4),
    asked("Which box?", ["the large box", "the small bag of the baker", "the bat"], 1),
    asked("Où?", ["東京", "Zürich, près du château", "naïve", "x"], 2),
    asked("Which ending follows?", ["ending1", "ending2", "ending3", "ending4"], 3),
]


def args_for(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"batch_size": 2, "device": CPU, "score": "likelihood"} | changes)


@torch.no_grad()
def naive_scores(model, question: questions.Question, tokenizer) -> list[float]:
    """log p(prompt and option), every option in a full sequence of its own."""
    scores = []
    for option in question.options:
        tokens = tokenizer.encode(question.prompt + f"{microworld.OUTPUT} {option}")
        logs = model(torch.tensor([tokens]))[0].double().log_softmax(-1)
        scores.append(sum(logs[i - 1, tokens[i]].item() for i in range(1, len(tokens))))
    return scores


def differences(scores) -> list[float]:
    """From the first: what all options share is left out."""
    return [float(score) - float(scores[0]) for score in scores]
