"""lab/folders.py: pictures as people have them arrive as they look, and what cannot is named."""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader

from lab import folders, loop
from lab import pictures as sets


def grey(value: int = 120, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value,) * 3).convert(mode)


def save(path: Path, image: Image.Image | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or grey()).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    """5 + 1 grey pictures of each of the classes cat and dog."""
    for name in ("cat", "dog"):
        for i in range(5):
            save(tmp_path / "pets" / "train" / name / f"{i}.png")
        save(tmp_path / "pets" / "test" / name / "0.png")
    return tmp_path / "pets"


def colours(image: Image.Image) -> list[int]:
    """The least and the largest value of a picture."""
    pixels = np.asarray(image)
    assert pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.dtype == np.uint8
    return [pixels.min(), pixels.max()]


def read(path: Path) -> Image.Image:
    return folders.Files([(path, 0)])[0][0]


# ------------------------------------------------------------------------------ how a picture looks


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N", "I"])
@pytest.mark.parametrize("value, byte", [(0, 0), (30_000, 117), (128, 0), (129, 1), (65_535, 255)])
def test_sixteen_bit_grey_is_scaled_to_bytes(mode, value, byte):
    assert colours(folders.to_rgb(Image.new(mode, (3, 2), value))) == [byte, byte]


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bit_files_keep_their_shades(ending, tmp_path):
    ramp = np.linspace(20_000, 40_000, 64).reshape(8, 8).astype(np.uint16)
    image = read(save(tmp_path / f"ramp.{ending}", Image.fromarray(ramp)))
    assert np.abs(np.asarray(image)[:, :, 1] - ramp / 257).max() <= 0.5


@pytest.mark.parametrize("values", [[0.0, 0.25, 1.0], [0.0, 63.75, 255.0]])
def test_float_grey_of_either_scale_becomes_bytes(values, tmp_path):
    image = Image.fromarray(np.array([values], np.float32))
    assert np.asarray(read(save(tmp_path / "float.tif", image)))[0, :, 2].tolist() == [0, 64, 255]


@pytest.mark.parametrize(
    "values, said",
    [
        (np.array([[-0.1, 1]], np.float32), "-0.1 … 1;.*0 … 1 or 0 … 255"),
        (np.array([[0, 256]], np.float32), "0 … 256;.*0 … 1 or 0 … 255"),
        (np.array([[0, np.nan]], np.float32), "nan"),
        (np.array([[0, np.inf]], np.float32), "inf"),
        (np.array([[0, 65_536]], np.int32), "0 … 65536;.*0 … 65535"),
        (np.array([[-1, 255]], np.int32), "-1 … 255;.*0 … 65535"),
    ],
)
def test_grey_without_a_scale_is_refused_by_name(values, said, tmp_path):
    path = save(tmp_path / "odd.tif", Image.fromarray(values))
    with pytest.raises(OSError, match=f"odd.tif is not .*{said}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [0, 102, 204])  # the palette that Pillow makes has these
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"])
def test_other_modes_keep_a_grey(mode, value):
    low, high = colours(folders.to_rgb(grey(value, mode)))
    assert value - 2 <= low <= high <= value + 2


def test_one_bit_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert np.asarray(folders.to_rgb(image))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
@pytest.mark.parametrize("alpha, shown", [(0, 255), (255, 102), (128, 178)])
def test_what_is_transparent_lies_on_white(mode, alpha, shown):
    image = Image.new("RGBA", (4, 4), (102, 102, 102, alpha))
    if mode == "PA":
        image = grey(102, "P", (4, 4)).convert("PA")
        image.putalpha(alpha)
    image = image.convert(mode)
    assert image.mode == mode
    low, high = colours(folders.to_rgb(image))
    assert abs(low - shown) <= 1 and abs(high - shown) <= 1


@pytest.mark.parametrize("mode, clear", [("P", 0), ("P", b"\x00"), ("L", 90), ("RGB", (90,) * 3)])
def test_a_transparent_palette_entry_or_colour_is_white(mode, clear, tmp_path):
    image = Image.new(mode, (2, 1), 0 if mode == "P" else clear)
    if mode == "P":
        image.putpalette([90, 90, 90, 140, 140, 140])
    image.putpixel((1, 0), {"P": 1, "L": 140, "RGB": (140,) * 3}[mode])
    path = save(tmp_path / "clear.png", image, transparency=clear)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(read(path))[0, :, 0].tolist() == [255, 140]


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_however_its_camera_was_held(orientation, ending, tmp_path):
    upright = grey(200, size=(32, 16))
    upright.paste((30, 30, 30), (0, 0, 16, 8))  # dark at the upper left
    transpose = Image.Transpose
    stored = {  # what turns back as EXIF's orientation tag says
        1: None,
        2: transpose.FLIP_LEFT_RIGHT,
        3: transpose.ROTATE_180,
        4: transpose.FLIP_TOP_BOTTOM,
        5: transpose.TRANSPOSE,
        6: transpose.ROTATE_90,
        7: transpose.TRANSVERSE,
        8: transpose.ROTATE_270,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = upright if stored is None else upright.transpose(stored)
    options = {"quality": 95} if ending in ("jpg", "webp") else {}
    shown = np.asarray(read(save(tmp_path / f"a.{ending}", image, exif=exif, **options)))
    assert np.abs(shown.astype(int) - np.asarray(upright)).max() < 40


def test_torchvisions_pictures_are_read_the_same_way():
    for transform in sets.transforms(8):
        assert transform(Image.new("I;16", (8, 8), 30_000)).unique().tolist() == [117]
        assert transform(Image.new("LA", (8, 8), (0, 0))).unique().tolist() == [255]


# ------------------------------------------------------------------- which files and folders count


def test_pictures_come_in_the_order_of_torchvisions_folders(root):
    for name in ("cat/10.jpg", "cat/b/1.png", "cat/a/2.PNG", "dog/B.png", "Zebra/0.bmp"):
        save(root / "train" / name)
    (root / "away").mkdir()
    (root / "train" / "dog" / "linked").symlink_to(root / "train" / "Zebra")
    theirs = torchvision.datasets.ImageFolder(str(root / "train"))
    train, _, classes = folders.read_splits(root)
    assert [(str(path), label) for path, label in train.pairs] == theirs.samples
    assert classes == theirs.classes == ["Zebra", "cat", "dog"]


def test_names_that_begin_with_a_dot_are_neither_classes_nor_pictures(root, capsys):
    before = [files.pairs for files in folders.read_splits(root)[:2]]
    for split in ("train", "test"):
        save(root / split / ".ipynb_checkpoints" / "0.png")
        save(root / split / "cat" / ".ipynb_checkpoints" / "0.png")
        (root / split / ".DS_Store").write_text("")
        (root / split / "cat" / ".DS_Store").write_text("")
        (root / split / "cat" / "._0.png").write_text("no picture")
    train, test, classes = folders.read_splits(root)
    assert [train.pairs, test.pairs] == before and classes == ["cat", "dog"]
    assert capsys.readouterr().out == ""


def test_a_hidden_folder_above_the_set_hides_nothing(root):
    hidden = root.rename(root.parent / ".pets")
    assert len(folders.read_splits(hidden)[0]) == 10


@pytest.mark.parametrize(
    "ending", ["gif", "webp", "bmp", "tga", "ppm", "ico", "pcx", "jp2", "JPEG"]
)
def test_whatever_pillow_opens_is_a_picture(ending, root):
    path = save(root / "test" / "dog" / f"odd.{ending}", grey(102, "RGB", (16, 16)))
    test = folders.read_splits(root)[1]
    image = test[[path for path, _ in test.pairs].index(path)][0]
    assert all(abs(value - 102) <= 3 for value in colours(image))


def test_of_a_film_the_first_picture_counts(tmp_path):
    path = tmp_path / "film.gif"
    grey(60).save(path, save_all=True, append_images=[grey(200)])
    assert colours(read(path)) == [60, 60]


def test_other_files_are_left_out_with_one_note(root, capsys):
    for name in ("train/cat/notes.txt", "train/dog/Thumbs.db", "test/dog/a.pdf", "train/list.csv"):
        (root / name).write_text("")
    save(root / "test" / "loose.png")
    train, test, _ = folders.read_splits(root)
    assert (len(train), len(test)) == (10, 2)
    note = f"{root}: left out, being no picture of a class: 5, the first train/list.csv\n"
    assert capsys.readouterr().out == note


# ------------------------------------------------------------------------- classes that are lacking


@pytest.mark.parametrize("folder_too", [True, False])
def test_a_class_without_test_pictures_is_said_and_keeps_its_label(root, folder_too, capsys):
    save(root / "train" / "ant" / "0.png")
    if folder_too:
        (root / "test" / "ant").mkdir()
    train, test, classes = folders.read_splits(root)
    assert classes == ["ant", "cat", "dog"]
    assert [label for _, label in train.pairs] == [0] + 5 * [1] + 5 * [2]
    assert [label for _, label in test.pairs] == [1, 2]
    assert capsys.readouterr().out == f"{root}: no test pictures of ant\n"


def test_a_long_list_of_classes_is_cut(root, capsys):
    for i in range(8):
        save(root / "train" / f"x{i}" / "0.png")
    folders.read_splits(root)
    assert capsys.readouterr().out.endswith("no test pictures of x0, x1, x2, x3, x4 and 3 more\n")


@pytest.mark.parametrize("folder_too", [True, False])
def test_a_class_that_only_test_has_pictures_of_is_named(root, folder_too):
    save(root / "test" / "hamster" / "0.png")
    if folder_too:
        (root / "train" / "hamster").mkdir()
    with pytest.raises(ValueError, match="in test/ but none in train/ of hamster"):
        folders.read_splits(root)


@pytest.mark.parametrize("splits", [["train"], ["test"], ["train", "test"]])
def test_a_folder_that_is_empty_in_both_splits_is_no_class(root, splits, capsys):
    for split in splits:
        (root / split / "bird").mkdir()
    train, _, classes = folders.read_splits(root)
    assert classes == ["cat", "dog"] and {label for _, label in train.pairs} == {0, 1}
    assert capsys.readouterr().out == f"{root}: no class, without any picture: bird\n"


def test_a_set_without_any_test_picture_is_refused(root):
    for path in (root / "test").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match="test has no pictures"):
        folders.read_splits(root)


# ----------------------------------------------------------------------- pictures that are no such


def spoil(path: Path, how: str, monkeypatch) -> None:
    """Make of a good picture one that Pillow refuses with an error of its own kind."""
    if how == "text":
        path.write_text("no picture")
    elif how == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    elif how == "checksum":  # SyntaxError
        content = bytearray(path.read_bytes())
        content[20] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
        path.symlink_to(path.parent / "nothing.png")


@pytest.mark.parametrize("how", ["text", "bomb", "checksum", "missing"])
def test_a_header_that_cannot_be_read_is_named_at_the_start(how, root, monkeypatch):
    path = root / "train" / "cat" / "0.png"
    spoil(path, how, monkeypatch)
    with pytest.raises(OSError, match=f"^{path} is not a picture that can be read: .") as caught:
        folders.read_splits(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error", [SyntaxError("two\nlines"), ValueError(), IndexError("x"), MemoryError("y")]
)
def test_whatever_pillow_raises_while_it_decodes_is_one_sentence(error, root, monkeypatch):
    train, _, _ = folders.read_splits(root)

    def refuse(*_):
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", refuse)
    with pytest.raises(OSError, match="0.png is not a picture that can be read: .") as caught:
        train[0]
    assert "\n" not in str(caught.value)


def halve(path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_picture_that_breaks_off_is_named_when_it_is_decoded(root, monkeypatch):
    broken = root / "test" / "cat" / "0.png"
    halve(broken)
    with pytest.raises(OSError, match=f"^{broken} is not a picture"):
        sets.from_folder(root, 32)
    monkeypatch.setattr(sets, "MOST_KEPT", 0)
    test = sets.from_folder(root, 32).test
    with pytest.raises(OSError, match=f"^{broken} is not a picture"):
        test[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_ends_a_script_with_one_sentence(workers, root, monkeypatch, capsys):
    broken = root / "test" / "cat" / "0.png"
    halve(broken)
    monkeypatch.setattr(sets, "MOST_KEPT", 0)
    monkeypatch.setattr("sys.argv", ["train_vision.py"])
    test = sets.from_folder(root, 32).test
    args = argparse.Namespace(device="cpu", amp=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        loop.guard(lambda _: list(DataLoader(test, num_workers=workers)), args)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and "\n" not in said
    assert said.startswith(f"train_vision.py: {broken} is not a picture that can be read: ")


def test_labels_arrive_as_whole_numbers(root):
    picture, label = sets.from_folder(root, 8).test[1]
    assert picture.unique().tolist() == [120] and label.tolist() == [1]
    assert label.dtype == torch.long
