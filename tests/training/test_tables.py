"""Tables of pictures: columns of many types, shards, clones of hub data sets, saved data sets."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from pid_lightning.checks import Mistake
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.data.rows import decode
from pid_lightning.training.data.sources import Source
from pid_lightning.training.data.splits import Split


def png(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


PNGS = [png(i) for i in range(3)]
STRUCT = [{"content": content, "file": "a.png"} for content in PNGS]


def view(*fields: str) -> pa.DataType:
    return pa.struct(
        [(name, pa.binary_view() if i == 0 else pa.string_view()) for i, name in enumerate(fields)]
    )


def write(path: Path, image: pa.Array | list = PNGS, **columns: pa.Array | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:  # whatever its name
        parquet.write_table(pa.table({"image": image, **columns}), file)
    return path


def source(path: object, streaming: bool = False, caption_column: str | None = None) -> Source:
    return Source("data.path", str(path), 16, 0, streaming, "image", caption_column)


def num_pictures(split: Split) -> int:
    """Rows whose pictures are those of `PNGS`, in their order, again and again."""
    pixels = [decode(row, 16) for row in split.rows]
    assert all((p == decode({"image": PNGS[i % 3]}, 16)).all() for i, p in enumerate(pixels))
    return len(pixels)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "column",
    [
        pa.array(PNGS),
        pa.array(PNGS, pa.large_binary()),
        pa.array(PNGS, pa.binary_view()),
        pa.array(PNGS).dictionary_encode(),
        pa.array([[content] for content in PNGS]),
        pa.array([[None, content, b"more"] for content in PNGS]),
        pa.array([[content] for content in PNGS], pa.large_list(pa.binary())),
        pa.array([[content] for content in PNGS], pa.list_(pa.binary(), 1)),
        pa.array([list(content) for content in PNGS], pa.list_(pa.uint8())),
        pa.array([list(content) for content in PNGS]),
        pa.array([{"bytes": content} for content in PNGS]),
        pa.array([{"width": 20, "name": "a", "data": content} for content in PNGS]),
        pa.array(STRUCT),
        pa.array(STRUCT, view("content", "file")),
        pa.array([[one] for one in STRUCT]),
        pa.array([{"image": one} for one in STRUCT]),
    ],
    ids=lambda column: str(column.type),
)
def test_pictures_are_found_in_columns_of_many_types(
    tmp_path: Path, column: pa.Array, streaming: bool
) -> None:
    split = source(write(tmp_path / "t.parquet", column), streaming).read("train")
    assert num_pictures(split) == 3


@pytest.mark.parametrize("nested", [False, True])
def test_pictures_of_the_type_image_stay_encoded(tmp_path: Path, nested: bool) -> None:
    kind = datasets.List(datasets.Image()) if nested else datasets.Image()
    cells = [{"bytes": content, "path": None} for content in PNGS]
    cells = [[cell] for cell in cells] if nested else cells
    table = datasets.Dataset.from_dict({"image": cells}, datasets.Features({"image": kind}))
    table.to_parquet(tmp_path / "t.parquet")
    for streaming in (False, True):
        split = source(tmp_path / "t.parquet", streaming).read("train")
        assert num_pictures(split) == 3
        assert (
            PNGS[0] in str(next(iter(split.rows))).encode()
            or b"\\x89PNG" in str(next(iter(split.rows))).encode()
        )


def test_paths_are_read_if_they_are_regular_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNGS[0])
    row = {"image": {"title": "b.png", "path": str(tmp_path / "a.png"), "bytes": None}}
    assert decode(row, 16).shape == (3, 20, 20)
    os.mkfifo(tmp_path / "fifo.png")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "fifo.png"), "/dev/zero", str(tmp_path)]
    paths += ["x" * 5000, "a\0b", "https://example.com/a.png", "", None]
    path = write(tmp_path / "t.parquet", pa.array(paths), text=[f"c{i}" for i in range(9)])
    data = ImageData(str(path), image_size=16, batch_size=9, num_val=0)
    data.setup("fit")
    with pytest.warns(UserWarning, match="skipped so far"):
        [batch] = data.train_dataloader()
    assert set(batch["caption"]) == {"c0"}


@pytest.mark.parametrize(
    ("columns", "named", "expected"),
    [
        ({"text": ["a", "b", ""]}, None, "2"),
        ({"caption": ["a", "b", "c"]}, None, "3"),
        ({"caption": ["a"] * 3, "text": [1, 2, 3]}, None, "3"),
        ({"captions": [["a", "b"], [], None]}, None, "1"),
        ({"story": ["a", "b", None]}, "story", "2"),
        ({"story": ["a", "b", None]}, None, "none"),
        ({"text": pa.array(["a", "b", None], pa.string_view())}, None, "2"),
    ],
)
def test_captions_are_found_and_counted(
    tmp_path: Path, columns: dict, named: str | None, expected: str
) -> None:
    path = write(tmp_path / "t.parquet", **columns)
    told = str(source(path, caption_column=named).read("train"))
    assert told == f"3 pictures of 3 rows, {expected} with captions; from {path}"
    without = "out" if expected == "none" else ""
    told = str(source(path, streaming=True, caption_column=named).read("train"))
    assert told == f"pictures of a stream, with{without} captions; from {path}"


@pytest.mark.parametrize("name", ["clone", "clone [1]", b"caf\xe9"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_clone_of_a_hub_data_set_is_read_by_splits(
    tmp_path: Path, name: str | bytes, streaming: bool
) -> None:
    clone = tmp_path / os.fsdecode(name)
    for shard in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        write(clone / "data" / f"{shard}.parquet")
    (clone / "README.md").write_text("# A card with a picture")
    (clone / "card.png").write_bytes(PNGS[0])
    both = source(clone, streaming)
    assert num_pictures(both.read("train")) == 6
    assert num_pictures(both.read("val")) == 3


def test_folders_and_names_of_shards_say_splits(tmp_path: Path) -> None:
    for name in ("a/train/0", "a/test/0", "b/0", "b/1", "c/train-0", "c/train-1"):
        write(tmp_path / f"{name}.parquet")
    assert source(tmp_path / "a").readers.keys() == {"train", "test"}
    for name, number in (("b", 6), ("b/*.parquet", 6), ("b/0.parquet", 3), ("c", 6)):
        assert num_pictures(source(tmp_path / name).read("train")) == number


def test_shards_without_rows_are_left_out(tmp_path: Path) -> None:
    """Of a folder that has a file's name, as Spark writes."""
    folder = tmp_path / "t.parquet"
    write(folder / "0.parquet")
    write(folder / "1.parquet", pa.array([], pa.binary()))
    damaged = write(folder / "2.parquet")
    damaged.write_bytes(damaged.read_bytes()[:-9])
    (folder / "3.parquet").write_text("version https://git-lfs.github.com/spec/v1\n")
    split = source(folder).read("train")
    assert num_pictures(split) == 3
    for reason in ("1 empty", "1 damaged", "1 not fetched by Git LFS"):
        assert reason in str(split)


SAVED = datasets.Dataset.from_dict(
    {"image": [{"bytes": content, "path": None} for content in PNGS]},
    datasets.Features({"image": datasets.Image()}),
)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_data_set_is_read(tmp_path: Path, streaming: bool) -> None:
    SAVED.with_format("numpy").save_to_disk(tmp_path / "one [1]")
    both = datasets.DatasetDict({"train": SAVED.select([0]), "validation": SAVED})
    both.save_to_disk(tmp_path / "both")
    assert num_pictures(source(tmp_path / "one [1]", streaming).read("train")) == 3
    assert num_pictures(source(tmp_path / "both", streaming).read("train")) == 1
    assert num_pictures(source(tmp_path / "both", streaming).read("val")) == 3


def save_damaged(path: Path) -> None:
    SAVED.save_to_disk(path)
    next(path.glob("*.arrow")).write_bytes(b"damaged")


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda path: write(path / "t.parquet", pa.nulls(3)), "data.image_column"),
        (lambda path: write(path / "t.parquet", [1, 2, 3]), "data.image_column"),
        (lambda path: write(path / "t.parquet", pa.array([], pa.binary())), "data.path"),
        (lambda path: (path / "t.parquet").write_bytes(b""), "data.path"),
        (lambda path: (write(path / "0.parquet"), write(path / "1.parquet", [1])), "data.path"),
        (
            lambda path: write(
                path / "t.parquet",
                more=pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
            ),
            "data.path",
        ),
        (lambda path: (path / "train.tar").touch(), "data.path"),
        (lambda path: (path / "state.json").write_text("{"), "data.path"),
        (save_damaged, "data.path"),
    ],
)
def test_other_tables_are_told(tmp_path: Path, make: Callable[[Path], object], option: str) -> None:
    make(tmp_path)
    with pytest.raises(Mistake) as told:
        source(tmp_path).read("train")
    assert told.value.option == option
    assert "\n" not in told.value.sentence


def test_a_stream_that_ends_in_damage_is_told(tmp_path: Path) -> None:
    path, content = tmp_path / "t.parquet", b"".join(PNGS)
    write(path, pa.array([content + bytes([i]) for i in range(90)]))
    whole = path.read_bytes()
    path.write_bytes(whole[:200] + bytes(2000) + whole[2200:])
    options = {"streaming": True, "samples_per_epoch": 90, "num_val": 0}
    data = ImageData(str(path), image_size=16, batch_size=9, **options)
    data.setup("fit")
    with pytest.raises(Mistake) as told:
        list(data.train_dataloader())
    assert told.value.option == "data.path"
