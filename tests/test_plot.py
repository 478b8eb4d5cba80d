"""plot.py: which pictures appear, that they show the right numbers, and what is refused."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

import train_lm
import train_vision
from lab import paired, plot

pytest.importorskip("matplotlib", reason="pictures need matplotlib, an extra")

BASE = {
    "a.weight": torch.ones(4, 3),
    "b.weight": torch.ones(2, 4, 1, 1),
    "norm.weight": torch.ones(4),
}
BASE |= {"a.bias": torch.ones(4), "head.weight": torch.ones(2, 2)}
GAMMA = {"b": torch.tensor([0.5, 1.25]), "a": torch.tensor([0.8, 1.5, 0.9, 0.7])}
FACTOR = {"a.weight": 1.5, "b.weight": 0.75, "norm.weight": 3, "head.weight": 5}


def base_of(config: dict) -> dict:
    return BASE


def make_run(path: Path, method: str, **config) -> Path:
    """A finished run of two epochs; its matrix a grew by a half, b shrank by a quarter."""
    path.mkdir()
    config = {"method": method, "lr": 0.01, "epochs": 2, "model": ["tiny"]} | config
    (path / "config.json").write_text(json.dumps(config))
    result = {"dataset": "dots", "model": "tiny", "method": method, "seed": 0, "test": 0.625}
    records = [
        {"epoch": 1, "loss": 2.0, "val": 0.25},
        {"epoch": 2, "loss": 0.5, "val": 0.75},
        result,
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if method in ("san", "ssf"):
        values = {f"{layer}.gamma": value for layer, value in GAMMA.items()}
        content = {"san": 3, "links": [("a", None, None), ("b", "a", None)], "values": values}
        torch.save(content | {"settings": {}, "frozen": {}, "samples": {}}, path / "adapter.pt")
    state = {key: value * FACTOR.get(key, 1) for key, value in BASE.items()}
    torch.save({"state_dict": state}, path / ("model.pt" if method == "full" else "merged.pt"))
    return path


def line(method: str, test: float | None = None, **changes) -> dict:
    line = {"task": "dots", "model": "tiny", "method": method, "lr": 0.1, "seed": 0, "val": 0.5}
    line |= {"part": "search"} if test is None else {"part": "test", "test": test}
    line |= {"percent": 1.0, "seconds": 1.0, "memory": 1.0, "merge_same": 1, "merge_difference": 0}
    return line | {"trainable": 100 if method == "san" else 4000, "options": {"lr": None}} | changes


@pytest.fixture
def comparison(tmp_path) -> Path:
    path = tmp_path / "compared"
    path.mkdir()
    lines = [line("san"), line("san", 0.5), line("san", 0.7, seed=1), line("full", 0.4)]
    (path / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def read(*paths: Path) -> list[plot.Run]:
    return [plot.read_run(path) for path in paths]


def drawn_points(axes) -> dict[str, tuple]:
    """Label → (trained, mean, deviation), as the picture has them."""
    found = {}
    for text, container in zip(axes.texts, axes.containers):
        (x, y), segment = (
            container.lines[0].get_xydata()[0],
            container.lines[2][0].get_segments()[0],
        )
        found[text.get_text()] = (x, y, (segment[1, 1] - segment[0, 1]) / 2)
    return found


def test_each_kind_of_run_gets_its_pictures(tmp_path, comparison, monkeypatch):
    from matplotlib.figure import Figure

    adapted, full = make_run(tmp_path / "1", "san"), make_run(tmp_path / "2", "full")

    def pictures(*runs) -> set[str]:
        return {file.name for file in plot.draw([*runs], tmp_path / "out", base_of)}

    every = {"curves.png", "accuracy.png", "gamma.png", "change.png"}
    assert pictures(adapted, comparison) == every
    assert {file.name for file in (tmp_path / "out").iterdir()} == every
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in (tmp_path / "out").iterdir())
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: Path(file).touch())  # quicker
    assert pictures(full) == {"curves.png", "change.png"}
    assert pictures(comparison) == {"accuracy.png"}
    (full / "model.pt").unlink()
    assert pictures(full) == {"curves.png"}


def test_curves_show_every_epoch(tmp_path):
    runs = read(make_run(tmp_path / "1", "san"), make_run(tmp_path / "2", "full"))
    runs[1].history[0]["val"] = None
    left, right = plot.curves(runs).axes
    assert left.lines[0].get_xydata().tolist() == [[1, 25], [2, 75]]
    assert left.lines[1].get_ydata()[1] == 75 and left.lines[1].get_ydata()[0] != 25
    assert right.lines[1].get_xydata().tolist() == [[1, 2.0], [2, 0.5]]
    assert left.lines[0].get_label() == "san: test 62.5 %"
    assert left.figure.get_suptitle() == "dots, tiny"


def test_accuracy_shows_mean_and_deviation_over_seeds(comparison):
    lines = [json.loads(text) for text in (comparison / "results.jsonl").read_text().splitlines()]
    (axes,) = plot.accuracy(lines).axes
    found = drawn_points(axes)
    assert found["san"] == pytest.approx((100, 60, 100 * 0.02**0.5))
    assert found["full"] == pytest.approx((4000, 40, 0))
    assert axes.get_title() == "tiny, dots"


def test_accuracy_is_a_mean_over_tasks_where_panels_would_be_many():
    tasks = [f"t{i}" for i in range(5)]
    lines = [line("san", 0.1 * i, task=task) for i, task in enumerate(tasks)]
    lines += [line("full", 0.9, task=task) for task in tasks[1:]]  # not scored on all: left out
    (axes,) = plot.accuracy(lines).axes
    assert list(drawn_points(axes)) == ["san"] and drawn_points(axes)["san"][1] == pytest.approx(20)
    assert len(plot.accuracy([one for one in lines if one["task"] != "t0"]).axes) == 4


def test_accuracy_keeps_apart_what_had_other_options():
    lines = [line("san", 0.5, options={"epochs": 2}), line("san", 0.7, options={"epochs": 9})]
    (axes,) = plot.accuracy(lines).axes
    assert {k: round(v[1]) for k, v in drawn_points(axes).items()} == {
        "san, epochs 2": 50,
        "san, epochs 9": 70,
    }


def test_labels_and_marks_of_close_methods_cover_nothing():
    methods = ["linear", "bias", "lora", "ssf", "san", "dora"]
    lines = [line(m, 0.6 + 0.001 * i, trainable=1000 + i) for i, m in enumerate(methods)]
    (axes,) = plot.accuracy(lines).axes
    axes.figure.draw_without_rendering()
    boxes = [super(type(text), text).get_window_extent() for text in axes.texts]
    assert len(boxes) == 6
    assert not any(box.count_overlaps(boxes[i + 1 :]) for i, box in enumerate(boxes))
    assert all(axes.bbox.contains(*box.min) and axes.bbox.contains(*box.max) for box in boxes)


def test_forest_shows_each_methods_difference_to_san_the_best_on_top():
    hits = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.6
    lines = [
        line(method, own.double().mean().item(), right=paired.pack(own), task=task, model=model)
        for method, model, task, own in [
            *(("san", model, task, hits) for model in ("m", "n") for task in "ab"),
            ("full", "m", "a", hits & (torch.arange(100) > 9)),
            ("full", "m", "b", hits),
            *(("san2", "m", task, hits | (torch.arange(100) < 50)) for task in "ab"),
            ("lora", "n", "a", hits),
        ]
    ]
    left, right = plot.forest(lines).axes
    assert [left.get_title(), right.get_title()] == ["m", "n"]
    assert [text.get_text() for text in left.get_yticklabels()] == ["san2", "full"]
    assert [text.get_text() for text in right.get_yticklabels()] == ["lora"]
    assert left.lines[0].get_xdata() == [0, 0]
    found = {key[:2]: pair for key, pair in paired.differences(lines).items()}
    for row, (method, bar) in enumerate(zip(("san2", "full"), left.containers)):
        pair = found["m", method]
        assert bar.lines[0].get_xydata().tolist() == [[100 * pair.difference.value, row]]
        ((low, _), (high, _)) = bar.lines[2][0].get_segments()[0].tolist()
        ends = [100 * pair.difference.low, 100 * pair.difference.high]
        assert [low, high] == pytest.approx(ends) and low < high
        singles = left.collections[2 * row + 1].get_offsets()[:, 0]
        assert singles.tolist() == pytest.approx([100 * own.value for own in pair.tasks.values()])
    assert plot.forest([line("san", 0.5), line("lora", 0.5)]) is None  # made before


def test_gamma_shows_layers_in_the_links_order_and_channels_sorted(tmp_path):
    runs = read(make_run(tmp_path / "1", "san"), make_run(tmp_path / "2", "ssf"))
    axes = plot.gamma(runs).axes[:4]
    assert [one.get_title() for one in axes] == ["san", "ssf", "san", "ssf"]
    assert [text.get_text() for text in axes[0].get_yticklabels()] == ["a", "b"]
    assert axes[0].get_xlim() == axes[1].get_xlim() == pytest.approx((0.5, 1.5))
    (image,) = axes[2].images
    first, second = image.get_array()
    quarter = plot.COLUMNS // 4
    assert first[::quarter].tolist() == pytest.approx([0.7, 0.8, 0.9, 1.5])
    assert second[:: 2 * quarter].tolist() == pytest.approx([0.5, 1.25])
    assert sum(image.get_clim()) == pytest.approx(2)  # white stands for 1
    shares = [path.vertices[0, 0] for path in axes[2].collections[0].get_paths()]
    assert shares == pytest.approx([75, 50])


@pytest.mark.parametrize("method", ["san", "lora", "full"])
def test_change_is_relative_by_layer_without_head_and_norms(tmp_path, method):
    (run,) = read(make_run(tmp_path / "1", method))
    assert plot.weight_change(run, base_of) == pytest.approx({"a": 0.5, "b": 0.25})
    (axes,) = plot.change([run], base_of).axes
    assert axes.lines[0].get_xydata().tolist() == [[50, 0], [25, 1]]
    assert plot.change([run], lambda config: {}) is None


def test_a_run_that_changes_no_matrix_is_not_in_the_picture_of_changes(tmp_path):
    runs = read(make_run(tmp_path / "1", "linear"), make_run(tmp_path / "2", "full"))
    torch.save({"state_dict": BASE}, tmp_path / "1" / "merged.pt")
    assert plot.change(runs[:1], base_of) is None
    (axes,) = plot.change(runs, base_of).axes
    assert [one.get_label() for one in axes.lines] == ["full"]


def test_a_name_tells_what_sets_runs_apart(tmp_path):
    settings = [("san", {}), ("san", {"lr": 0.005, "shift": False}), ("lora", {"lr": 0.3})]
    runs = read(*(make_run(tmp_path / str(i), m, **c) for i, (m, c) in enumerate(settings)))
    assert plot.names(runs) == ["san, lr 0.01", "san, lr 0.005, no shift", "lora"]
    runs[2].config["epochs"] = 9
    assert plot.names(runs)[2] == "lora, epochs 9"
    place = tmp_path / "0"
    assert plot.names([runs[0], runs[0]]) == [f"san ({place})"] * 2


def test_a_method_has_one_style_and_its_repetition_another():
    alone, first, again = (
        plot.styles(methods) for methods in (["san"], ["lora", "san"], ["san"] * 2)
    )
    assert alone[0] == first[1] == again[0]
    for key in ("color", "linestyle", "markerfacecolor"):
        assert again[0][key] != again[1][key]


# linear sRGB as it is seen without the cones for green, or for red: Machado et al. 2009
SIGHT = {
    "full": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
}
TO_XYZ = [[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0177, 0.1095, 0.8728]]  # white: 1
VARIANTS = [*plot.STYLES].index("both, shift (SAN)")  # they are never drawn beside methods
TOGETHER = [[*plot.STYLES][:VARIANTS], [*plot.STYLES][VARIANTS:]]


def perceived(colour: str, sight: str) -> torch.Tensor:
    """Its place in CIE L*a*b*, where a distance of 2 can just be seen."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    x, y, z = torch.tensor(TO_XYZ) @ (torch.tensor(SIGHT[sight]) @ linear).clamp(0.0002, 1)
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("together", TOGETHER, ids=["methods", "variants"])
def test_no_two_colours_look_alike_whatever_cones_see_them(sight, together):
    places = {name: perceived(plot.STYLES[name][0], sight) for name in together}
    for a, b in itertools.combinations(places, 2):
        assert (places[a] - places[b]).norm() > 15, f"{a} and {b}"
        assert places[a][0] < 75, f"{a} is pale on white"


def test_a_red_and_a_green_look_alike_to_a_deuteranope_alone():
    red, green = "#b2182b", "#6b6318"
    near, far = (
        (perceived(red, sight) - perceived(green, sight)).norm()
        for sight in ("deuteranopia", "full")
    )
    assert near < 10 < 40 < far


@pytest.mark.parametrize("together", TOGETHER, ids=["methods", "variants"])
def test_without_colour_dashes_and_marker_tell_methods_apart(together):
    rounds = dict.fromkeys("ohH8p", "round")  # which nobody tells apart where they are small
    looks = [plot.STYLES[name][1:] for name in together] + [plot.OTHER[1:]] * ("san" in together)
    found = [(dashes, rounds.get(marker, marker)) for dashes, marker in looks]
    assert len({*found}) == len(found)


def test_every_method_has_a_look_of_its_own():
    assert {*TOGETHER[0]} >= {*train_vision.LEARNING_RATES, *train_lm.METHODS}
    other, another = plot.styles(["SAN, no warm-up", "projector"])  # these share one
    assert other["linestyle"] != another["linestyle"] and other["color"] != another["color"]


def test_missing_and_broken_runs_are_named_and_nothing_is_written(tmp_path, comparison):
    good, bad = make_run(tmp_path / "good", "san"), make_run(tmp_path / "bad", "san")
    out = tmp_path / "out"

    def refused(*runs) -> str:
        with pytest.raises(OSError) as error:
            plot.draw([good, *runs], out, base_of)
        assert not out.exists()
        return str(error.value)

    assert "nowhere is no finished run and no comparison" in refused(tmp_path / "nowhere")
    (bad / "merged.pt").write_bytes(b"half")
    assert "bad/merged.pt is broken" in refused(bad)
    (bad / "adapter.pt").write_bytes(b"half")
    assert "bad/adapter.pt is broken" in refused(bad)
    for text in ("", "{", '{"loss": 1}\n{}', "[]", "3"):
        (bad / "metrics.jsonl").write_text(text)
        assert "bad/metrics.jsonl is broken" in refused(bad)
    (bad / "metrics.jsonl").unlink()
    assert "bad is no finished run and no comparison: it has no metrics.jsonl" in refused(bad)
    (comparison / "results.jsonl").write_text("{}")
    assert "compared" in refused(comparison)


def test_nothing_to_draw_is_said(tmp_path, comparison):
    (comparison / "results.jsonl").write_text(json.dumps(line("san")) + "\n")  # a search alone
    for runs in ([], [comparison]):
        with pytest.raises(ValueError, match="nothing to draw"):
            plot.draw(runs, tmp_path / "out", base_of)


def test_without_matplotlib_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install -r requirements-extra.txt"):
        plot.draw([make_run(tmp_path / "1", "san")], tmp_path / "out", base_of)


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full_disk(figure, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="could not write .*curves.png: no space left"):
        plot.draw([make_run(tmp_path / "1", "san")], tmp_path / "out", base_of)
    assert not list((tmp_path / "out").iterdir())
