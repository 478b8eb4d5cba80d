"""lab/visual.py and train_lm.py on pictures: the right picture is read, and every set is scored."""

import argparse
import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from asking import CPU, save_as_run
from PIL import Image
from running import command_of, metrics, stop_after, without_times
from tiny import randomise

import models
import san
import train_lm
from lab import loop, methods, paired, questions, scenes, scoring, tables, visual
from lab.questions import Question

pytestmark = pytest.mark.usefixtures("one_thread")
command = command_of(train_lm)

TOWER = dict(image_size=32, patch=8, dim=8, depth=2, heads=2)
TEXT = dict(dim=16, depth=2, heads=4, kv_heads=2, hidden=24, context=256)


@pytest.fixture(scope="module")
def tokenizer() -> questions.Tokenizer:
    return visual.scenes_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> models.LLaVA:
    """A tiny LLaVA in which the pictures decide much; 4 places per picture."""
    picture = tokenizer.number[visual.IMAGE]
    return randomise(models.LLaVA(TOWER, picture, pool=2, vocab=len(tokenizer), **TEXT))


@pytest.fixture(scope="module")
def weights(model, tokenizer, tmp_path_factory) -> Path:
    return save_as_run(model, tokenizer, tmp_path_factory.mktemp("weights") / "tiny.pt")


def settings(data: str, *tasks: str, **changes) -> argparse.Namespace:
    own = dict(data=data, tasks=tasks, blind=False, shots=20, test_shots=6, data_dir=None)
    own |= dict(device=CPU, batch_size=4, score="likelihood", ask="options")
    return argparse.Namespace(**own | changes)


# ------------------------------------------------------------------------------- what is read


@torch.no_grad()
def test_an_option_is_scored_with_the_pictures_of_its_question(model, tokenizer):
    args = settings("scenes", "TextVQA", "MMBench")
    asked = visual.load(args, model)
    assert [len(s["MMBench"]) for s in asked[:3]] == [16, 4 * 4, 6 * 4]  # a fifth for validation
    for own in asked.test.values():
        scores = scoring.answer(model, own, tokenizer, args, visual.shower(asked.pictures, CPU))
        for question, found in zip(own, scores):
            assert question.prompt.count(visual.IMAGE) == model.places
            images = visual.to_input(asked.pictures[[question.picture]])
            for option, score in zip(question.options, found):
                shared = tokenizer.encode(question.prompt)
                tokens = tokenizer.encode(f"{question.prompt} {option}")
                logs = model(torch.tensor([tokens]), images=images)[0].log_softmax(-1)
                right = sum(logs[i - 1, tokens[i]] for i in range(len(shared), len(tokens)))
                assert abs(right - score) < 1e-4
    other = scoring.answer(model, own, tokenizer, args, visual.shower(asked.pictures.flip(0), CPU))
    assert (other - scores).abs().max() > 0.01


def test_a_tokenizer_without_places_for_pictures_is_refused(model, tokenizer):
    visual.require_token(model, tokenizer)
    other = questions.Tokenizer([p for p in tokenizer.pieces if p != visual.IMAGE])
    with pytest.raises(ValueError, match="no token <image>"):
        visual.require_token(model, other)


def test_rotations_share_a_picture_and_others_do_not(model):
    asked = visual.load(settings("scenes", "POPE", "MMBench"), model)
    numbers = [q.picture for q in asked.test["MMBench"]]
    assert len(numbers) == 24 and numbers == sorted(numbers) and len({*numbers}) == 6
    everything = [q.picture for s in asked[:3] for own in s.values() for q in own]
    assert {*everything} == {*range(len(asked.pictures))}
    drawings = scenes.questions("MMBench", "test", 6)
    again = scenes.draw([one.scene for one in drawings[::4]], seed=10 * 6 + 2)
    assert torch.equal(asked.pictures[[*dict.fromkeys(numbers)]], again)


def test_a_batch_mixes_examples_with_a_picture_and_without(model, tokenizer):
    pictures = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    rows = [("two words", 2), ("one", None), ("three", 0)]
    examples = []
    for text, number in rows:
        prompt = visual.asked_with(text, 0 if number is None else model.places)
        examples.append((*questions.encode(Question(prompt, " ", ("red",), 0), tokenizer), number))
    batch = visual.collated(pictures)(examples)
    whole = visual.loss(model, batch, CPU)
    examples.sort(key=lambda one: len(one[0]))  # as `collate` has the rows
    assert [number for *_, number in examples] == [None, 0, 2]
    alone = [visual.loss(model, visual.collated(pictures)([one]), CPU) for one in examples]
    assert abs(whole - sum(alone) / 3) < 1e-5
    parts = [visual.loss(model, tuple(x[i : i + 1] for x in batch), CPU) for i in range(3)]
    assert all(abs(a - b) < 1e-5 for a, b in zip(alone, parts))
    bare = visual.collated(None)([examples[0]])
    assert len(bare) == 2 and abs(visual.loss(model, bare, CPU) - alone[0]) < 1e-5


def test_blind_questions_have_neither_pictures_nor_places(model):
    asked = visual.load(settings("scenes", "GQA", blind=True), model)
    assert asked.pictures is None
    assert all(q.picture is None and visual.IMAGE not in q.prompt for q in asked.test["GQA"])


def test_a_model_without_pictures_is_refused():
    with pytest.raises(ValueError, match="needs a LLaVA"):
        visual.load(settings("scenes", "GQA"), models.LLaMA(vocab=300, **TEXT))


@pytest.mark.parametrize(
    "tasks, changes, named",
    [
        (["GQA"], dict(shots=1201), "1000 training questions, too few for 1001"),
        (["captions"], dict(shots=40_201), "40000 training questions, too few for 40001"),
        (["captions", "GQA"], {}, "without other --tasks"),
        (["GQA"], dict(shots=4), "at least 5"),
        (["colours"], {}, "'colours' is unknown"),
    ],
)
def test_what_scenes_does_not_have_is_refused(tasks, changes, named, model):
    with pytest.raises(ValueError, match=named):
        visual.load(settings("scenes", *tasks, **changes), model)


def test_scenes_are_not_shown_to_a_tower_of_another_size(tokenizer):
    picture = tokenizer.number[visual.IMAGE]
    other = models.LLaVA(TOWER | {"image_size": 16}, picture, vocab=len(tokenizer), **TEXT)
    with pytest.raises(ValueError, match="32 pixels.* reads 16"):
        visual.load(settings("scenes", "GQA"), other)


def test_no_word_of_scenes_is_spelled_in_bytes(model, tokenizer):
    for tasks in (scenes.FAMILIES, visual.TEXTS):
        asked = visual.load(settings("scenes", *tasks, shots=200), model)
        for question in (q for own in asked.train.values() for q in own):
            tokens = tokenizer.encode(question.prompt + question.output)
            assert min(tokens) > tokenizer.end, question
            assert tokenizer.decode(tokens) == question.prompt + question.output


# ------------------------------------------------------------------------------------- scores


def test_ten_annotators_make_an_answer_worth_a_third_each():
    asked = scenes.Asked([], "?", ("a", "b", "c", "d"), ("a",) * 7 + ("b",) * 2 + ("c",))
    question = visual.from_asked(asked, 0)
    assert question.answer == 0 and question.worth == (1.0, 2 / 3, 1 / 3, 0.0)
    scores = torch.tensor([[0.0, 3, 1, 2], [0.0, 1, 3, 3], [0.0, 1, 3, 2]])
    assert torch.allclose(visual.gains(scores, [question] * 3), torch.tensor([2 / 3, 0.0, 1 / 3]))


def test_mmbench_counts_what_is_right_in_all_four_rotations():
    asked = [Question("", "", ("a", "b"), 0, worth=(1.0, 0.0))] * 8
    scores = torch.eye(2)[[0, 0, 0, 0, 0, 0, 1, 0]]
    assert visual.parts("MMBench", scores, asked) == {"MMBench": 0.5}
    assert visual.parts("GQA", scores, asked) == {"GQA": 0.875}
    assert visual.counted("MMBench", scores, asked).tolist() == [1, 0]
    assert visual.counted("GQA", scores, asked).tolist() == [1] * 6 + [0, 1]
    plain = [question._replace(worth=()) for question in asked]  # a folder's task of that name
    assert visual.parts("MMBench", scores, plain) == {"MMBench": 0.875}


def test_an_answer_counts_for_what_it_is_worth():
    asked = [Question("", "", ("a", "b"), 0, worth=(1.0, worth)) for worth in (0.0, 1 / 3)]
    scores = torch.eye(2)[[0, 1]]
    assert torch.allclose(visual.counted("VQAv2", scores, asked), torch.tensor([1, 1 / 3]))


def test_popes_f1_is_that_of_yes():
    worth = {0: (1.0, 0.0), 1: (0.0, 1.0)}
    asked = [Question("", "", ("yes", "no"), i, worth=worth[i]) for i in (0, 0, 0, 1, 1, 1)]
    scores = torch.eye(2)[[0, 0, 1, 0, 1, 1]]  # 2 of 3 found, 1 of 3 said wrongly
    found = visual.parts("POPE", scores, asked)
    assert abs(found["POPE"] - 4 / 6) < 1e-6 and abs(found["POPE F1"] - 2 / 3) < 1e-6
    assert found["POPE random"] == 0.5 and found["POPE adversarial"] == 0.5  # 0 and 3; 2 and 5
    silent = visual.parts("POPE", torch.zeros(6, 2), asked)  # nothing is named
    assert silent["POPE"] == silent["POPE F1"] == 0
    one = visual.parts("POPE", scores[-1:], asked[-1:])  # nothing is yes, and only one is drawn
    assert one == {"POPE": 1.0, "POPE F1": 0.0, "POPE random": 1.0}


@pytest.mark.parametrize("family", scenes.FAMILIES)
def test_a_guess_without_looking_stays_near_chance(family):
    """Chance: the options that fit the kind of question; a constant knows not even that."""
    asked = visual.load(settings("scenes", family, blind=True, shots=None, test_shots=None), None)
    found = visual.guesses(family, asked.train[family], asked.test[family])
    chance = dict(VQAv2=0.22, GQA=0.30, VizWiz=0.27, SQA=0.33, TextVQA=0.13, POPE=0.5, MMBench=0.25)
    assert max(found.values()) < chance[family] + 0.06, found


# ------------------------------------------------------------------------ other people's files


def conversation(*values: str, **more) -> dict:
    turns = [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]
    return {"conversations": turns} | more


@pytest.fixture
def llavas(tmp_path) -> Path:
    folder = tmp_path / "own"
    (folder / "pictures").mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 20), colour).save(folder / "pictures" / f"{name}.png")
    records = [
        conversation("<image>\nWhat colour?", "red", "Really?", "yes", image="pictures/a.png"),
        conversation("What colour?\n<image>", "blue", image="pictures/b.png"),
        conversation("Is there a text without a picture?", "yes"),
    ]
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps(records * 3))
    return folder


def test_llavas_own_json_gives_an_example_per_answer(llavas, model):
    asked = visual.load(settings(str(llavas), "own", shots=None, test_shots=None), model)
    own = asked.test["own"][:4]
    seen = visual.IMAGE * model.places + "\n"
    first = f"USER: {seen}What colour? ASSISTANT:"
    assert [q.prompt for q in own] == [
        first,
        f"{first} red USER: Really? ASSISTANT:",
        f"USER: {seen}What colour? ASSISTANT:",
        "USER: Is there a text without a picture? ASSISTANT:",
    ]
    assert [q.output for q in own] == [" red", " yes", " blue", " yes"]
    assert [q.picture for q in own] == [0, 0, 1, None]
    assert asked.pictures[[0, 1]].shape == (2, 3, 32, 32)
    assert asked.pictures[[1]][0, :, 3, 3].tolist() == [0, 0, 255]
    assert len(asked.train["own"]) + len(asked.val["own"]) == 12


def test_a_conversation_is_not_trained_on_and_validated_with(llavas, model):
    """Its first answer is read again by its second question."""
    says = [conversation(f"What is {i}?", "red", "Really?", "yes") for i in range(10)]
    pictured = conversation("<image> What?", "red", image="pictures/a.png")
    (llavas / "train.json").write_text(json.dumps(says))
    (llavas / "test.json").write_text(json.dumps([*says, pictured]))
    args = settings(str(llavas), "own", shots=None, test_shots=3)
    asked = visual.load(args, model)
    assert [len(split["own"]) for split in (asked.train, asked.val)] == [16, 4]
    first = [{q.prompt.partition("?")[0] for q in split["own"]} for split in asked[:3]]
    assert first[0].isdisjoint(first[1]) and len(first[2]) == 3
    few = visual.load(loop.changed(args, shots=5), model)
    assert [len(split["own"]) for split in (few.train, few.val)] == [8, 2]


@pytest.mark.parametrize(
    "record, named",
    [
        ("text", "conversations"),
        ({"image": "pictures/a.png"}, "conversations"),
        (conversation("<image>What?", image="pictures/a.png"), "in turn"),
        (conversation("<image>What?", "", image="pictures/a.png"), "value"),
        (conversation("What?", "red", image="pictures/a.png"), "0 <image>"),
        (conversation("<image>What?", "red"), "1 <image>"),
        (conversation("<image>What?", "red", image="pictures/c.png"), "c.png"),
        (conversation("<image>What?", "red", image="c" * 300), "names a picture"),
        (conversation("<image>What?", "red", image=["pictures/a.png"]), "no file's name"),
        (conversation("What?", "red <image>", image="pictures/a.png"), "what the human says"),
        (conversation("What?", "half a letter: \ud800"), "no text"),
        ({"conversations": ["junk", *conversation("What?", "red")["conversations"]]}, "in turn"),
    ],
)
def test_a_record_that_is_not_whole_is_named(record, named, llavas, model):
    path = llavas / "train.json"
    path.write_text(json.dumps([*json.loads(path.read_text())[:2], record]))
    with pytest.raises(OSError, match=f"train.json, example 2.*{named}"):
        visual.load(settings(str(llavas), "own"), model)


def test_a_picture_belongs_to_what_is_said_from_it_on(llavas, weights, model, tmp_path):
    record = conversation("Hm?", "red", "<image> This?", "yes", "No?", "no", image="pictures/a.png")
    for split in ("train", "test"):
        (llavas / f"{split}.json").write_text(json.dumps([record] * 5))
    asked = visual.load(settings(str(llavas), "own", shots=None, test_shots=3), model)
    own = [q for split in asked[:3] for q in split["own"]]
    assert {(q.output, q.picture) for q in own} == {(" red", None), (" yes", 0), (" no", 0)}
    assert all((visual.IMAGE in q.prompt) == (q.picture == 0) for q in own)
    flags = ["--data", llavas, "--weights", weights, "--epochs", 1, "--device", "cpu"]
    assert command(*flags, "--out", tmp_path / "run") == 0


def test_a_file_that_is_no_picture_is_named(llavas, model):
    args, path = settings(str(llavas), "own", shots=None), llavas / "pictures" / "b.png"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # its header is there
    asked = visual.load(args, model)
    with pytest.raises(OSError, match="b.png is not a picture"):
        asked.pictures[[0, 1]]
    path.write_text("no picture")
    with pytest.raises(OSError, match="b.png is not a picture"):
        visual.load(args, model)


@pytest.fixture
def easy(tmp_path) -> Path:
    root = tmp_path / "easy"
    for split, pictures in (("train", 41), ("test", 2)):
        (root / split / "images").mkdir(parents=True)
        asked = []
        for i in range(pictures):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(root / split / "images" / f"{i}.png")
            asked += [["what color is the shape?", ("red", "blue")[i % 2], i]]
            asked += [["is there a red shape?", ("yes", "no")[i % 2], i]]
        (root / split / "questions.json").write_text(json.dumps(asked))
    return root


def test_easy_vqas_files_give_yes_no_and_open_questions_apart(easy, model):
    args = settings("easy-vqa", *visual.EASY_TASKS, data_dir=easy, shots=None)
    asked = visual.load(args, model)
    assert asked.test["open"][0].options == ("blue", "red")
    assert asked.test["yes/no"][1].output == " no"
    assert [len(asked.val[t]) for t in args.tasks] == [3, 3]  # pictures 0, 20 and 40
    assert [len(asked.train[t]) for t in args.tasks] == [38, 38]
    held = {q.picture for own in asked.val.values() for q in own}
    assert held.isdisjoint(q.picture for own in asked.train.values() for q in own)
    reds = asked.pictures[[q.picture for q in asked.val["open"]]][:, 0, 0, 0]
    assert sorted(reds.tolist()) == [0, 20, 40]


def test_easy_vqas_broken_files_are_named(easy, model):
    args = settings("easy-vqa", "open", data_dir=easy, shots=None)
    (easy / "train" / "images" / "7.png").unlink()
    with pytest.raises(OSError, match="7.png"):
        visual.load(args, model)
    path = easy / "train" / "questions.json"
    path.write_text('[["what?", "red"]]')
    with pytest.raises(OSError, match="questions.json, example 0"):
        visual.load(args, model)
    path.write_text('[["half a letter: \\ud800", "red", 0]]')
    with pytest.raises(OSError, match="questions.json, example 0"):
        visual.load(args, model)
    path.unlink()
    with pytest.raises(OSError, match="--data-dir"):
        visual.load(args, model)


@pytest.mark.parametrize("split, left", [("train", "yes"), ("test", "yes"), ("test", "red")])
def test_a_task_of_easy_vqa_without_questions_or_with_one_answer_is_named(split, left, easy):
    path = easy / split / "questions.json"
    path.write_text(json.dumps([q for q in json.loads(path.read_text()) if q[1] == left]))
    if left == "red":
        shutil.copy(path, easy / "train" / "questions.json")
    with pytest.raises(OSError, match="too few questions of the task 'open'"):
        visual.load(settings("easy-vqa", "open", data_dir=easy, shots=None, blind=True), None)
    assert command_of(visual)("easy-vqa", "--data-dir", easy) == 1


@pytest.mark.parametrize("below", ["", "data", "easy_vqa/data", "easy-vqa/easy_vqa/data"])
def test_easy_vqa_is_found_at_or_below_the_folder(below, easy, model, tmp_path):
    folder = tmp_path / "root" / below
    folder.parent.mkdir(parents=True, exist_ok=True)
    easy.rename(folder)
    args = settings("easy-vqa", "open", data_dir=tmp_path / "root", shots=None)
    assert len(visual.load(args, model).test["open"]) == 2


# ---------------------------------------------------------------------------------- methods, runs


@pytest.mark.parametrize("method", [*train_lm.METHODS, "projector"])
@pytest.mark.parametrize("tower", [False, True])
def test_the_projector_is_trained_and_the_tower_is_frozen_unless_asked_for(method, tower, model):
    own = copy.deepcopy(model)
    args = argparse.Namespace(
        tower=tower, wiring="san", mode="both", norms=True, shift=False, gamma_std=0.0, rank=2
    )
    args.alpha, args.blind = None, False
    methods.adapt(own, method, args)
    trained = {name for name, p in own.named_parameters() if p.requires_grad}
    projector = {name for name, _ in model.named_parameters() if name.startswith("projector")}
    assert projector <= trained
    of_tower = {name for name in trained if name.startswith("tower.")}
    assert bool(of_tower) == (tower and method not in ("linear", "projector"))
    assert (trained == projector) == (method == "projector")


@pytest.mark.parametrize("data", [["scenes", "--blind"], ["microworld"]], ids=len)
@pytest.mark.parametrize("method", train_lm.METHODS)
def test_texts_alone_train_what_a_text_goes_through(method, data, model):
    """All that is trained has a gradient, else a checkpoint has no state of it to go on from."""
    args = loop.changed(train_lm.arguments(["--data", *data, "--method", method]), rank=2)
    own = train_lm.adapt(copy.deepcopy(model), args)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    visual.loss(own, (tokens, tokens), CPU).backward()
    assert all((p.grad is not None) == p.requires_grad for p in own.parameters())


def test_the_projector_has_a_rate_of_its_own(model):
    args = argparse.Namespace(lr=0.03, projector_lr=0.003, weight_decay=0.1)
    names = {p: name for name, p in model.named_parameters()}
    for group in loop.groups_of(model, args):
        own = {names[p].startswith("projector.") for p in group["params"]}
        assert own == {abs(group["share"] - 0.1) < 1e-9}
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    args.projector_lr = None
    assert [group["share"] for group in loop.groups_of(model, args)] == [1.0, 1.0]


@pytest.fixture(scope="module")
def flags(weights) -> list:
    flags = ["--data", "scenes", "--tasks", "VQAv2", "MMBench", "--weights", weights]
    few = ["--shots", 20, "--test-shots", 6, "--epochs", 2, "--batch-size", 8]
    return [*flags, *few, "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    assert command(*flags, "--out", out) == 0
    return out


def test_a_run_merges_exactly_shows_its_pictures_and_is_scored_again(finished, capsys):
    result = metrics(finished)[-1]
    assert result["merge_difference"] < 1e-3 and result["parts"].keys() == {"VQAv2", "MMBench"}
    with Image.open(finished / "VQAv2.png") as image:
        assert image.size == (256, 256)
    assert not (finished / "merged").exists()
    assert command("--evaluate", finished, "--device", "cpu") == 0
    assert f"{100 * result['test_merged']:.2f} %" in capsys.readouterr().out


def test_a_merged_llava_is_loaded_and_trained_on(finished, flags, tmp_path):
    again = [finished if str(f).endswith("tiny.pt") else f for f in flags]
    again = [finished / "merged.pt" if f == finished else f for f in again]
    assert command(*again, "--method", "full", "--tower", "--out", tmp_path / "run") == 0


def test_an_interrupted_run_goes_on_to_the_same_end(flags, finished, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert command(*flags, "--out", out) == 130
    assert command(*flags, "--out", out, "--resume") == 0
    assert without_times(metrics(out)) == without_times(metrics(finished))


def test_captions_are_learned_word_by_word_blind_as_well(weights, tmp_path, capsys):
    flags = ["--data", "scenes", "--tasks", "captions", "descriptions", "--weights", weights]
    flags += ["--shots", 12, "--test-shots", 6, "--epochs", 1, "--device", "cpu"]
    for more in (["--method", "projector"], ["--method", "full", "--blind"]):
        out = tmp_path / more[1]
        assert command(*flags, *more, "--out", out) == 0
        assert metrics(out)[-1]["perplexity"] > 1
        assert (out / "captions.png").exists() == ("--blind" not in more)


def test_frozen_weights_may_be_bfloat16_and_what_is_trained_is_not(flags, tmp_path):
    assert command(*flags, "--dtype", "bfloat16", "--out", tmp_path) == 0
    state = san.read(tmp_path / "merged.pt")["state_dict"]
    assert state["blocks.0.attn.q_proj.weight"].dtype == torch.bfloat16
    assert state["projector.fc1.weight"].dtype == torch.float32


@pytest.mark.parametrize("words", [["--tower"], ["--blind"], ["--method", "projector"]])
def test_flags_about_pictures_go_with_pictures(words, capsys):
    assert command(*words) == 2
    assert "pictures" in capsys.readouterr().err
    assert words == ["--blind"] or command("--data", "scenes", "--blind", *words) == 2


@pytest.mark.parametrize("method", ["linear", "projector"])
def test_what_trains_no_tower_takes_no_flag_to(method, capsys):
    assert command("--data", "scenes", "--tower", "--method", method) == 2
    assert f"--tower changes nothing in --method {method}" in capsys.readouterr().err


def test_a_folder_of_easy_vqa_goes_with_easy_vqa(capsys):
    for script, data in ((train_lm, ["--data", "scenes"]), (visual, ["scenes"])):
        assert command_of(script)(*data, "--data-dir", "somewhere") == 2
        assert "--data-dir goes with" in capsys.readouterr().err


def test_texts_have_no_option_that_could_be_named(flags, tmp_path, capsys):
    captions = [*flags, "--tasks", "captions", "--score", "generate", "--out", tmp_path / "run"]
    assert command(*captions) == 2
    assert "--score generate is for questions with options" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tower", [{}, {"depth": "2"}, TOWER | {"depth": 10**9}, [TOWER], 8])
def test_a_saved_llava_whose_tower_is_broken_is_refused(tower, model, tokenizer):
    with pytest.raises(ValueError):
        train_lm.restored(model.state_dict(), model.config | {"tower": tower}, tokenizer.pieces)


def test_an_interrupted_blind_run_goes_on(flags, tmp_path, monkeypatch):
    blind = [*flags, "--blind", "--method", "full", "--out", tmp_path]
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert command(*blind) == 130
    assert command(*blind, "--resume") == 0


def test_captions_alone_have_no_prompt_and_are_learned_blind(weights, tmp_path):
    flags = ["--data", "scenes", "--tasks", "captions", "--blind", "--weights", weights]
    flags += ["--shots", 12, "--test-shots", 6, "--epochs", 1, "--device", "cpu"]
    assert command(*flags, "--out", tmp_path) == 0


def test_llavas_own_json_without_a_picture_asks_for_blind(llavas, model):
    for split in ("train", "test"):
        (llavas / f"{split}.json").write_text(json.dumps([conversation("What?", "red")] * 9))
    args = settings(str(llavas), "own", shots=None, test_shots=None)
    with pytest.raises(OSError, match="give --blind"):
        visual.load(args, model)
    args.blind = True
    assert len(visual.load(args, model).test["own"]) == 9


@pytest.mark.parametrize("split", ["train", "test"])
def test_llavas_own_json_without_one_of_its_files_names_it(split, llavas, weights, capsys):
    path = llavas / f"{split}.json"
    path.unlink()
    assert command("--data", llavas, "--weights", weights, "--device", "cpu") == 1
    assert f"there is no file {path}; give a folder" in capsys.readouterr().err


def test_llavas_own_json_trains_and_is_scored_again(llavas, weights, tmp_path, capsys):
    flags = ["--data", llavas, "--weights", weights, "--epochs", 1, "--device", "cpu"]
    assert command(*flags, "--out", tmp_path / "run") == 0
    result = metrics(tmp_path / "run")[-1]
    assert command("--evaluate", tmp_path / "run", "--device", "cpu") == 0
    again = f"{100 * result['test_merged']:.2f} %, perplexity {result['perplexity']:.3f}"
    assert again in capsys.readouterr().out


def test_generated_answers_are_scored_too(finished, flags):
    assert command("--evaluate", finished, "--score", "generate", "--device", "cpu") == 0


def test_the_tower_of_an_untrained_model_is_sprites_own(tokenizer):
    if not visual.TOWER.exists():
        pytest.skip("weights/vit_micro.pt is not there")
    model, state = visual.untrained(tokenizer), san.read(visual.TOWER)["state_dict"]
    images = torch.randn(2, 3, 32, 32)
    source = models.build("vit_micro", 50)
    own = {k: v.float() for k, v in state.items() if not k.startswith("head")}
    source.load_state_dict(own, strict=False)
    assert torch.equal(model.tower.stream(images), source.stream(images))
    assert sum(p.numel() for p in model.parameters()) * 2 < 6e6  # bytes, in half precision


def test_comparing_methods_goes_as_it_does_on_texts(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train_lm, "LEARNING_RATES", {"san": (1e-2,), "lora": (1e-2,)})
    out = tmp_path / "table"
    assert command(*flags, "--compare", "--seeds", 1, "--out", out) == 0
    run = tables.read_results(out / "results.jsonl")[-1]
    assert run["parts"].keys() == {"VQAv2", "MMBench"}
    worth = {task: paired.unpack(text) for task, text in run["parts_right"].items()}
    means = {task: of.double().mean().item() for task, of in worth.items()}
    assert len(worth["MMBench"]) == 6 and means == pytest.approx(run["parts"])
    *_, long, beside_san, note = (out / "table.md").read_text().strip().split("\n\n")
    differs = {row.split(" | ")[1]: "[" in row for row in long.splitlines() if "| lora |" in row}
    assert differs == {"VQAv2": True, "MMBench": True} and "| tiny | lora | 2 |" in beside_san
    shutil.rmtree(out)
