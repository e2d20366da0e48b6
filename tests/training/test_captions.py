"""Captions of a folder's pictures: the keys and layouts people use, and those that match none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pid_lightning.checks import Mistake
from pid_lightning.files.folders import list_files
from pid_lightning.training.data.captions import captions_beside, find_captions
from pid_lightning.training.data.prediction_inputs import PredictionInputs

NFC, NFD = "caf\u00e9", "cafe\u0301"


def entries(**captions: object) -> str:
    """Lines of metadata, of pictures p0.png, p1.png, ... under a key each."""
    return "\n".join(
        json.dumps({"file_name": f"p{i}.png", key: caption})
        for i, (key, caption) in enumerate(captions.items())
    )


def find(
    root: Path, files: dict[str, str], key: str | None = None, under: str = "."
) -> tuple[dict[str, str], list[str]]:
    """Write files, empty ones of pictures; the captions found, by names, and what is said."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode())
    folder = root / under
    listed = list_files(folder).files
    pictures = [file for file in listed if file.suffix in (".png", ".jpg")]
    captions, notes = find_captions(folder, pictures, listed, key)
    return {str(file.relative_to(folder)): text for file, text in captions.items()}, notes


P = {"p0.png": "", "p1.png": "", "p2.png": ""}


@pytest.mark.parametrize(
    ("files", "captions"),
    [
        (P | {"metadata.jsonl": entries(text="a", caption="b", prompt="c")}, "a b c"),
        (P | {"metadata.jsonl": entries(Caption="a", TEXT=["b", "x"], text=[])}, "a b -"),
        (P | {"metadata.jsonl": "\ufeff" + entries(text="a")}, "a - -"),
        (P | {"metadata.csv": "file_name,text\np0.png,a\n\np2.png,c\n"}, "a - c"),
        (P | {"metadata.csv": '\ufeffcaption;File_Name\r\n"a";p0.png\r\nb;p1.png'}, "a b -"),
        (P | {"metadata.csv": "image\tcaption\np0.png\ta,1\n\t\n"}, "a,1 - -"),
        (P | {"metadata.csv": 'file_name,text\np0.png,"a\nb"\np1.png,c\n'}, "a\nb c -"),
        (P | {"p0.txt": "a\n", "p1.png.txt": "b", "p2.caption": "c"}, "a b c"),
        (P | {"p0.TXT": "a", "p1.txt": "b", "p1.caption": "other"}, "a b -"),
        (P | {"p0.txt": "own", "metadata.jsonl": entries(text="a", caption="b")}, "own b -"),
    ],
)
def test_keys_and_layouts_that_people_use(
    tmp_path: Path, files: dict[str, str], captions: str
) -> None:
    found, notes = find(tmp_path, files)
    told = [found.get(name, "") or "-" for name in P]
    assert told == captions.split(" ")
    assert notes == []


@pytest.mark.parametrize(
    ("picture", "named"),
    [
        ("p.png", "p.jpg"),  # another suffix
        ("p.png", "p"),
        ("p.png", "./p.png"),
        ("a/p.png", "a/p.png"),
        ("a/p.png", "a\\p.png"),
        ("a/p.png", "p.png"),
        ("p.png", "a/p.png"),
        ("p.png", "/another/machine/p.jpg"),
        ("p.png", "C:\\another\\machine\\p.png"),
        (f"{NFC}.png", f"{NFD}.png"),
        (f"{NFD}.png", f"{NFC}.png"),
        (f"{NFD}/p.png", f"{NFC}/p.jpg"),
        ("v1.2.png", "v1.2"),
    ],
)
@pytest.mark.parametrize("above", [False, True])
def test_an_entry_finds_its_picture(tmp_path: Path, picture: str, named: str, above: bool) -> None:
    line = json.dumps({"file_name": named, "text": "found"})
    folder = f"photos/{'x/' * above}"
    files = {f"photos/{'x/' * above}{picture}": "", "photos/metadata.jsonl": line}
    if above and "/" in named and named[0] not in "/C":
        files["photos/metadata.jsonl"] = line.replace(named, f"x/{named}")
    assert find(tmp_path, files, under=folder) == ({picture: "found"}, [])


@pytest.mark.parametrize("name", [NFC, NFD])
def test_texts_are_found_in_composed_and_decomposed_letters(tmp_path: Path, name: str) -> None:
    files = {f"{NFD}.png": "", f"{name}.txt": "found"}
    assert find(tmp_path, files)[0] == {f"{NFD}.png": "found"}


def test_the_exact_name_and_the_nearest_metadata_go_first(tmp_path: Path) -> None:
    files = {
        "a/p.png": "",
        "a/p.jpg": "",
        "b/p.png": "",
        "metadata.jsonl": '{"file_name": "a/p.png", "text": "far"}\n'
        '{"file_name": "a/p.jpg", "text": "jpg"}\n{"file_name": "b/p.gif", "text": "b"}',
        "a/metadata.jsonl": '{"file_name": "p.png", "text": "near"}\n'
        '{"file_name": "p.png", "text": "once more"}',
    }
    expected = {"a/p.png": "near", "a/p.jpg": "jpg", "b/p.png": "b"}
    assert find(tmp_path, files) == (expected, [])


def test_entries_of_other_pictures_are_not_taken(tmp_path: Path) -> None:
    """Of a namesake beside the metadata above, and of two that have the name."""
    lines = '{"file_name": "p.png", "text": "of another"}'
    files = {"p.png": "", "photos/p.png": "", "metadata.jsonl": lines}
    assert find(tmp_path, files, under="photos") == ({}, [])
    files = {"a/q.png": "", "b/q.png": "", "metadata.jsonl": lines.replace("p.png", "q.png")}
    found, [note] = find(tmp_path / "twice", files)
    assert found == {}
    assert "'q.png'" in note


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (P | {"metadata.jsonl": entries(text="a").replace("p0", "x0")}, "'x0.png'"),
        (P | {"metadata.csv": "file_name,text\np0.png,a\nx.png,b\n"}, "'x.png'"),
        (P | {"q.txt": "a"}, "q.txt"),
        (P | {"texts/p0.txt": "a"}, "texts/p0.txt"),
        (P | {"metadata.jsonl": entries(story="a")}, "data.caption_column"),
        (P | {"metadata.jsonl": '{"file_name": "p0\\u0000.png", "text": "a"}'}, "x00.png"),
    ],
)
def test_captions_that_match_no_picture_are_told_once(
    tmp_path: Path, files: dict[str, str], named: str
) -> None:
    _, [note] = find(tmp_path, files)
    assert named in note


@pytest.mark.parametrize(
    "files",
    [
        P | {"README.txt": "a", "LICENSE.txt": "b"},
        P | {"p0.txt": "a", "notes.txt": "b"},
    ],
)
def test_other_texts_are_no_captions(tmp_path: Path, files: dict[str, str]) -> None:
    assert find(tmp_path, files)[1] == []


def test_a_key_may_be_named(tmp_path: Path) -> None:
    files = P | {"metadata.jsonl": entries(story="a", text="not this")}
    assert find(tmp_path, files, key="story")[0] == {"p0.png": "a"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", "[" * 100_000),
        ("metadata.jsonl", '{"file_name": "p0.png", "n": ' + "9" * 5000 + "}"),
        ("metadata.jsonl", '{"file_name": {}, "text": "a"}'),
        ("metadata.csv", "title,year\nMona Lisa,1503\n"),
        ("metadata.csv", "file_name,text\np0.png," + "a" * 200_000),
        ("p0.txt", "a" * 2_000_000),
    ],
)
def test_what_is_no_entry_is_told(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(Mistake, match=name) as told:
        find(tmp_path, P | {name: content})
    assert told.value.option == "caption"
    assert "\n" not in told.value.sentence
    found = find(tmp_path / "x", {"y/p0.png": "", name: content}, under="y")
    assert found == ({}, [])  # it may be about anything


def test_halves_of_letters_become_text(tmp_path: Path) -> None:
    found, _ = find(tmp_path, P | {"metadata.jsonl": entries(text="a").replace('"a"', r'"\ud83d"')})
    assert found["p0.png"].encode()


def test_prediction_finds_captions_likewise(tmp_path: Path) -> None:
    files = {"a/p0.png": "", "b/p1.png": "", "b/p1.txt": "one", "metadata.csv": "file,caption\n"}
    find(tmp_path, files)
    (tmp_path / "a" / "metadata.jsonl").write_text(entries(caption="zero"))
    assert captions_beside([tmp_path / "b/p1.png", tmp_path / "a/p0.png"]) == ["one", "zero"]
    inputs = PredictionInputs([str(tmp_path / "a"), str(tmp_path / "b")])
    assert [item["caption"] for item in inputs] == ["zero", "one"]
