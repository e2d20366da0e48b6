"""Folders of pictures: what is taken, which folder is which split, and that a fit says so."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import list_files
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.data.sources import Source
from pid_lightning.training.data.splits import Split, name_splits


def draw(path: str | Path, side: int = 20) -> None:
    """A picture of noise; JPEG in what Pillow does not write by its name."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    known = Path(path).suffix.lower() in Image.registered_extensions()
    Image.fromarray(noise).save(path, None if known else "JPEG")


def source(path: object) -> Source:
    return Source("data.path", str(path), 16, 0, False, "image", None)


def taken(split: Split) -> list[str]:
    return [os.fsdecode(row["file"]) for row in split.rows]


# ---- splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("Train Val", "train val"),
        ("TRAIN dev eval", "train val test"),
        ("training validation testing", "train val test"),
        ("DIV2K_train_HR DIV2K_valid_HR", "train val"),
        ("train2017 val2017 test2017", "train val test"),
        ("trainHR testHR", "train test"),
        ("cat train", "- train"),
        ("train val-large", "train val"),
        ("train train_masks", "train -"),
        ("my_train_trips holiday", "- -"),  # one name like a split's is none
        ("cat dog", "- -"),
        ("trainval other", "- -"),
        ("test", "test"),
    ],
)
def test_names_say_splits_as_people_spell_them(names: str, splits: str) -> None:
    meant = {name: split for split, named in name_splits(names.split()).items() for name in named}
    assert [meant.get(name, "-") for name in names.split()] == splits.split()


def test_two_folders_of_one_split_are_told(tmp_path: Path) -> None:
    for name in ("DIV2K_train_HR", "DIV2K_train_LR", "DIV2K_valid_HR"):
        draw(tmp_path / name / "a.png")
    with pytest.raises(Mistake, match="DIV2K_train_HR and DIV2K_train_LR") as told:
        source(tmp_path).read("train")
    assert told.value.option == "data.path"


def test_splits_may_lie_in_the_only_folder_and_the_rest_is_told(tmp_path: Path) -> None:
    draw(tmp_path / "images" / "train" / "a.png")
    draw(tmp_path / "images" / "val" / "b.png")
    draw(tmp_path / "images" / "other" / "c.png")
    (tmp_path / "labels").mkdir()
    both = source(tmp_path)
    assert taken(both.read("train")) == [str(tmp_path / "images/train/a.png")]
    assert taken(both.read("val")) == [str(tmp_path / "images/val/b.png")]
    assert "left out: 1 outside train and val;" in str(both.read("train"))


# ---- what is taken


def test_links_are_followed_once_and_hidden_folders_left_out(tmp_path: Path) -> None:
    root = tmp_path / ".data"
    for name in ("z/a.png", ".git/b.png", "z/.ipynb_checkpoints/a.png", "@eaDir/c.png"):
        draw(root / name)
    draw(tmp_path / "elsewhere" / "d.png")
    os.symlink(root, root / "z" / "up")
    os.symlink(root / "z", root / "again")
    for name in ("first", "second"):
        os.symlink(tmp_path / "elsewhere", root / name)
    os.symlink(root / "z" / "a.png", root / "picture.png")
    os.symlink("nowhere", root / "e.png")
    split = source(root).read("train")
    assert taken(split) == [str(root / name) for name in ("first/d.png", "picture.png", "z/a.png")]
    assert "left out: 1 broken;" in str(split)


@pytest.mark.parametrize("name", ["[1] *?", "photos #1", b"caf\xe9", "a\nb", "x.png"])
def test_folders_may_have_any_name(tmp_path: Path, name: str | bytes) -> None:
    root = tmp_path / os.fsdecode(name) / "inner"
    files = [root / os.fsdecode(stem + b".png") for stem in (b"a", b"\xe8", b"\xe9")]
    for file in files:
        draw(file)
    data = ImageData(str(root.parent), image_size=16, batch_size=3, num_val=0, num_workers=1)
    data.setup("fit")
    [batch] = data.train_dataloader()
    assert len(set(batch["name"])) == 3
    assert all(stem.encode() for stem in batch["name"])  # in UTF-8


def test_formats_that_pillow_reads_are_taken(tmp_path: Path) -> None:
    names = ["a.jfif", "b.gif", "c.webp", "d.TIF", "e.bmp", "f.JPEG", "g.Png"]
    for name in names:
        draw(tmp_path / name)
    assert len(taken(source(tmp_path).read("train"))) == len(names)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    for name in ("b.png", "a.txt", "metadata.jsonl", "metadata.csv", "c.parquet"):
        os.mkfifo(tmp_path / name)
    os.symlink("/dev/zero", tmp_path / "d.png")
    assert len(taken(source(tmp_path).read("train"))) == 1
    for name in ("c.parquet", "b.png"):
        with pytest.raises(Mistake):
            source(tmp_path / name).read("train")


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        list_files(tmp_path / "nowhere")


# ---- what is said


def test_a_fit_begins_by_saying_what_it_took(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(8):
        draw(tmp_path / "train" / f"{i}.png")
        (tmp_path / "train" / f"{i}.txt").write_text(f"number {i}")
        (tmp_path / "train" / f"{i}.xyz").touch()
    draw(tmp_path / "train" / "small.png", side=8)
    (tmp_path / "train" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    draw(tmp_path / "dev" / "a.png")
    data = ImageData(str(tmp_path), image_size=16, batch_size=2)
    caplog.set_level(logging.INFO, "lightning.pytorch")
    with pytest.warns(UserWarning, match=r"bad\.jpg"):
        data.setup("fit")
    data.setup("fit")
    said = [line for line in caplog.messages if line.startswith(("train", "val"))]
    assert said == [
        "train: 8 pictures of 18 files, 8 with captions; left out: 8 .xyz, 1 damaged, 1 below "
        f"image_size 16; from {tmp_path}/train",
        f"val: 1 picture of 1 file, none with captions; from {tmp_path}/dev",
    ]


def test_held_out_pictures_are_counted(tmp_path: Path) -> None:
    for i in range(6):
        draw(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a caption" if i % 2 else "")
    rest, held = source(tmp_path).read("train").hold_out(2, 1)
    assert str(rest).startswith("4 pictures of 6 files, 2 with captions; left out: 2 held out;")
    assert str(held).startswith("2 pictures held out of train, 1 with captions; from")


@pytest.mark.parametrize(
    ("content", "told"), [(b"version https://git-lfs.github.com/spec/v1\n", "lfs"), (b"x", "dam")]
)
def test_why_no_picture_is_usable_is_told(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(Mistake, match=f"none of 1 .*{told}"):
        source(tmp_path).read("train")
