"""Diffusers' own pipeline classes with tiny random networks."""

from __future__ import annotations

from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from pid_lightning.decoding.decoder import PiDDecoder
from pid_lightning.decoding.diffusers_vae import space_of
from pid_lightning.files.models import ModelInfo
from pid_lightning.nn import AdapterConfig, Geometry, PiDConfig

HEIGHT, WIDTH = 32, 64  # of the pipelines' native pictures
SCALE = 4


class Tiny(NamedTuple):
    """A pipeline and call arguments that need no text encoder.

    Attributes:
        pipe: the pipeline.
        arguments: arguments of a call.
        shape: shape of the latents in a call, for a batch of one.
    """

    pipe: Any
    arguments: dict[str, Any]
    shape: tuple[int, ...]


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(module: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Redraw every weight, so that zero-initialised layers have an effect."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return module.eval().requires_grad_(False)


def decoder_for(vae: Any, noise_frame: str = "flow", **changes: Any) -> PiDDecoder:
    """A tiny random decoder for the autoencoder's latent space, with 2 student times."""
    space = space_of(vae)
    config = PiDConfig(
        width=16,
        num_heads=2,
        num_blocks=2,
        pixel_width=4,
        pixel_attention_width=16,
        pixel_num_heads=2,
        num_pixel_blocks=1,
        text_length=0,
        rope_reference=None,
        adapter=AdapterConfig(width=8, num_res_blocks=1),
    )
    described = {
        "family": "VAEPiD",
        "encoder": {},
        "latent_space": space.name,
        "geometry": Geometry(space.channels, space.stride, SCALE),
        "image_size": None,
        "latent_sigma_max": 1.0,
        "noise_frame": noise_frame,
        "student_times": (0.999, 0.5),
        "config": config,
    }
    info = ModelInfo(**(described | changes))
    return PiDDecoder(randomise(info.build(), std=0.25), info)


def kl(latent_channels: int, scaling_factor: float, shift_factor: float | None, **more: Any) -> Any:
    return randomise(
        diffusers.AutoencoderKL(
            block_out_channels=(4, 4, 4, 4),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=2,
            latent_channels=latent_channels,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            **more,
        )
    )


def sd3_vae() -> Any:
    return kl(16, 1.5305, 0.0609, use_quant_conv=False, use_post_quant_conv=False)


def flux_vae() -> Any:
    return kl(16, 0.3611, 0.1159, use_quant_conv=False, use_post_quant_conv=False)


def sdxl_vae() -> Any:
    return kl(4, 0.13025, None)


def flux2_vae() -> Any:
    vae = randomise(
        diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
        )
    )
    vae.bn.running_mean.copy_(0.1 * random_tensor(128))
    vae.bn.running_var.copy_(0.5 + random_tensor(128, seed=1).square())
    return vae


def qwen_vae() -> Any:
    return randomise(diffusers.AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1))


def dynamic_shift(**changes: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, **changes
    )


def sd3() -> Tiny:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=16,
        pos_embed_max_size=16,
    )
    no_text = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2")
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=randomise(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=sd3_vae(),
        tokenizer_3=None,
        **no_text,
    )
    text = {
        "prompt_embeds": random_tensor(1, 3, 16),
        "pooled_prompt_embeds": random_tensor(1, 16),
        "negative_prompt_embeds": random_tensor(1, 3, 16, seed=1),
        "negative_pooled_prompt_embeds": random_tensor(1, 16, seed=1),
    }
    return Tiny(pipe, text, (1, 16, HEIGHT // 8, WIDTH // 8))


def flux() -> Tiny:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.FluxPipeline(
        scheduler=dynamic_shift(),
        vae=flux_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=randomise(transformer),
    )
    text = {
        "prompt_embeds": random_tensor(1, 3, 16),
        "pooled_prompt_embeds": random_tensor(1, 16),
    }
    return Tiny(pipe, text, (1, HEIGHT * WIDTH // 256, 64))


def _flux2_transformer(guidance_embeds: bool) -> Any:
    return randomise(
        diffusers.Flux2Transformer2DModel(
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        )
    )


def flux2() -> Tiny:
    pipe = diffusers.Flux2Pipeline(
        scheduler=dynamic_shift(),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=_flux2_transformer(True),
    )
    return Tiny(
        pipe, {"prompt_embeds": random_tensor(1, 3, 16)}, (1, 128, HEIGHT // 16, WIDTH // 16)
    )


def flux2_klein() -> Tiny:
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=dynamic_shift(),
        vae=flux2_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=_flux2_transformer(False),
        is_distilled=True,
    )
    return Tiny(
        pipe, {"prompt_embeds": random_tensor(1, 3, 16)}, (1, 128, HEIGHT // 16, WIDTH // 16)
    )


def qwen() -> Tiny:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    pipe = diffusers.QwenImagePipeline(
        scheduler=dynamic_shift(shift_terminal=0.02),
        vae=qwen_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
    )
    text = {
        "prompt_embeds": random_tensor(1, 3, 16),
        "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64),
    }
    return Tiny(pipe, text, (1, HEIGHT * WIDTH // 256, 64))


def z_image() -> Tiny:
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=None,
        tokenizer=None,
        transformer=randomise(transformer),
    )
    text = {"prompt_embeds": [random_tensor(3, 16)], "guidance_scale": 0.0}
    return Tiny(pipe, text, (1, 16, HEIGHT // 8, WIDTH // 8))


def sdxl(scheduler: Any = None) -> Tiny:
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=64,  # 6 x 8, plus 16 pooled
        cross_attention_dim=16,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=sdxl_vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=randomise(unet, std=0.005),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(),
        add_watermarker=False,
    )
    text = {
        "prompt_embeds": random_tensor(1, 3, 16),
        "pooled_prompt_embeds": random_tensor(1, 16),
        "negative_prompt_embeds": random_tensor(1, 3, 16, seed=1),
        "negative_pooled_prompt_embeds": random_tensor(1, 16, seed=1),
    }
    shape = (1, 4, HEIGHT // 8, WIDTH // 8)
    # An untrained network removes no noise, so start without any to end with clean latents.
    text["latents"] = random_tensor(*shape) / pipe.scheduler.init_noise_sigma
    return Tiny(pipe, text, shape)


PIPELINES = {
    "sd3": sd3,
    "flux": flux,
    "flux2": flux2,
    "flux2_klein": flux2_klein,
    "qwen": qwen,
    "z_image": z_image,
    "sdxl": sdxl,
}


def call(tiny: Tiny, steps: int = 3, output_type: str = "pt", **more: Any) -> Any:
    """The pipeline's first output for a fixed seed."""
    tiny.pipe.set_progress_bar_config(disable=True)
    arguments = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": steps,
        "output_type": output_type,
        "generator": torch.Generator().manual_seed(0),
        "return_dict": False,
    }
    return tiny.pipe(**(arguments | tiny.arguments | more))[0]
