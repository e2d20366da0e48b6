"""Vision transformers for timm's registry, of two blocks and 32 channels, without weights."""

from __future__ import annotations

from timm.models import VisionTransformer, build_model_with_cfg, register_model

PATCH, GRID = 14, 5  # tiny towers: 70-pixel pretraining, so 80-pixel pictures are native
WIDTH, DEPTH, HEADS = 32, 2, 2


def _build(name, pretrained, kwargs, **architecture):
    defaults = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return build_model_with_cfg(
        VisionTransformer,
        name,
        pretrained,
        pretrained_cfg={"input_size": (3, PATCH * GRID, PATCH * GRID), "num_classes": 0},
        **{"img_size": PATCH * GRID, **defaults, **architecture, **kwargs},
    )


@register_model
def vit_mini_patch14_reg4_dinov2(pretrained=False, pretrained_cfg=None, **kwargs):
    kwargs.pop("pretrained_cfg_overlay", None)
    return _build(
        "vit_mini_patch14_reg4_dinov2",
        pretrained,
        kwargs,
        init_values=1e-5,
        reg_tokens=4,
        no_embed_class=True,
    )


@register_model
def vit_mini_patch14_dinov2(pretrained=False, pretrained_cfg=None, **kwargs):
    kwargs.pop("pretrained_cfg_overlay", None)
    return _build("vit_mini_patch14_dinov2", pretrained, kwargs, init_values=1e-5)


@register_model
def vit_mini_patch14_siglip(pretrained=False, pretrained_cfg=None, **kwargs):
    kwargs.pop("pretrained_cfg_overlay", None)
    return _build(
        "vit_mini_patch14_siglip",
        pretrained,
        kwargs,
        **{"class_token": False, "global_pool": "map", **kwargs},
    )
