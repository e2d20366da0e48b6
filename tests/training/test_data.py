"""ImageData: what is read, what is skipped, and that a resumed run gets the same batches."""

from __future__ import annotations

import csv
import io
import json
import warnings
from types import SimpleNamespace

import datasets
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from pid_lightning.checks import Mistake
from pid_lightning.pictures.files import read_picture
from pid_lightning.training.data.draws import ShuffledDraws
from pid_lightning.training.data.image_data import ImageData
from pid_lightning.training.data.samples import Pictures, random_crop
from pid_lightning.training.data.sources import BUNDLED_PHOTOS


def picture(number: int, width: int = 24, height: int = 20, mode: str = "RGB") -> Image.Image:
    """A noise picture, so that no two crops are equal."""
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def fill(folder, num_pictures: int, **size: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(num_pictures):
        picture(i, **size).save(folder / f"p{i:02d}.png")
    return str(folder)


def parquet(folder, num_pictures: int, bad: dict[int, bytes] | None = None) -> str:
    rows = []
    for i in range(num_pictures):
        buffer = io.BytesIO()
        picture(i).save(buffer, "PNG")
        image = {"bytes": (bad or {}).get(i, buffer.getvalue()), "path": None}
        rows.append({"photo": image, "words": f"caption {i}"})
    datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    return str(folder / "train.parquet")


def data_module(path: str, **changes) -> ImageData:
    options = {"image_size": 16, "batch_size": 4, "num_val": 2, "seed": 1}
    return ImageData(path, **(options | changes))


@pytest.fixture(autouse=True)
def quick_streams(monkeypatch):
    """Skip the 5 s that `datasets` waits for its threads after each pass of a shuffled stream."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


def assert_refused(option: str, act, *arguments, **settings) -> str:
    """Call what must refuse an option in one line; returns the sentence."""
    with pytest.raises(Mistake) as told:
        act(*arguments, **settings)
    assert told.value.option == option
    assert "\n" not in told.value.sentence
    return told.value.sentence


def ready(path: str, stage: str = "fit", **changes) -> ImageData:
    data = data_module(path, **changes)
    data.setup(stage)
    return data


def names(loader) -> list[str]:
    return [name for batch in loader for name in batch["name"]]


class Recorder(pl.LightningModule):
    """Records every training batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[float, ...]] = []

    def training_step(self, batch):
        self.seen.append(tuple(batch["image"].double().sum(dim=(1, 2, 3)).tolist()))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: ImageData, folder, max_steps: int, ckpt_path=None, **options):
    """Train up to `max_steps`; return the batches and the last checkpoint."""
    module = Recorder()
    saver = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=5, save_on_train_epoch_end=False
    )
    trainer = pl.Trainer(
        max_steps=max_steps,
        callbacks=[saver],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable.*")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.seen, saver.last_model_path


# ---- batches


def test_a_batch_is_what_the_contract_says(tmp_path):
    batch = next(iter(ready(fill(tmp_path, 6)).train_dataloader()))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["image"].dtype == torch.float32
    assert batch["image"].min() >= -1
    assert batch["image"].max() <= 1
    assert batch["caption"] == [""] * 4
    assert all(isinstance(name, str) for name in batch["name"])


def test_evaluation_takes_the_centre_of_the_upright_picture(tmp_path):
    original = picture(0, width=24, height=20)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    original.save(tmp_path / "turned.png", exif=exif)
    upright = np.asarray(original.rotate(-90, expand=True))  # 24 high, 20 wide
    want = torch.from_numpy(upright[4:20, 2:18].copy()).permute(2, 0, 1) / 127.5 - 1
    for cache_bytes in (0, 2**20):
        data = ready(
            fill(tmp_path / "t", 1), "test", test_path=str(tmp_path), cache_bytes=cache_bytes
        )
        [batch] = data.test_dataloader()
        torch.testing.assert_close(batch["image"][batch["name"].index("turned")], want)


def test_16_bit_pictures_train_as_they_are_decoded(tmp_path):
    greys = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(greys).save(tmp_path / "grey.png")
    data = ImageData(str(tmp_path), image_size=64, batch_size=1, num_val=0, flip=False)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    expected = read_picture(tmp_path / "grey.png")
    assert expected.std() > 0.5
    torch.testing.assert_close(batch["image"][0], expected, rtol=0, atol=1e-6)


def test_random_crops_are_windows_of_the_picture_and_cover_it():
    source = torch.arange(20 * 24).reshape(1, 20, 24).expand(3, -1, -1)
    corners, mirrored = set(), 0
    for seed in range(600):
        generator = torch.Generator().manual_seed(seed)
        window = random_crop(source, 16, "none", True, generator)[0]
        if window[0, 0] > window[0, 1]:
            window, mirrored = window.flip(-1), mirrored + 1
        top, left = divmod(int(window[0, 0]), 24)
        assert torch.equal(window, source[0, top : top + 16, left : left + 16])
        corners.add((top, left))
    assert corners == {(top, left) for top in range(5) for left in range(9)}
    assert 240 < mirrored < 360


def test_random_resize_ranges_from_the_crop_to_the_whole_shorter_side():
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 64, 128)
    widths = []
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        window = random_crop(ramp, 16, "random", False, generator)
        assert window.shape == (3, 16, 16)
        widths.append(float(window[0, 0, -1] - window[0, 0, 0]) * 16 / 15)
    assert 15 <= min(widths) < 18
    assert 58 < max(widths) <= 66


# ---- sources, splits, captions


def test_sub_folders_are_the_splits(tmp_path):
    for split, num in (("train", 5), ("val", 3), ("test", 2)):
        fill(tmp_path / split / "deeper", num)
    data = ready(str(tmp_path), None)
    sizes = [
        len(set(names(loader)))
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert sizes == [5, 3, 2]


def test_held_out_pictures_are_spread_and_never_trained_on(tmp_path):
    data = ready(fill(tmp_path, 10), None, samples_per_epoch=80)
    held = names(data.val_dataloader())
    assert held == names(data.test_dataloader()) == ["p02", "p07"]
    assert set(names(data.train_dataloader())) == {f"p{i:02d}" for i in range(10)} - set(held)
    assert ready(str(tmp_path), num_val=0).val_dataloader() == []
    for stage in ("validate", "test"):
        assert_refused("data.num_val", ready, str(tmp_path), stage, num_val=0)


def test_one_of_val_and_test_serves_for_both(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "test", 2)
    data = ready(str(tmp_path), None)
    assert names(data.val_dataloader()) == names(data.test_dataloader()) == ["p00", "p01"]
    other = fill(tmp_path / "other", 4)
    assert len(names(ready(str(tmp_path), "test", test_path=other).test_dataloader())) == 4
    assert_refused("data.test_path", ready, str(tmp_path), "test", test_path="nowhere")


def test_photographs_are_listed_free_and_large_enough():
    with open(BUNDLED_PHOTOS / "MANIFEST.tsv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    files = {path.relative_to(BUNDLED_PHOTOS).as_posix() for path in BUNDLED_PHOTOS.rglob("*.jpg")}
    assert {row["file"] for row in rows} == files
    assert 16 <= len(files) <= 24
    assert sum((BUNDLED_PHOTOS / name).stat().st_size for name in files) <= 3_000_000
    for row in rows:
        assert row["licence"] == "CC0-1.0" or row["licence"].startswith("Public domain")
        assert row["author"]
        assert row["source"]
        with Image.open(BUNDLED_PHOTOS / row["file"]) as picture:
            assert picture.size == (int(row["width"]), int(row["height"]))
            assert min(picture.size) >= 256


def test_bundled_photographs_are_read():
    files = {f.stem for f in (BUNDLED_PHOTOS / "test").glob("*.jpg")}
    assert set(names(ready("bundled", "test").test_dataloader())) == files


def test_captions_beside_the_pictures(tmp_path):
    fill(tmp_path / "train", 3)
    fill(tmp_path / "val", 1)
    (tmp_path / "train" / "p00.txt").write_text("from a text file\n")
    lines = [
        {"file_name": "train/p00.png", "text": "not this one"},
        {"file_name": "train/p01.png", "text": "from the table"},
        {"file_name": "val/p00.png", "text": "validation"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    data = ready(str(tmp_path))
    batch = next(iter(data.train_dataloader()))
    pairs = dict(zip(batch["name"], batch["caption"], strict=True))
    assert pairs == {"p00": "from a text file", "p01": "from the table", "p02": ""}
    assert next(iter(data.val_dataloader()))["caption"] == ["validation"]
    for line in (
        b'{"file": 1}',
        b'{"file_name": "a.png", "text": 5}',
        b'{"text": "caf\xe9"}',
        b"5",
    ):
        (tmp_path / "metadata.jsonl").write_bytes(b"\n" + line + b"\n")
        told = assert_refused("caption", ready, str(tmp_path))
        assert f"{tmp_path / 'metadata.jsonl'}, line 2" in told
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "train" / "p00.txt").write_bytes(b"caf\xe9")
    assert "p00.txt" in assert_refused("caption", ready, str(tmp_path))


def test_captions_from_windows_editors_lose_their_byte_order_mark(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "p00.txt").write_text("a cat", encoding="utf-8-sig")
    entry = json.dumps({"file_name": "p01.png", "text": "a dog"})
    (tmp_path / "metadata.jsonl").write_text(entry, encoding="utf-8-sig")
    batch = next(iter(ready(str(tmp_path), num_val=0, batch_size=2).train_dataloader()))
    assert sorted(batch["caption"]) == ["a cat", "a dog"]


def test_equal_stems_get_names_of_their_own(tmp_path):
    fill(tmp_path / "a", 1)
    fill(tmp_path / "b", 1)
    assert set(names(ready(str(tmp_path), num_val=0).train_dataloader())) == {"a__p00", "b__p00"}


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_columns(tmp_path, streaming):
    path = parquet(tmp_path, 9)
    data = ready(
        path,
        streaming=streaming,
        samples_per_epoch=28,
        image_column="photo",
        caption_column="words",
    )
    shown = {c for batch in data.train_dataloader() for c in batch["caption"]}
    held = [c for batch in data.val_dataloader() for c in batch["caption"]]
    assert held == (["caption 0", "caption 1"] if streaming else ["caption 2", "caption 6"])
    assert shown == {f"caption {i}" for i in range(9)} - set(held)
    assert "words" in assert_refused("data.image_column", ready, path)


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_a_table_are_read_as_they_were_stored(tmp_path, streaming):
    """Also from a column of the type `Image`, which a stream might decode and compress again."""
    stored = []
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.jpg", quality=90)
        stored.append((tmp_path / f"{i}.jpg").read_bytes())
    features = {"photo": datasets.Image(), "words": datasets.List(datasets.Value("string"))}
    table = {
        "photo": [*({"bytes": b, "path": None} for b in stored), None],
        "words": [["a"], ["b", "c"], [None], ["d"]],
    }
    table = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    table.to_parquet(tmp_path / "train.parquet")
    data = ready(
        str(tmp_path / "train.parquet"),
        streaming=streaming,
        samples_per_epoch=12,
        num_val=0,
        image_column="photo",
        caption_column="words",
    )
    rows = data.source.read("train").rows
    assert [row["image"]["bytes"] for row in rows if row["image"] is not None] == stored
    with pytest.warns(UserWarning, match="not a picture"):
        shown = {caption for batch in data.train_dataloader() for caption in batch["caption"]}
    assert shown == {"a", "b", ""}


# ---- errors


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_another_type_are_told(tmp_path, streaming):
    path = parquet(tmp_path, 4)
    table = datasets.load_dataset("parquet", data_files=path)["train"]
    table = table.add_column("rank", [1, 2, 3, 4]).add_column("told", [{"en": "a"}] * 4)
    table.add_column("empty", [None] * 4).to_parquet(path)
    columns = {"image_column": "photo", "caption_column": "words", "streaming": streaming}
    columns |= {"samples_per_epoch": 4}
    for name, column in (("caption", "rank"), ("image", "rank"), ("caption", "told")):
        wrong = columns | {f"{name}_column": column}
        assert column in assert_refused(f"data.{name}_column", ready, path, **wrong)
    batch = next(iter(ready(path, **columns | {"caption_column": "empty"}).train_dataloader()))
    assert set(batch["caption"]) == {""}


def test_a_stream_without_a_picture_to_train_on_names_num_val(tmp_path):
    data = ready(
        parquet(tmp_path, 4), streaming=True, num_val=50, image_column="photo", samples_per_epoch=4
    )
    assert_refused("data.num_val", next, iter(data.train_dataloader()))


def test_overfitting_repeats_the_same_batches(tmp_path):
    fill(tmp_path, 8)

    module = Recorder()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(overfit_batches=2, max_epochs=3, accelerator="cpu", **quiet)
    trainer.fit(module, data_module(str(tmp_path)))
    assert len(module.seen) == 6
    assert module.seen == 3 * module.seen[:2]
    assert module.seen[0] != module.seen[1]


def test_unusable_pictures_are_named_once_and_skipped(tmp_path):
    fill(tmp_path, 4)
    (tmp_path / "text.jpg").write_text("no picture")
    picture(7, width=200, height=10).save(tmp_path / "flat.png")
    whole = (tmp_path / "p00.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="3 of 7 pictures in .* skipped") as caught:
        data = ready(str(tmp_path), num_val=0)
    message = str(caught[0].message)
    assert len(caught) == 1
    for part in (
        "text.jpg (not a picture",
        "flat.png (200 x 10, below",
        "half.png (image file is trunc",
    ):
        assert part in message
    assert set(names(data.train_dataloader())) == {"p00", "p01", "p02", "p03"}


def test_a_picture_damaged_behind_its_header_gives_way_to_the_next(tmp_path):
    fill(tmp_path, 4)
    whole = (tmp_path / "p01.png").read_bytes()
    (tmp_path / "p01.png").write_bytes(whole[: len(whole) // 2])
    data = ready(str(tmp_path), num_val=0, cache_bytes=0)
    with pytest.warns(UserWarning, match="1 picture.* skipped so far, most recently p01: "):
        assert sorted(names(data.train_dataloader())) == ["p00", "p02", "p02", "p03"]


def test_a_stream_needs_a_held_out_picture_for_every_process(tmp_path):
    path = parquet(tmp_path, 9)
    options = {"samples_per_epoch": 8, "image_column": "photo", "num_val": 1}
    for streaming in (False, True):
        data = data_module(path, streaming=streaming, **options)
        data.trainer = SimpleNamespace(world_size=2, global_rank=0)
        if streaming:
            assert "at least 2" in assert_refused("data.num_val", data.setup, "fit")
        else:  # repeated, so that every process has one
            data.setup("fit")
    (tmp_path / "val").mkdir()
    parquet(tmp_path / "val", 9)
    (tmp_path / "val" / "train.parquet").rename(tmp_path / "val.parquet")
    whole = data_module(str(tmp_path), streaming=True, **options)
    whole.trainer = SimpleNamespace(world_size=2, global_rank=0)
    whole.setup("fit")
    # A split of its own has 9, whatever num_val; this process has every other one.
    assert [n for b in whole.val_dataloader() for n in b["number"].tolist()] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("streaming", [False, True])
def test_unusable_rows_are_skipped_as_they_come(tmp_path, streaming):
    path = parquet(tmp_path, 6, bad={3: b"no picture"})
    options = {"image_column": "photo", "caption_column": "words", "num_val": 0}
    data = ready(path, streaming=streaming, samples_per_epoch=20, **options)
    with pytest.warns(UserWarning, match="skipped so far"):
        shown = {c for batch in data.train_dataloader() for c in batch["caption"]}
    assert shown == {f"caption {i}" for i in (0, 1, 2, 4, 5)}
    huge = ready(path, streaming=streaming, samples_per_epoch=20, image_size=64, **options)
    with pytest.warns(UserWarning, match="skipped so far"):
        told = assert_refused("data.path", next, iter(huge.train_dataloader()))
    assert "64" in told


@pytest.mark.parametrize(
    ("make", "changes", "option", "named"),
    [
        (lambda d: str(d / "none"), {}, "data.path", "none'"),
        (lambda d: "misspelt", {}, "data.path", "'misspelt'"),
        (lambda d: "", {}, "data.path", "''"),
        (lambda d: "owner/name", {}, "data.path", "'owner/name'"),
        (lambda d: str(d), {}, "data.path", "none of 0"),
        (lambda d: fill(d, 3), {"image_size": 32}, "data.path", "none of 3"),
        (lambda d: fill(d, 3), {"num_val": 3}, "data.num_val", "3"),
        (lambda d: fill(d / "test", 3)[:-5], {}, "data.path", "splits test"),
        (lambda d: fill(d, 3), {"streaming": True, "samples_per_epoch": 3}, "data.path", "parquet"),
        (lambda d: "x", {"image_size": 0}, "data.image_size", "0"),
        (lambda d: "x", {"batch_size": 0}, "data.batch_size", "0"),
        (lambda d: "x", {"resize": "up"}, "data.resize", "'up'"),
        (lambda d: "x", {"streaming": True}, "data.samples_per_epoch", "set a number"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path, monkeypatch, make, changes, option, named):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    path = make(tmp_path)
    assert named in assert_refused(option, ready, path, **changes)


def test_an_epoch_is_one_pass_over_all_processes(tmp_path):
    data = ready(fill(tmp_path, 9), num_val=0, batch_size=2)
    assert len(data.train_dataloader()) == 5
    data.trainer = SimpleNamespace(world_size=2, global_rank=0)
    assert len(data.train_dataloader()) == 3


# ---- order, reproducibility, resuming


def draws(rank: int, world_size: int, batch_size: int, start: int = 0) -> list[tuple[int, int]]:
    class Seven(Pictures):
        def __len__(self):
            return 7

    pictures = Seven(None, 16, True, "none", True, seed=3)
    batches = ShuffledDraws(pictures, 5, batch_size, rank, world_size, position=lambda: start)
    return list(batches)


def test_each_pass_holds_every_picture_once():
    order = [index for batch in draws(0, 1, 7) for index, _ in batch]
    passes = [order[i : i + 7] for i in range(0, 35, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_ranks_share_out_the_batches_of_one_process():
    alone, first, second = draws(0, 1, 4), draws(0, 2, 2), draws(1, 2, 2)
    assert all(set(one) == set(a) | set(b) for one, a, b in zip(alone, first, second, strict=True))
    assert draws(0, 1, 4, start=2)[:3] == alone[2:]


def test_the_batches_depend_on_the_seed_alone(tmp_path):
    path = fill(tmp_path, 6)

    def images(**changes):
        return torch.cat([b["image"] for b in ready(path, **changes).train_dataloader()])

    first = images()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert torch.equal(first, images(cache_bytes=0))
    assert torch.equal(first, images(num_workers=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, images(seed=2))


def test_seed_everything_governs_a_seed_left_open(tmp_path, monkeypatch):
    path = fill(tmp_path, 6)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert names(ready(path, seed=None).train_dataloader()) == names(ready(path).train_dataloader())


# Resumed mid-epoch, at the end of an epoch, in one epoch.
@pytest.mark.parametrize(("num_samples", "num_workers"), [(24, 0), (20, 0), (400, 0), (24, 2)])
def test_ten_steps_and_ten_more_are_twenty(tmp_path, num_workers, num_samples):
    path = fill(tmp_path / "photos", 9)

    def data():
        return data_module(path, samples_per_epoch=num_samples, num_workers=num_workers)

    options = {"limit_val_batches": 0}
    whole, _ = fit(data(), tmp_path / "whole", 20, **options)
    assert len(set(whole)) == 20
    first, last = fit(data(), tmp_path / "parts", 10, **options)
    second, _ = fit(data(), tmp_path / "parts", 20, ckpt_path=last, **options)
    assert first + second == whole


def test_continuing_holds_with_limits_and_validation_within_epochs(tmp_path):
    path = fill(tmp_path / "photos", 9)
    options = {"limit_train_batches": 7, "val_check_interval": 3}
    whole, _ = fit(data_module(path, samples_per_epoch=64), tmp_path / "whole", 20, **options)
    first, last = fit(data_module(path, samples_per_epoch=64), tmp_path / "parts", 10, **options)
    second, _ = fit(
        data_module(path, samples_per_epoch=64), tmp_path / "parts", 20, last, **options
    )
    assert first + second == whole
    assert len(set(whole)) == 20


def test_a_stream_continues_too(tmp_path):
    path = parquet(tmp_path, 7, bad={2: b"no picture"})

    def data():
        return data_module(
            path, streaming=True, samples_per_epoch=24, image_column="photo", num_val=0
        )

    with pytest.warns(UserWarning, match="skipped so far"):
        whole, _ = fit(data(), tmp_path / "whole", 20)
    first, last = fit(data(), tmp_path / "parts", 10)
    second, _ = fit(data(), tmp_path / "parts", 20, ckpt_path=last)
    assert first + second == whole


def test_continuing_with_other_data_warns(tmp_path):
    path = fill(tmp_path / "photos", 9)
    _, last = fit(data_module(path), tmp_path, 5)
    with pytest.warns(UserWarning, match="seed was 1 in the checkpoint and is 2 now"):
        fit(data_module(path, seed=2), tmp_path, 6, ckpt_path=last)
