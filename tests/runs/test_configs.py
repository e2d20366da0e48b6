"""Every shipped config parses, has the published size, and trains a step when shrunk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule

from pid_lightning.commands.fit import PiDCLI, main
from pid_lightning.files import models as weights
from pid_lightning.files.published import published_info
from pid_lightning.training.modules.base import PiDModule

CONFIGS = Path(__file__).parents[2] / "configs"
VERSIONS = ("", "_v1pt5")
FULL_SIZE = sorted(c for v in VERSIONS for c in CONFIGS.glob(f"*_[48]x{v}.yaml"))
DISTILLATIONS = sorted(c for v in VERSIONS for c in CONFIGS.glob(f"*_[48]x{v}_dmd2.yaml"))
# The distillations below train the other half, and a discriminator beside it.
NOT_DISTILLED = [
    c for c in FULL_SIZE if "flux2" in c.stem or c.with_stem(f"{c.stem}_dmd2") not in DISTILLATIONS
]
OTHERS = sorted(set(CONFIGS.glob("*.yaml")) - {*FULL_SIZE, *DISTILLATIONS})
SHRUNK = [
    "--data.path=bundled",
    "--data.image_size=128",
    "--data.batch_size=1",
    "--data.num_workers=0",
    "--model.denoiser.width=32",
    "--model.denoiser.num_heads=2",
    "--model.denoiser.num_blocks=8",
    "--model.denoiser.pixel_width=4",
    "--model.denoiser.pixel_attention_width=16",
    "--model.denoiser.pixel_num_heads=2",
    "--model.denoiser.num_pixel_blocks=1",
    "--model.denoiser.text_width=8",
    "--model.denoiser.text_length=3",
    "--model.denoiser.adapter.width=16",
    "--model.denoiser.adapter.num_res_blocks=1",
    "--trainer.max_steps=1",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.precision=32-true",
    "--trainer.limit_val_batches=0",
    "--trainer.logger=false",
    "--trainer.callbacks=[]",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SMALL_ENCODERS = {
    "flux2": ["--model.vae=taef2"],
    "vae": ["--model.vae=taef2"],
    "siglip": ["--model.model=vit_tiny_patch16_224", "--model.pretrained=false"],
    "dinov2": ["--model.model=vit_small_patch14_dinov2", "--model.pretrained=false"],
}


def parse(config: Path, *arguments: str) -> PiDCLI:
    """The objects of a config, without running anything."""
    return PiDCLI(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        run=False,
        args=[f"--config={config}", "--trainer.accelerator=cpu", "--trainer.devices=1", *arguments],
    )


def test_all_are_here() -> None:
    families = ("dinov2", "siglip", "vae")
    newer = ["flux2_4x_v1pt5", "vae_4x_v1pt5"]
    assert [c.stem for c in FULL_SIZE] == sorted(
        [f"{f}_{s}x" for f in families for s in (4, 8)] + newer
    )
    assert [c.stem for c in DISTILLATIONS] == sorted(
        f"{stem}_dmd2" for stem in ("dinov2_8x", "siglip_8x", "vae_4x", *newer)
    )


@pytest.mark.parametrize("config", FULL_SIZE, ids=lambda path: path.stem)
def test_full_size_has_the_published_number_of_parameters(config: Path) -> None:
    with torch.device("meta"):
        cli = parse(config)
    denoiser = cli.model.denoiser
    num = sum(p.numel() for p in denoiser.parameters())
    # With 16-channel latents; wider latents widen the adapter's first convolution.
    adapter = denoiser.config.adapter
    channels = cli.model.encoder.latent_channels // adapter.unpack**2
    wider = (channels - 16) * 9 * adapter.width
    assert abs(num - wider - (1.4013e9 if "v1pt5" in config.stem else 1.363e9)) < 0.001e9
    if "v1pt5" in config.stem:
        injected = [*denoiser.adapter.parameters(), *denoiser.gates.parameters()]
        assert sum(w.numel() for w in injected) - wider == pytest.approx(98.8e6, rel=1e-3)
        # What trains is what the authors published, but for its learned null.
        family = config.stem.partition("_")[0].replace("vae", "flux")
        published = published_info(family, "v1.5", with_rgb_head=True)
        assert cli.model.info.differences(published) == ["learned_null: False, here True"]
    assert cli.datamodule.image_size == 2048
    assert f"_{cli.model.scale}x" in config.stem


@pytest.mark.parametrize("config", NOT_DISTILLED, ids=lambda path: path.stem)
def test_full_size_steps_once_when_shrunk(config: Path, tmp_path: Path) -> None:
    family = config.stem.split("_")[0]
    arguments = [*SHRUNK, *SMALL_ENCODERS[family], f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", f"--config={config}", *arguments])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(path, marks=[] if "dinov2" in path.stem else pytest.mark.slow)
        for path in DISTILLATIONS
    ],
    ids=lambda path: path.stem,
)
def test_distillation_steps_when_shrunk(config: Path, tmp_path: Path, monkeypatch) -> None:
    family = config.stem.split("_")[0]
    folder = f"--trainer.default_root_dir={tmp_path}"
    arguments = [a for a in [*SHRUNK, *SMALL_ENCODERS[family], folder] if "callbacks" not in a]
    model = parse(config, *arguments, "--trainer.callbacks=[]").model
    model.encoder.load()
    teacher = tmp_path / "teacher.safetensors"
    weights.save_model(model.denoiser, model.info, teacher, torch.float32)

    settings = yaml.safe_load(config.read_text())
    settings["trainer"]["callbacks"][0]["init_args"] |= {
        "teacher": str(teacher),
        "student_every": 2,
    }
    copy = tmp_path / "distil.yaml"
    copy.write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    arguments = [a for a in arguments if "logger" not in a and "max_steps" not in a]
    main(["fit", f"--config={copy}", *arguments, "--trainer.max_steps=2"])
    assert (tmp_path / f"runs/{config.stem}/version_0/checkpoints/last.ckpt").is_file()


@pytest.mark.parametrize("config", OTHERS, ids=lambda path: path.stem)
def test_the_others_parse(config: Path) -> None:
    with torch.device("meta"):
        cli = parse(config)
    assert cli.datamodule.image_size % 32 == 0
    if isinstance(cli.model, PiDModule):
        cli.model.denoiser.check_size(cli.datamodule.image_size, cli.datamodule.image_size)
        assert cli.trainer.logger.name == config.stem


def test_quickstart_steps(tmp_path: Path) -> None:
    config = CONFIGS / "quickstart.yaml"
    arguments = [
        "--trainer.max_steps=1",
        "--data.batch_size=1",
        "--test_after_fit=false",
        "--trainer.limit_val_batches=0",
        "--trainer.logger=false",
        "--trainer.callbacks=[]",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    main(["fit", f"--config={config}", *arguments])


def test_any_scale_data_and_size_can_be_given(tmp_path: Path) -> None:
    cli = parse(
        CONFIGS / "dinov2_4x.yaml",
        "--model.scale=8",
        "--data.path=elsewhere",
        "--data.image_size=512",
        *SMALL_ENCODERS["dinov2"],
        *(a for a in SHRUNK if "denoiser" in a),
    )
    assert (cli.model.scale, cli.datamodule.source.path, cli.datamodule.image_size) == (
        8,
        "elsewhere",
        512,
    )
