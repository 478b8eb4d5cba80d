"""The training script as a user meets it: what it writes, resumes, compares and refuses."""

import json
import pickle
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from running import (
    command_of,
    metrics,
    require_same_end_after_stop,
    stop_after,
    without_times,
)
from tiny import published_vit, randomise

import models
import san
import train_lm
import train_vision
from lab import batches, checkpoints, loop, methods, paired, tables, variants
from lab import pictures as sets

ROOT = Path(__file__).parent.parent


command = command_of(train_vision)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A folder data set of two classes, reddish and bluish noise: 40 for training, 12 to test."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("test", 6)):
        for channel, name in ((0, "red"), (2, "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 128, (32, 32, 3), generator=generator, dtype=torch.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return root


@pytest.fixture
def flags(pictures) -> list:
    """A run of seconds: two epochs of a micro model on the little folder, on the CPU."""
    flags = [
        "--dataset",
        pictures,
        "--model",
        "vit_micro",
        "--weights",
        ROOT / "weights/vit_micro.pt",
    ]
    return [*flags, "--epochs", 2, "--batch-size", 8, "--device", "cpu", "--workers", 0]


# ------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("method", train_vision.METHODS)
def test_a_run_saves_a_model_that_scores_the_same_again(method, flags, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(*flags, "--method", method, "--out", out) == 0
    printed = capsys.readouterr().out
    saved = {"linear": "merged.pt", "full": "model.pt"}.get(method, "merged.pt")
    names = {"config.json", "metrics.jsonl", saved} | (
        {"adapter.pt"} - {"adapter.pt" * (method == "full")}
    )
    assert {path.name for path in out.iterdir()} == names
    result = metrics(out)[-1]
    assert result["test"] == result["test_merged"] and result["merge_difference"] < 1e-4
    assert f"{100 * result['test']:.2f} %" in printed
    assert command("--evaluate", out, "--device", "cpu", "--workers", 0) == 0
    assert f"{100 * result['test']:.2f} %" in capsys.readouterr().out


def test_a_run_is_scored_again_on_the_pictures_it_was_made_with(flags, pictures, tmp_path, capsys):
    named = ["--dataset", pictures.name, "--data-dir", pictures.parent]
    assert command(*flags, *named, "--out", tmp_path / "run") == 0
    assert command("--evaluate", tmp_path / "run") == 0
    assert f"{100 * metrics(tmp_path / 'run')[-1]['test']:.2f} %" in capsys.readouterr().out
    assert command("--evaluate", tmp_path / "run", "--data-dir", tmp_path) == 2
    assert "config.json has it" in capsys.readouterr().err


def test_the_saved_model_has_the_base_models_keys_and_the_adapter_is_small(flags, tmp_path):
    assert command(*flags, "--out", tmp_path) == 0
    saved = san.read(tmp_path / "merged.pt")
    base = models.build("vit_micro", 2)
    assert {k: v.shape for k, v in saved["state_dict"].items()} == {
        k: v.shape for k, v in base.state_dict().items()
    }
    assert (tmp_path / "adapter.pt").stat().st_size < 100_000


def test_the_adapter_on_a_fresh_base_is_the_merged_model(flags, tmp_path):
    assert command(*flags, "--out", tmp_path) == 0
    model = models.build("vit_micro", 2)
    checkpoints.load_backbone(model, san.read(ROOT / "weights/vit_micro.pt")["state_dict"])
    san.load_adapter(model, tmp_path / "adapter.pt")
    merged = models.build("vit_micro", 2)
    checkpoints.load_backbone(merged, san.read(tmp_path / "merged.pt")["state_dict"], head=True)
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(merged(images), model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vit_micro", "convnext_micro", "swin_micro"])
def test_the_main_job_runs_offline_on_the_embedded_data_and_learns(name, tmp_path):
    assert command("--model", name, "--epochs", 3, "--out", tmp_path, "--device", "cpu") == 0
    result = metrics(tmp_path)[-1]
    assert result["test"] > 1.5 / 6 and result["test_linear"] > 1 / 6


def test_the_same_seed_gives_the_same_result_and_another_seed_another(flags, tmp_path):
    results = []
    for run, seed in enumerate((0, 0, 1)):
        assert command(*flags, "--seed", seed, "--out", tmp_path / str(run)) == 0
        results.append(without_times(metrics(tmp_path / str(run)))[0])
    assert results[0] == results[1] != results[2]


def test_full_without_weights_is_pretraining_and_weights_takes_its_model(flags, tmp_path):
    pre, out = tmp_path / "pre", tmp_path / "out"
    assert command(*flags, "--method", "full", "--weights", "none", "--out", pre) == 0
    assert command(*flags, "--weights", pre / "model.pt", "--out", out) == 0


@pytest.mark.parametrize(
    "words", [["--mode", "propagation"], ["--wiring", "authors"], ["--no-shift"], ["--shots", "20"]]
)
def test_variants_run(words, flags, tmp_path):
    assert command(*flags, *words, "--out", tmp_path) == 0


def test_imagenet1k_takes_torchvisions_file_from_the_hub_cache(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    theirs = torchvision.models.convnext_tiny().eval()
    url = torchvision.models.get_weight(checkpoints.IMAGENET1K["convnext_tiny"]).url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(theirs.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    args = train_vision.arguments(
        [*map(str, flags), "--weights", "imagenet1k", "--image-size", "64"]
    )
    ours = train_vision.load_model(args, "convnext_tiny", [5]).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.classifier[0](theirs.features(images).mean((2, 3), keepdim=True))
        torch.testing.assert_close(ours.features(images), expected.flatten(1), atol=1e-4, rtol=1e-4)


def test_imagenet21k_takes_the_authors_file_from_the_hub_cache_end_to_end(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("a download"))
    address = "https://example.org/ViT-micro.npz"
    monkeypatch.setattr(checkpoints, "IMAGENET21K", {"vit_micro": address})
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    source = randomise(models.build("vit_micro", 2))
    np.savez(folder / "ViT-micro.npz", **published_vit(source))
    words = [*flags, "--weights", "imagenet21k", "--epochs", 1]
    ours = train_vision.load_model(train_vision.arguments(list(map(str, words))), "vit_micro", [5])
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = source.features(images)
        torch.testing.assert_close(ours.features(images), expected, atol=1e-4, rtol=0)
    assert command(*words, "--out", tmp_path / "run") == 0
    result = metrics(tmp_path / "run")[-1]
    assert result["test"] == result["test_merged"]


def test_imagenet1k_without_a_network_says_where_to_put_the_file(
    flags, tmp_path, monkeypatch, capsys
):
    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr("torch.hub.urlopen", no_network)
    words = ["--weights", "imagenet1k", "--model", "convnext_tiny", "--out", tmp_path / "run"]
    assert command(*flags, *words) == 1
    error = capsys.readouterr().err
    assert "https://" in error and str(tmp_path / "hub" / "checkpoints") in error
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method", ["san", "lora", "full"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    method, flags, tmp_path, monkeypatch, capsys
):
    require_same_end_after_stop(command, [*flags, "--method", method], tmp_path, monkeypatch)
    message = capsys.readouterr().err
    assert "epoch 2 is kept" in message and "--resume" in message


def test_a_pretrained_backbone_is_averaged_and_resumed_and_adapted(
    pictures, tmp_path, monkeypatch, capsys
):
    root = tmp_path / "pictures"  # a fiftieth of 60 is one, to validate
    for split in ("train", "test"):
        for file in sorted((pictures / split).rglob("*.png")):
            for copy in range(2 if split == "train" else 1):
                place = root / split / file.parent.name / f"{copy}-{file.name}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file)
    flags = ["--dataset", root, "--model", "convnext_mini", "--device", "cpu", "--workers", 0]
    words = [*flags, "--pretrain", "--epochs", 3, "--batch-size", 16, "--lr", "1e-3"]
    assert command(*words, "--out", tmp_path / "whole") == 0
    assert "79 training, 1 validation" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert command(*words, "--out", tmp_path / "parts") == 130
    kept = san.read(tmp_path / "parts" / "checkpoint.pt")
    assert kept["mean"]["n_averaged"] == 10  # two epochs of five steps
    assert command(*words, "--out", tmp_path / "parts", "--resume") == 0
    assert without_times(metrics(tmp_path / "whole")) == without_times(metrics(tmp_path / "parts"))
    whole, parts = (
        san.read(tmp_path / run / "model.pt")["state_dict"] for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert command("--evaluate", tmp_path / "whole") == 0
    words = [*flags, "--epochs", 1, "--weights", tmp_path / "whole" / "model.pt"]
    assert command(*words, "--out", tmp_path / "adapted") == 0


def test_a_resumed_run_draws_the_same_pictures_where_workers_load_them(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(sets, "MOST_KEPT", 0)  # bytes: nothing is kept, all is decoded when asked
    require_same_end_after_stop(command, [*flags, "--workers", 2], tmp_path, monkeypatch)


def test_resume_refuses_other_settings(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        assert command(*flags, "--out", tmp_path) == 130
    config = (tmp_path / "config.json").read_text()
    assert command(*flags, "--out", tmp_path, "--resume", "--seed", 5) == 2
    assert "made with seed = 0, not 5" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == config


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_epoch(
    flags, tmp_path, monkeypatch, capsys
):
    loss, calls = batches.factor_loss, []

    def breaks_later(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 12 else 1)

    monkeypatch.setattr(train_vision, "probe", lambda model, *_: (model.head, []))
    monkeypatch.setattr(train_vision, "factor_loss", breaks_later)
    assert command(*flags, "--epochs", 5, "--out", tmp_path) == 1
    assert "try a smaller --lr" in (message := capsys.readouterr().err) and "is kept" in message
    kept = san.read(tmp_path / "checkpoint.pt")
    assert len(kept["history"]) >= 1
    assert all(value.isfinite().all() for value in kept["model"].values())


def test_a_learning_rate_far_too_high_is_one_sentence_and_exit_code_1(flags, tmp_path, capsys):
    assert command(*flags, "--method", "full", "--lr", "1e30", "--out", tmp_path) == 1
    assert "no longer a finite number" in capsys.readouterr().err
    assert not (tmp_path / "model.pt").exists()


# ------------------------------------------------------------------------------------ comparison


def test_compare_writes_one_row_a_method_and_does_nothing_twice(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "WIDEN", 0)
    words = [*flags, "--epochs", 1, "--compare", "--seeds", 2, "--out", tmp_path]
    assert command(*words) == 0
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {method} |" in table for method in train_vision.LEARNING_RATES)
    assert "--compare" in table.splitlines()[0] and "±" in table
    lines = tables.read_results(tmp_path / "results.jsonl")
    for method in train_vision.LEARNING_RATES:
        own = [line for line in lines if line["method"] == method]
        tried = {line["lr"]: line["val"] for line in own if line["part"] == "search"}
        scored = [line for line in own if line["part"] == "test"]
        assert len(tried) == 4 and len(scored) == 2
        assert tried[scored[0]["lr"]] == max(tried.values()) == scored[0]["val"]
        for line in scored:
            right = paired.unpack(line["right"])
            assert len(right) == 12 and right.double().mean() == pytest.approx(line["test"])
            assert line["wall"] > line["seconds"]
    counts = {line["method"]: line["trainable"] for line in lines}
    low_rank = [counts[method] - counts["linear"] for method in ("lora, r=1", "lora")]
    assert low_rank[1] == 8 * low_rank[0] > 0
    assert "| verdict |" in table and "| data to decide |" in table
    monkeypatch.setattr(train_vision, "train", lambda *_: pytest.fail("trained again"))
    assert command(*words) == 0
    assert (tmp_path / "table.md").read_text() == table


def test_methods_share_out_a_comparison_and_its_cost_is_told_first(
    flags, tmp_path, monkeypatch, capsys
):
    words = [*flags, "--epochs", 1, "--compare", "--seeds", 1, "--lr", "1e-3", "--out", tmp_path]
    assert command(*words, "--methods", "san", "ssf") == 0
    printed = capsys.readouterr().out
    told = printed.index("about 4 runs of 1 epochs, ")
    assert "s per step of vit_micro" in printed and told < printed.index("trains")
    assert command(*words, "--methods", "linear", "ssf") == 0
    printed = capsys.readouterr().out
    assert "about 2 runs" in printed and "s per run of vit_micro so far" in printed
    lines = tables.read_results(tmp_path / "results.jsonl")
    assert [line["method"] for line in lines] == ["san"] * 2 + ["ssf"] * 2 + ["linear"] * 2
    monkeypatch.setattr(train_vision, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(train_vision, "LEARNING_RATES", dict.fromkeys(("san", "ssf", "linear")))
    assert command(*words) == 0  # lines count for the whole comparison
    assert "runs of 1 epochs" not in capsys.readouterr().out


def test_the_time_of_a_step_is_that_of_a_run_with_its_steps(flags):
    args = train_vision.arguments([*map(str, flags), "--compare"])
    args.device, args.amp = torch.device("cpu"), False
    tasks = sets.tasks_named(args)
    seconds, steps = train_vision.time_step(tasks, "vit_micro", ["full"], args)
    assert steps == 2 * 4  # epochs, and batches of 32 pictures
    assert 0 < seconds < 60
    missing = sets.Task("gone", loop.changed(args, dataset="dmlab"), None)
    assert train_vision.time_step([missing, *tasks], "vit_micro", ["san"], args)[1] == steps
    with pytest.raises(ValueError, match="dmlab cannot be downloaded"):
        train_vision.time_step([missing], "vit_micro", ["san"], args)


def test_a_set_of_several_factors_has_no_single_right():
    split = torch.utils.data.TensorDataset(torch.zeros(3, 5), torch.zeros(3, 2, dtype=torch.long))
    data = sets.Data(None, None, None, split, [3, 2])
    args = loop.changed(train_vision.arguments([]), device=torch.device("cpu"))
    scores = train_vision.test(torch.nn.Identity(), data, args)[1]
    assert scores == {"test": 1.0, "factors": [1.0, 1.0]}


def test_flags_that_some_methods_read_are_taken_for_those_for_comparisons_and_for_older_runs(
    tmp_path,
):
    words = {"norms": ["--no-norms"], "shift": ["--no-shift"], "gamma_std": ["--gamma-std", "1"]}
    words |= {"mode": ["--mode", "feature"], "wiring": ["--wiring", "authors"]}
    words |= {name: [f"--{name}", "4"] for name in ("rank", "alpha", "prompts")}
    assert words.keys() == methods.READERS.keys()
    for name, flag in words.items():
        for method in {*train_vision.METHODS} & {*methods.READERS[name]}:
            assert train_vision.arguments([*flag, "--method", method]).out
        for other in (["--compare"], ["--resume"]):
            train_vision.arguments([*flag, "--method", "linear", *other])


@pytest.mark.parametrize("method", train_vision.METHODS)
def test_a_setting_that_the_table_says_a_method_does_not_read_changes_nothing_in_it(method):
    def adapted(**changes) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = models.build("vit_micro", 2)
        methods.adapt(model, method, loop.changed(plain, **changes))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand(parameter.shape) / 10)
            outputs = model.eval()(torch.randn(2, 3, 32, 32))
        return methods.trained_state(model) | {"outputs": outputs}

    plain = train_vision.arguments([])
    other = {"mode": "feature", "wiring": "authors", "norms": False, "shift": False}
    other |= {"gamma_std": 0.1, "rank": 4, "alpha": 4.0, "prompts": 4}
    for name, value in other.items():
        one, two = adapted(), adapted(**{name: value})
        same = one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert same == (method not in methods.READERS[name]), name


def test_the_ablation_compares_the_variants_that_a_model_can_have(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "WIDEN", 0)
    assert command(*flags, "--epochs", 1, "--ablation", "--seeds", 1, "--out", tmp_path) == 0
    lines = tables.read_results(tmp_path / "results.jsonl")
    assert [*dict.fromkeys(line["method"] for line in lines)] == [*variants.FLAGS]
    counts = {line["method"]: line["trainable"] for line in lines}
    gammas = sum(len(p) for k, p in norms_and_gammas() if k.endswith("gamma"))
    norms = sum(len(p) for k, p in norms_and_gammas() if "norm" in k)
    assert counts["both, shift (SAN)"] - counts["both"] == gammas  # each layer has a bias
    assert counts["both, shift (SAN)"] - counts["SAN, norms frozen"] == norms
    for same in ("feature, shift", "SAN, γ from N(1, 0.02)", "SAN, authors' wiring"):
        assert counts[same] == counts["both, shift (SAN)"]
    assert counts["feature"] == counts["both"] > counts["propagation"]  # no γ that nothing reads
    values = {line["method"]: line["merge_difference"] for line in lines if line["part"] == "test"}
    assert max(values.values()) < 1e-4


def norms_and_gammas() -> list[tuple[str, torch.Tensor]]:
    model = models.build("vit_micro", 2)
    methods.adapt(model, "san", train_vision.arguments([]))
    return list(model.named_parameters())


def test_the_protocol_chooses_on_the_fifth_and_then_trains_on_all(
    flags, tmp_path, monkeypatch, capsys
):
    sizes, fit = [], loop.fit

    def recorded(model, loader, loss_of, validate, args, *rest, **more):
        sizes.append((len(loader.dataset), validate is not None, args.lr, args.seed))
        return fit(model, loader, loss_of, validate, args, *rest, **more)

    take = sets.take
    monkeypatch.setattr(sets, "take", lambda data, shots: take(data, shots // 25))
    monkeypatch.setattr(loop, "fit", recorded)
    monkeypatch.setattr(tables, "WIDEN", 0)
    monkeypatch.setattr(tables, "announce", lambda *_: None)
    words = [*flags, "--epochs", 1, "--protocol", "vtab1k", "--seeds", 2, "--out", tmp_path]
    assert command(*words) == 0
    printed = capsys.readouterr().out
    assert "learning rates for san: 0.001, 0.003, 0.01, 0.03" in printed
    assert "32 + 8 labelled" in printed
    assert sizes[:4] == [(32, True, rate, 0) for rate in train_vision.LEARNING_RATES["san"]]
    tried = tables.read_results(tmp_path / "results.jsonl")[:4]
    best = tables.choice({line["lr"]: line["val"] for line in tried})
    assert sizes[4:] == [(40, False, best, seed) for seed in (0, 1)]
    assert command(*words, "--method", "linear") == 0  # to the same file
    assert capsys.readouterr().out.count("| linear |") == 2
    assert command("--table", tmp_path / "results.jsonl") == 0
    table = capsys.readouterr().out
    assert table.count("| linear |") == table.count("| san |") == 3  # now there is SAN to compare
    assert command("--table", tmp_path, "--seeds", 0) == 0
    assert capsys.readouterr().out.count("| linear |") == 1  # validation alone
    assert train_vision.arguments(["--dataset", "vtab"]).protocol == "vtab1k"
    assert train_vision.arguments(["--dataset", "vtab"]).epochs == 100


def test_a_suite_runs_what_there_is_and_says_what_it_left_out(
    flags, pictures, tmp_path, monkeypatch, capsys
):
    """Two tasks of VTAB as folders; the others are not to be downloaded here."""
    for task in ("resisc45", "dmlab"):
        (tmp_path / task).symlink_to(pictures)
    names = {"resisc45", "dmlab", "kitti_dist", "dtd"}

    def no_network(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    some = {name: entry for name, entry in sets.VTAB.items() if name in names}
    monkeypatch.setattr(sets, "VTAB", some)
    monkeypatch.setitem(sets.SUITES, "vtab", some)
    take = sets.take
    monkeypatch.setattr(sets, "take", lambda data, shots: take(data, shots // 25))
    words = [*flags[2:], "--dataset", "vtab", "--data-dir", tmp_path, "--epochs", 1, "--seeds", 1]
    assert command(*words, "--out", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert "left out: kitti_dist" in printed and "left out: dmlab" not in printed
    assert "left out: dtd" in printed and "could not" in printed  # there is no network
    header = "| model | method | trained | resisc45 | dmlab | specialised | structured | mean |"
    assert header in (tmp_path / "out" / "table.md").read_text()
    monkeypatch.setattr(train_vision, "train", lambda *_: pytest.fail("trained again"))
    assert command(*words, "--out", tmp_path / "out") == 0
    words[words.index("--data-dir") + 1] = tmp_path / "nothing"
    assert command(*words, "--out", tmp_path / "none") == 1
    assert "could not open or download dtd" in capsys.readouterr().err


def test_pictures_of_runs_and_of_a_comparison(flags, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="it draws the pictures")
    runs = [tmp_path / "san", tmp_path / "full"]
    assert command(*flags, "--out", runs[0]) == 0
    assert command(*flags, "--method", "full", "--weights", "none", "--out", runs[1]) == 0
    table = ["--epochs", 1, "--seeds", 1, "--lr", "1e-3", "--out", tmp_path / "table"]
    assert command(*flags, *table, "--compare") == 0
    capsys.readouterr()
    results = tmp_path / "table" / "results.jsonl"
    assert command("--plot", *runs, results, "--out", tmp_path / "out") == 0
    names = ["curves.png", "accuracy.png", "forest.png", "gamma.png", "change.png"]
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"saved {tmp_path / 'out' / name}" for name in names]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*names}
    assert command("--plot", runs[1], "--out", tmp_path / "one") == 0  # no base to compare with
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"curves.png"}
    assert command("--plot", tmp_path / "nothing") == 1
    assert "no finished run" in capsys.readouterr().err
    assert command("--plot", runs[1], "--no-shift") == 2
    assert "--plot does not read --no-shift; leave it out" in capsys.readouterr().err


def test_what_is_no_run_is_not_scored(tmp_path, capsys):
    for script in (train_vision, train_lm):
        assert command_of(script)("--evaluate", tmp_path / "nowhere") == 1
        said = "nowhere is no finished run that can be scored: it has no config.json"
        assert said in capsys.readouterr().err
    for script, other in ((train_vision, "data"), (train_lm, "dataset")):
        (tmp_path / "config.json").write_text(json.dumps({other: "scenes"}))
        assert command_of(script)("--evaluate", tmp_path) == 1
        its = "train_lm.py" if script is train_vision else "train_vision.py"
        assert f"it is a run of {its}; give it to that" in capsys.readouterr().err


def test_tables_of_files_that_are_missing_or_empty_are_refused(tmp_path, capsys):
    assert command("--table", path := tmp_path / "results.jsonl") == 1
    assert "there is no file" in capsys.readouterr().err
    path.write_text("")
    assert command("--table", path) == 2
    assert "no run to tabulate" in capsys.readouterr().err
    assert command("--table", ROOT / "README.md") == 2
    assert "README.md is no results.jsonl; give a comparison's folder" in capsys.readouterr().err


@pytest.mark.parametrize("script", [train_vision, train_lm])
def test_help_tells_of_every_flag_and_of_no_default_none(script, capsys):
    with pytest.raises(SystemExit):
        script.arguments(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "default: None" not in said and "default: False" not in said
    assert "0 … 9999 (default: 0)" in said and "says what each is (default: san)" in said
    assert all(f" {row};" in said or f" {row} --table" in said for row in script.LEARNING_RATES)


# ------------------------------------------------------------------------------------- bad input


class RunsCode:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_weights(kind: str, folder: Path) -> Path:
    path = folder / "weights.pt"
    if kind == "truncated":
        whole = (ROOT / "weights/vit_micro.pt").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "other architecture":
        torch.save({"state_dict": models.build("convnext_micro", 2).state_dict()}, path)
    elif kind == "other size":
        torch.save(models.ViT(2, 32, patch=4, dim=24, depth=1, heads=2).state_dict(), path)
    elif kind == "code":
        path.write_bytes(pickle.dumps(RunsCode(folder / "executed"), protocol=2))
    elif kind == "no weights":
        torch.save({"epoch": 3}, path)
    return path


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("missing", 1, "there is no file"),
        ("truncated", 1, "broken"),
        ("other architecture", 2, "another architecture: class_token"),
        ("other size", 2, "1×1×24 in the file, 1×1×96 in the model"),
        ("code", 1, "refused"),
        ("no weights", 2, "no state dict"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(kind, code, words, flags, tmp_path, capsys):
    path = bad_weights(kind, tmp_path)
    assert command(*flags, "--weights", path, "--out", tmp_path / "run") == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "executed").exists()
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dataset", "cifar1000"], 2, "cifar100"),
        (["--model", "resnet"], 2, "vit_micro"),
        (["--method", "magic"], 2, "'san'"),
        (["--task", "colour"], 2, "orientation"),
        (["--batch-size", "0"], 2, "above 0"),
        (["--protocol", "vtab1k", "--shots", "100"], 2, "leave --shots out"),
        (["--compare", "--seed", "3"], 2, "takes --seeds"),
        (["--ablation", "--compare"], 2, "SAN's variants"),
        (["--compare", "--methods", "san", "magic"], 2, "'magic'"),
        (["--methods", "san"], 2, "'san' is none here"),
        (["--ablation", "--methods", "both", "ssf"], 2, "'ssf' is none here"),
        (["--compare", "--seeds", "-1"], 2, "below 0"),
        (["--pretrain", "--compare"], 2, "--pretrain makes one backbone"),
        (["--protocol", "vtab1k", "--method", "vpt", "--model", "convnext_micro"], 2, "for a ViT"),
        (["--gamma-std", "-1"], 2, "--gamma-std must be"),
        (["--method", "vpt", "--model", "convnext_micro"], 2, "ViT's tokens"),
        (["--shots", "4000"], 2, "4000 labelled pictures are 3200 for training and 800 for"),
        (["--lr", "-1"], 2, "--lr must be"),
        (["--warmup-epochs", "50"], 2, "--warmup-epochs"),
        (["--resume"], 2, "no checkpoint"),
        (["--task", "all"], 2, "--compare"),
        (["--image-size", "30"], 2, "sprites are 32 px"),
        (["--evaluate", "run"], 2, "--evaluate does not read --epochs; leave it out"),
        (["--pretrain", "--weights", "imagenet21k"], 2, "random weights; leave --weights out"),
        (["--seeds", "5"], 2, "--seeds is of comparisons; a run has one --seed"),
        (["--dataset", "cifar100", "--task", "count"], 2, "--task is of sprites; leave it out"),
        (["--model", "convnext_micro", "--wiring", "authors"], 2, "ViT alone"),
        (["--method", "ssf", "--no-shift"], 2, "--no-shift changes nothing in --method ssf; leave"),
        (["--method", "lora", "--wiring", "authors"], 2, "--wiring changes nothing in --method"),
        (["--method", "linear", "--prompts", "3"], 2, "--prompts changes nothing in --method lin"),
        (["--method", "full", "--no-norms"], 2, "--no-norms changes nothing in --method full"),
        (["--pretrain", "--gamma-std", "1"], 2, "--gamma-std changes nothing in --method full"),
        (["--protocol", "vtab1k", "--rank", "4"], 2, "--rank changes nothing in --method san"),
        (["--ablation", "--mode", "feature"], 2, "--mode changes nothing in --ablation; leave it"),
        (["--weights", "imagenet1k"], 2, "no imagenet1k weights for vit_micro"),
        (["--weights", "imagenet21k"], 2, "21k weights for vit_micro; take one of vit_b16"),
    ],
)
def test_bad_flags_are_one_sentence(words, code, message, tmp_path, capsys):
    assert command("--epochs", 1, "--device", "cpu", "--out", tmp_path / "run", *words) == code
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 600


def test_a_command_that_is_refused_keeps_what_an_earlier_run_saved(flags, tmp_path):
    assert command(*flags, "--out", tmp_path) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wrong = ["--model", "convnext_micro", "--weights", "none", "--wiring", "authors"]
    assert command(*flags, *wrong, "--out", tmp_path) == 2
    assert command(*flags, "--weights", "missing.pt", "--out", tmp_path) == 1
    assert command(*flags, "--resume", "--out", tmp_path) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_that_are_not_from_a_run_are_never_replaced(flags, tmp_path, capsys):
    (tmp_path / "model.pt").write_bytes(b"somebody's own")
    assert command(*flags, "--out", tmp_path) == 2
    assert "would be lost" in capsys.readouterr().err
    assert (tmp_path / "model.pt").read_bytes() == b"somebody's own"


def test_a_diverging_rate_is_out_of_the_search_and_does_not_end_the_comparison(
    flags, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_vision, "LEARNING_RATES", {"full": (1e-4, 1e30)})
    assert command(*flags, "--epochs", 1, "--compare", "--seeds", 1, "--out", tmp_path) == 0
    low, high, *further, run = tables.read_results(tmp_path / "results.jsonl")
    assert low["lr"] == 1e-4 and high["val"] is None
    assert [line["lr"] for line in further] in ([3e-5], [3e-5, 1e-5])
    assert run["val"] == max(line["val"] for line in (low, *further))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(tmp_path, capsys):
    assert command("--device", "cuda", "--out", tmp_path) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_an_out_that_cannot_be_written_is_refused_before_training(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words in ([], ["--compare"]):
        assert command(*flags, *words, "--out", tmp_path / "file" / "run") == 1
        captured = capsys.readouterr()
        assert "could not write" in captured.err and "trains" not in captured.out


def test_a_full_disk_leaves_no_half_written_file(flags, tmp_path, monkeypatch, capsys):
    def full(content, file, **_):
        file.write(b"half a fi")
        raise RuntimeError("PytorchStreamWriter failed writing file: no space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert command(*flags, "--out", tmp_path) == 1
    assert "could not write" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
