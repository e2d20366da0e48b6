"""A latent family of one's own: an encoder, a module of a few lines, and everything follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import Tensor

from pid_lightning import PiDDecoder
from pid_lightning.__main__ import main
from pid_lightning.checks import Mistake
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.families import ENCODERS
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.nn import PiDConfig
from pid_lightning.training.modules.base import PiDModule
from pid_lightning.training.settings import Evaluation, Training


class PooledEncoder(Encoder):
    """Averages over blocks of pixels, side by side in four quarters: 12 channels.

    Args:
        side: of a block in pixels.
    """

    latent_space, latent_channels = "pooled", 12

    def __init__(self, side: int = 4) -> None:
        super().__init__()
        self.latent_stride = 2 * side

    def load(self) -> None:
        """Nothing to load."""

    def encode(self, images: Tensor) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(images, self.latent_stride // 2)
        return rearrange(pooled, "b c (h p) (w q) -> b (c p q) h w", p=2, q=2)


class PooledPiD(PiDModule):
    """PiD on averages of pixels."""

    def __init__(
        self,
        side: int = 4,
        scale: int = 4,
        denoiser: PiDConfig = PiDConfig(),
        text: TextEncoder | None = None,
        training: Training = Training(),
        evaluation: Evaluation = Evaluation(),
        init_from: str | None = None,
    ) -> None:
        encoder, arguments = PooledEncoder(side), {"side": side}
        super().__init__(encoder, arguments, scale, denoiser, text, training, evaluation, init_from)


CONFIG = """
model:
  class_path: test_new_family.PooledPiD
  init_args:
    side: 4
    denoiser:
      width: 32
      num_heads: 2
      num_blocks: 2
      pixel_width: 4
      pixel_attention_width: 16
      pixel_num_heads: 2
      num_pixel_blocks: 1
      text_length: 0
      adapter: {width: 16, num_res_blocks: 1}
    training: {learning_rate: 1.0e-3, warmup_steps: 1}
data:
  class_path: ImageData
  init_args: {path: bundled, image_size: 64, batch_size: 2}
trainer:
  max_steps: 2
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  logger:
    class_path: TensorBoardLogger
    init_args: {save_dir: FOLDER, name: pooled}
"""


def test_a_family_of_ones_own_is_trained_from_a_config_exported_and_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "PooledPiD", PooledEncoder)
    config, model = tmp_path / "pooled.yaml", tmp_path / "pooled.safetensors"
    config.write_text(CONFIG.replace("FOLDER", str(tmp_path)))
    main(["fit", f"--config={config}"])
    main(["export", str(tmp_path / "pooled"), str(model)])

    decoder = PiDDecoder.from_pretrained(model)
    info = decoder.info
    assert (info.family, info.latent_space, info.encoder) == ("PooledPiD", "pooled", {"side": 4})
    latents = decoder.encode(torch.rand(1, 3, 16, 24) * 2 - 1)
    assert latents.shape == (1, 12, 2, 3)
    picture = decoder.decode(latents, steps=2, seed=0, progress=False)
    assert picture.shape == (1, 3, 64, 96)

    monkeypatch.delitem(ENCODERS, "PooledPiD")  # as for somebody who has not imported it
    stranger = PiDDecoder.from_pretrained(model)
    assert torch.equal(stranger.decode(latents, steps=2, seed=0, progress=False), picture)
    with pytest.raises(Mistake) as told:
        stranger.encode(torch.zeros(1, 3, 16, 24))
    assert told.value.option == "family"
