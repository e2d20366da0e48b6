"""`pid decode --continue`, and several processes that decode into one folder."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from decoders import make
from PIL import Image

from pid_lightning.__main__ import main
from pid_lightning.files.atomic import claimed, replaced_file


@pytest.fixture
def decode(tmp_path: Path):
    """Decodes three pictures to a folder, with options; returns the exit status."""
    make(latent_channels=128, latent_stride=16).save_pretrained(tmp_path / "model")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (16, 16), (80 * i, 90, 100)).save(photos / f"{name}.png")

    def run(*options: str) -> int:
        model = tmp_path / "model" / "model.safetensors"
        try:
            main(
                [
                    "decode",
                    str(photos),
                    f"--model={model}",
                    f"--output={tmp_path / 'out'}",
                    *options,
                ]
            )
        except SystemExit as status:
            return int(status.code)
        return 0

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_killed_decode_goes_on_where_it_stopped(decode, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert decode("--compare") == 0
    whole = contents(out)
    for name in ("b.png", "c.png", "c.json", "c_compare.png"):  # as if killed in c, and within b
        (out / name).unlink()
    litter = out / ".c.png.123-abcdef.tmp"
    litter.touch()
    os.utime(litter, (0, 0))
    assert decode("--compare") == 2
    assert decode("--compare", "--continue", "--seed=1") == 2
    assert decode("--compare", "--continue") == 0
    after = contents(out)
    assert {name: pixels for name, (_, pixels) in after.items()} == {
        name: pixels for name, (_, pixels) in whole.items()
    }
    assert after["a.png"] == whole["a.png"]  # not made anew
    assert decode("--compare", "--continue") == 0
    assert contents(out) == after
    assert decode("--compare", "--continue", "--seed=1", "--overwrite") == 0
    assert all(value != after[name] for name, value in contents(out).items())


def test_two_processes_never_make_the_same_picture(decode, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with claimed(out / "a.json") as is_ours:  # by the other one
        assert is_ours
        assert decode() == 2
        assert sorted(contents(out)) == [".a.json.0-000000.tmp"]
        assert decode("--continue") == 0
    assert sorted(contents(out)) == ["b.json", "b.png", "c.json", "c.png"]


def test_a_name_is_claimed_by_one_at_a_time(tmp_path: Path) -> None:
    path, made = tmp_path / "a.png", []

    def write(number: int) -> None:
        while not path.exists():
            with claimed(path) as is_ours:
                if is_ours and not path.exists():
                    made.append(number)
                    with replaced_file(path) as temporary:
                        temporary.write_text(str(number))

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(write, range(20)))
    assert [int(path.read_text())] == made
    assert [*tmp_path.iterdir()] == [path]


def test_only_what_the_dead_left_is_cleared(tmp_path: Path) -> None:
    theirs = tmp_path / ".notes.tmp"
    stale = tmp_path / ".other.png.1-0123ab.tmp"
    with replaced_file(tmp_path / "living.png") as living:
        for path in (theirs, stale, living):
            path.touch()
            os.utime(path, (0, 0))
        with replaced_file(tmp_path / "a.png"):
            pass
        assert living.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".notes.tmp", "a.png", "living.png"]
