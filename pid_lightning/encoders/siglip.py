"""SigLIP family: patch tokens of a frozen SigLIP image tower as latents, as in Scale-RAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pid_lightning.encoders.vit import ViTEncoder, build_vit
from pid_lightning.files.tensors import read_tensors

# SigLIP was trained with the tanh approximation of GELU, as in transformers. Many timm towers, and
# so open_clip's, specify exact GELU, so the approximation is set here for all.
ACTIVATION = "gelu_tanh"


class SigLIPEncoder(ViTEncoder):
    """A SigLIP image tower: hidden state before the post-LayerNorm, LayerNorm without affine.

    Only the image tower is built and loaded, never the text tower. Images are resized by patch/16
    with an antialiased bicubic filter (256 to 224 for patch 14); positions are resampled without
    antialiasing, as in transformers.

    Args:
        model: an open_clip SigLIP, e.g. ``ViT-SO400M-14-SigLIP2`` (the tower of
            ``google/siglip2-so400m-patch14-224``), or a timm tower, e.g.
            ``vit_so400m_patch14_siglip_224.v2_webli``.
        pretrained: whether `load` loads weights; False keeps random weights and warns.
        checkpoint: weights file of open_clip or timm, or a folder that contains one.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        Mistake: neither library knows the name, or it is not a SigLIP tower.
    """

    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    antialias_images = True
    weights_prefix = "visual.trunk."  # of the timm tower's tensors in open_clip checkpoints

    def __init__(
        self,
        model: str = "ViT-SO400M-14-SigLIP2",
        pretrained: bool = True,
        checkpoint: str | None = None,
    ) -> None:
        import open_clip

        siglips = [name for name in open_clip.list_models() if "siglip" in name.lower()]
        tower, options = model, {"global_pool": "", "act_layer": ACTIVATION}
        if model in siglips:
            vision = open_clip.get_model_config(model)["vision_cfg"]
            tower, options["img_size"] = vision["timm_model_name"], vision["image_size"]
        network = build_vit(tower, pretrained, options, siglips)
        super().__init__(model, network, checkpoint)
        self.tower = tower
        tag = network.pretrained_cfg.get("tag") or ""
        second = "siglip2" in model.lower() or (tower == model and tag.startswith("v2"))
        self.latent_space = "siglip2" if second else "siglip"

    def hub_id(self) -> str | None:
        """Hub repository of the weights: open_clip's for open_clip models, else timm's."""
        if self.tower == self.model:
            return super().hub_id()
        return self._open_clip_config().get("hf_hub", "").rstrip("/") or None

    def fetch(self) -> Mapping[str, Tensor]:
        """Download the weights and return the tensors of the image tower."""
        if self.tower == self.model:
            return super().fetch()
        import open_clip

        path = open_clip.download_pretrained(self._open_clip_config())
        return read_tensors(Path(path), self.weights_prefix)

    def _open_clip_config(self) -> dict[str, Any]:
        """open_clip's entry for the model's first published weights; empty if there are none."""
        import open_clip

        tags = open_clip.list_pretrained_tags_by_model(self.model)
        return open_clip.get_pretrained_cfg(self.model, tags[0]) if tags else {}
