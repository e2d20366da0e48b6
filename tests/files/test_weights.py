"""Files of weights: what is saved is loaded, anything else is refused, nothing is ever lost."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from pid_lightning.checks import Mistake
from pid_lightning.files.atomic import make_folder, replaced_file
from pid_lightning.files.hub import save_folder
from pid_lightning.files.models import (
    METADATA_KEY,
    ModelInfo,
    denoiser_state,
    fingerprint,
    load_model,
    read_checkpoint,
    save_model,
)
from pid_lightning.files.tensors import read_tensors
from pid_lightning.nn import AdapterConfig, Geometry, PiD, PiDConfig

CONFIG = PiDConfig(
    width=16,
    num_heads=2,
    num_blocks=2,
    patch_size=8,
    pixel_width=4,
    pixel_attention_width=16,
    pixel_num_heads=2,
    num_pixel_blocks=1,
    text_width=6,
    text_length=3,
    rope_reference=(64, 32),
    adapter=AdapterConfig(width=8, num_res_blocks=1, gate="token", rgb_head=True),
)
INFO = ModelInfo(
    family="VAEPiD",
    encoder={"name": "another", "sample": False},
    latent_space="flux",
    geometry=Geometry(latent_channels=4, latent_stride=4, scale=2),
    image_size=64,
    latent_sigma_max=0.8,
    noise_frame="flow",
    student_times=(0.999, 0.634),
    config=CONFIG,
)


def random_network(seed: int = 0) -> PiD:
    torch.manual_seed(seed)
    network = INFO.build()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(random_network(), INFO, path, torch.float32)
    return path


def checkpoint(**changes: object) -> dict:
    state = {f"denoiser.{k}": v for k, v in random_network().state_dict().items()}
    return {"state_dict": state, METADATA_KEY: INFO.to_plain(), "global_step": 7, **changes}


def assert_equal(network: PiD, expected: PiD) -> None:
    state, other = network.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(state[k], other[k]) for k in state)


def refused(function: Callable, *values: object) -> str:
    """What a file's `path` is refused for, in one line."""
    with pytest.raises(Mistake) as told:
        function(*values)
    assert told.value.option == "path"
    assert "\n" not in told.value.sentence
    return told.value.sentence


# -------------------------------------------------------------------- round trips


def test_info_survives_plain_values() -> None:
    for info in (INFO, dataclasses.replace(INFO, student_times=None, image_size=None)):
        plain = info.to_plain()
        assert json.loads(json.dumps(plain)) == plain
        assert ModelInfo.from_plain(plain) == info
    plain_rope = dataclasses.replace(CONFIG, rope_reference=None)
    info = dataclasses.replace(INFO, config=plain_rope)
    assert ModelInfo.from_plain(info.to_plain()) == info


def test_a_model_comes_back_whole(saved: Path) -> None:
    network, info = load_model(saved)
    assert info == INFO
    assert_equal(network, random_network())
    assert {p.device.type for p in network.parameters()} == {"cpu"}
    frozen = {k for k, p in network.named_parameters() if not p.requires_grad}
    assert frozen == {k for k, p in random_network().named_parameters() if not p.requires_grad}
    assert list(saved.parent.iterdir()) == [saved]


def test_a_model_computes_the_same(saved: Path) -> None:
    network, _ = load_model(saved)
    x_t, latents = torch.randn(1, 3, 16, 16), torch.randn(1, 4, 2, 2)
    t, sigma = torch.tensor([0.5]), torch.tensor([0.2])
    loaded, expected = (
        each(x_t, t, each.condition(latents, sigma)) for each in (network, random_network())
    )
    assert torch.allclose(loaded, expected, rtol=0, atol=1e-6)  # memory lies elsewhere


def test_a_model_keeps_the_type_it_is_stored_in(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_model(random_network(), INFO, path, torch.bfloat16)
    network, _ = load_model(path)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    assert_equal(network, random_network().to(torch.bfloat16))


def test_a_file_says_what_it_is(saved: Path) -> None:
    with safe_open(saved, "pt") as opened:
        told = json.loads(opened.metadata()[METADATA_KEY])
    assert told["family"] == "VAEPiD"
    assert told["latent_space"] == "flux"
    assert (told["latent_channels"], told["latent_stride"], told["scale"]) == (4, 4, 2)
    assert told["student_times"] == [0.999, 0.634]
    assert told["config"]["adapter"]["gate"] == "token"


def test_differences_name_what_would_not_mean_the_same() -> None:
    assert INFO.differences(INFO) == []
    adapter = dataclasses.replace(CONFIG.adapter, gate="channel")
    config = dataclasses.replace(CONFIG, num_blocks=3, adapter=adapter)
    changes = {"family": "SigLIPPiD", "geometry": Geometry(4, 4, 8), "image_size": 32}
    other = dataclasses.replace(INFO, config=config, **changes)
    assert INFO.differences(other) == [
        "family: SigLIPPiD, here VAEPiD",
        "scale: 8, here 2",
        "num_blocks: 3, here 2",
        "adapter.gate: channel, here token",
    ]


def test_networks_that_their_user_compiled_save_under_plain_names(tmp_path: Path) -> None:
    network, path = random_network(), tmp_path / "model.safetensors"
    network.patch_blocks[0] = torch.compile(network.patch_blocks[0])
    network = torch.compile(network)
    save_model(network, INFO, path, torch.float32)
    assert_equal(load_model(path)[0], random_network())
    state = {f"denoiser.{name}": value for name, value in network.state_dict().items()}
    torch.save(checkpoint(state_dict=state), tmp_path / "last.ckpt")
    assert_equal(load_model(tmp_path / "last.ckpt")[0], random_network())
    assert fingerprint(network) == fingerprint(random_network())


# ------------------------------------------------------------------- damaged files


def test_no_such_file(tmp_path: Path) -> None:
    for name in ("none.safetensors", "none.ckpt"):
        with pytest.raises(FileNotFoundError, match=name):
            load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["pipe.safetensors", "pipe.ckpt", "a_folder.safetensors"])
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, name: str) -> None:
    if name.startswith("pipe"):
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(Mistake, match="no regular file"):
        read_tensors(tmp_path / name)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_model_is_refused(saved: Path, kept: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(kept * len(content))])
    assert saved.name in refused(load_model, saved)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    assert path.name in refused(read_checkpoint, path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_file_that_does_not_describe_itself_is_refused(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(random_network().state_dict(), path, metadata)
    assert path.name in refused(load_model, path)


def described(**changes: object) -> dict:
    """A description with other values, those of its networks by their names with a point."""
    plain = INFO.to_plain()
    for name, value in changes.items():
        *rooms, last = name.split("__")
        place = plain
        for room in rooms:
            place = place[room]
        place[last] = value
    return plain


LIES = (
    *({name: value} for name in ("scale", "latent_stride") for value in ("4", 0, True, 1e8, None)),
    *({"config__num_blocks": value} for value in (10**8, "2", -1, [2], 1e400)),
    *({"config__adapter__num_res_blocks": value} for value in (10**8, 3.5, 10**5000)),
    *({"config__width": value} for value in (2**30, 0, {})),
    *({"student_times": value} for value in ([0.1, 0.9], [2.0], [], "0.9", [1e-9] * 10**5)),
    *({"encoder": value} for value in ([], {"vae": {"vae": [[]]}}, {"vae": [["flux"]]})),
    {"family": 7},
    {"noise_frame": "other"},
    {"latent_sigma_max": float("nan")},
    {"image_size": 0},
    {"time_shift": -1},
    {"config__rope_reference": [0, 32]},
    {"config__adapter__gate": ["token"]},
)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: next(iter(lie)))
def test_a_description_is_checked_by_its_types_before_anything_is_built(
    tmp_path: Path, lie: dict[str, object]
) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(**{METADATA_KEY: described(**lie)}), path)
    refused(load_model, path)


def test_what_a_checkpoint_names_a_thousand_times_is_read_once(tmp_path: Path) -> None:
    bomb: list = []
    for _ in range(40):
        bomb = [bomb] * 10
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(beside=bomb), path)
    load_model(path)
    for name in ("encoder", "family", "student_times", "config__adapter__gate", "config"):
        torch.save(checkpoint(**{METADATA_KEY: described(**{name: bomb})}), path)
        refused(load_model, path)


@pytest.mark.parametrize(
    "part",
    [
        {"state_dict": None},
        {"state_dict": {1: torch.zeros(1)}},
        {"state_dict": {"denoiser.out.weight": "weight"}},
        {"beside": torch.zeros(1).expand(10**6, 10**6)},
        {"beside": torch.zeros(10**6, 10**6, device="meta")},
        {"beside": torch.zeros(3, 3).to_sparse()},
        {"optimizer_states": 7},
        {"pid_training": {"optimizer": torch.zeros(3)}},
        {METADATA_KEY: torch.zeros(3)},
    ],
    ids=str,
)
def test_a_checkpoint_that_lies_is_refused(tmp_path: Path, part: dict[str, object]) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(**part), path)
    refused(load_model, path)


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "last.ckpt", tmp_path / "packed.ckpt"
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path) as read, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as write:
        for entry in read.infolist():
            write.writestr(entry.filename, read.read(entry))
    refused(load_model, packed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64, torch.complex64])
def test_weights_of_mixed_or_other_types_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    path, state = tmp_path / "model.safetensors", random_network().state_dict()
    state["out.weight"] = state["out.weight"].to(dtype)
    safetensors.torch.save_file(state, path, {METADATA_KEY: json.dumps(INFO.to_plain())})
    refused(load_model, path)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_not_finite_are_not_read(tmp_path: Path, value: float) -> None:
    path, state = tmp_path / "model.safetensors", random_network().state_dict()
    state["gates.0.log_alpha"].fill_(value)
    safetensors.torch.save_file(state, path, {METADATA_KEY: json.dumps(INFO.to_plain())})
    refused(load_model, path)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    for name in ("model.safetensors", "last.ckpt"):
        os.mkfifo(tmp_path / name)
        refused(load_model, tmp_path / name)


@pytest.mark.parametrize(
    "told",
    [
        "{",
        "[" * 100_000,
        json.dumps({"family": "VAEPiD"}),
        json.dumps({**INFO.to_plain(), "surplus": 1}),
        json.dumps(INFO.to_plain()).replace('"scale": 2', f'"scale": {"9" * 5000}'),
        json.dumps({**INFO.to_plain(), "surplus": "x" * 10**6}),
    ],
    ids=["no_json", "brackets", "missing", "unknown", "digits", "long"],
)
def test_a_description_that_cannot_be_read_is_refused(tmp_path: Path, told: str) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(random_network().state_dict(), path, {METADATA_KEY: told})
    assert path.name in refused(load_model, path)


def test_weights_that_do_not_match_their_description_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {METADATA_KEY: json.dumps(INFO.to_plain())}
    state = random_network().state_dict()
    name = "patch_embedding.weight"
    cases = {
        "missing": {k: v for k, v in state.items() if k != name},
        "surplus": {**state, "patch_embedding.scale": torch.zeros(1)},
        "shape": {**state, name: state[name][:-1].clone()},
    }
    named = {"missing": name, "surplus": "patch_embedding.scale", "shape": name}
    for case, wrong in cases.items():
        safetensors.torch.save_file(wrong, path, metadata)
        assert named[case] in refused(load_model, path)


def test_a_mistake_in_the_files_name_is_told_before_writing(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    assert path.name in refused(save_model, random_network(), INFO, path, torch.float32)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    ("value", "dtype"), [(torch.nan, torch.float32), (torch.inf, torch.bfloat16), (1e6, torch.half)]
)
def test_weights_that_are_not_finite_are_not_written(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    network = random_network()
    with torch.no_grad():
        network.out.weight[0, 0] = value
    with pytest.raises(Mistake) as caught:
        save_model(network, INFO, tmp_path / "model.safetensors", dtype)
    assert caught.value.option == "weights"
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_is_a_model_too(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    torch.save(checkpoint(), path)
    network, info = load_model(path)
    assert info == INFO
    assert_equal(network, random_network())


def test_the_average_is_preferred(tmp_path: Path) -> None:
    averaged = random_network(seed=1)
    made = checkpoint()
    made["state_dict"] |= {f"denoiser_ema.{k}": v for k, v in averaged.state_dict().items()}
    made["state_dict"]["rgb.weight"] = torch.zeros(2)  # anything beside the denoiser
    path = tmp_path / "last.ckpt"
    torch.save(made, path)
    assert_equal(load_model(path)[0], averaged)
    assert denoiser_state(made).keys() == averaged.state_dict().keys()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"net.x": torch.zeros(1)}])
def test_another_programs_checkpoint_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    assert path.name in refused(load_model, path)


class _Attack:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    path, proof = tmp_path / "evil.ckpt", tmp_path / "was_run"
    attack = {**checkpoint(), "hyper_parameters": _Attack(proof)}
    torch.save(attack, path, _use_new_zipfile_serialization=zipped)
    for read in (read_checkpoint, load_model):
        assert path.name in refused(read, path)
    assert not proof.exists()


# ------------------------------------------------------------------------- writing


def test_a_failure_while_writing_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def full_disk(state: dict, path: Path, metadata: dict) -> None:
        Path(path).write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(random_network(seed=1), INFO, saved, torch.float32)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_writing_replaces_the_old_file(saved: Path) -> None:
    save_model(random_network(seed=1), INFO, saved, torch.float32)
    assert_equal(load_model(saved)[0], random_network(seed=1))
    assert list(saved.parent.iterdir()) == [saved]


def test_a_failing_checkpoint_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pid_lightning.training.checkpoints import AtomicCheckpointIO

    path, writer = tmp_path / "last.ckpt", AtomicCheckpointIO()
    writer.save_checkpoint(checkpoint(), path)

    def full_disk(content: object, file: object) -> None:
        file.write(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="what was there before is intact"):
        writer.save_checkpoint(checkpoint(global_step=8), path)
    assert read_checkpoint(path)["global_step"] == 7
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_readable_by_others_as_any_new_file_is(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()

    save_model(random_network(), INFO, tmp_path / "model.safetensors", torch.float32, "of a test")
    with replaced_file(tmp_path / "replaced") as temporary:  # by a writer with its own idea of it
        temporary.unlink()
        temporary.touch(mode=0o600)
        assert not (tmp_path / "replaced").exists()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    with safe_open(str(tmp_path / "model.safetensors"), framework="pt") as file:
        assert file.metadata()["description"] == "of a test"


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", ""):
        with pytest.raises(OSError, match="option: cannot write"):
            make_folder("option", folder)
        with pytest.raises(OSError, match="folder: cannot write"):
            save_folder(random_network(), INFO, folder, torch.float32)
