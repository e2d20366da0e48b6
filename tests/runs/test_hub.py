"""Downloads and uploads through the libraries' own clients, against a hub on this machine."""

from __future__ import annotations

import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from pretended_hub import COMMIT, CREATED, pretended_hub

DINOV2 = "vit_small_patch14_reg4_dinov2.lvd142m"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory) -> Path:
    """What the hub holds: models, and data sets."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def run(repositories, tmp_path_factory):
    """Calls a function in a process whose libraries know that hub: they read the environment once,
    when imported."""
    server = pretended_hub(repositories)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path_factory.mktemp("cache")),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_none",
        "NO_PROXY": "127.0.0.1",
    }
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        with ProcessPoolExecutor(1, mp_context=spawn) as executor:
            yield lambda function, *values: executor.submit(function, *values).result()
    server.shutdown()


def push_and_pull() -> None:
    from pid_lightning import PiDDecoder

    sent = PiDDecoder.from_pretrained()
    address = sent.push_to_hub("owner/pid", private=True)
    assert address.endswith(f"/owner/pid/commit/{COMMIT}")
    received = PiDDecoder.from_pretrained("owner/pid", revision="main")
    assert received.info == sent.info
    cached = PiDDecoder.from_pretrained("owner/pid", local_files_only=True)
    for decoder in (received, cached):
        states = decoder.denoiser.state_dict(), sent.denoiser.state_dict()
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_a_pushed_model_comes_back(run, repositories):
    run(push_and_pull)
    files = sorted(file.name for file in (repositories / "models" / "owner" / "pid").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    created = json.loads((repositories / CREATED).read_text())
    assert created.get("private") or created.get("visibility") == "private"  # by library version


def reason_of_failure(name: str, revision: str) -> str:
    from pid_lightning import PiDDecoder

    with pytest.raises(OSError, match=r"is no local .* the hub does not provide its") as raised:
        PiDDecoder.from_pretrained(name, revision=revision)
    return str(raised.value)


def test_what_the_hub_lacks_is_named(run, repositories):
    (repositories / "models" / "owner" / "empty").mkdir(parents=True)
    for name, revision, lacking in (
        ("owner/none", "main", "Repository"),
        ("owner/empty", "main", "Entry"),
        ("owner/empty", "v2", "Revision"),
    ):
        sentence = run(reason_of_failure, name, revision)
        assert f"({lacking} Not Found for url" in sentence
        assert "\n" not in sentence


def load_encoders(repositories: Path) -> None:
    import timm
    from diffusers import AutoencoderKL
    from safetensors.torch import save_file

    from pid_lightning.encoders.dinov2 import DINOv2Encoder
    from pid_lightning.encoders.vae import VAEEncoder

    transformer = timm.create_model(DINOV2, num_classes=0)
    folder = repositories / "models" / "timm" / DINOV2
    folder.mkdir(parents=True)
    save_file(transformer.state_dict(), folder / "model.safetensors")
    vae = AutoencoderKL(block_out_channels=(32,), latent_channels=4, scaling_factor=0.5)
    vae.save_pretrained(repositories / "models" / "owner" / "vae")
    for encoder, saved in (
        (DINOv2Encoder(DINOV2), transformer),
        (VAEEncoder("owner/vae"), vae),
    ):
        encoder.load()
        states = encoder.network.state_dict(), saved.state_dict()
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_encoders_download_their_weights(run, repositories):
    run(load_encoders, repositories)


def read_data_set(repositories: Path) -> list[str]:
    import datasets
    from PIL import Image

    from pid_lightning.training.data.image_data import ImageData

    pictures = [Image.new("RGB", (24, 20), (60 * i, 0, 0)) for i in range(4)]
    rows = {"image": pictures, "words": [f"caption {i}" for i in range(4)]}
    folder = repositories / "datasets" / "owner" / "pictures" / "data"
    folder.mkdir(parents=True)
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-00000-of-00001.parquet")
    data = ImageData(
        "owner/pictures", image_size=16, batch_size=2, num_val=2, caption_column="words"
    )
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader())
    return [caption for loader in loaders for batch in loader for caption in batch["caption"]]


def test_data_sets_are_downloaded(run, repositories):
    assert sorted(run(read_data_set, repositories)) == [f"caption {i}" for i in range(4)]
