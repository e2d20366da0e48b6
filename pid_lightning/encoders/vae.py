"""Autoencoder family: diffusers' KL autoencoders and the bundled small one, as encoders."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pid_lightning.encoders.base import Encoder
from pid_lightning.latent_spaces import (
    QWEN_MEAN,
    QWEN_STD,
    LatentSpace,
    autoencoder_kl_space,
    flux2_space,
    qwen_space,
)

# What SD3, FLUX.1 and SDXL share: the architecture of Stable Diffusion's autoencoder.
_KL: Mapping[str, Any] = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "sample_size": 1024,
}
_KL16 = {**_KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


class VAESource(NamedTuple):
    """Where an autoencoder's weights are and what it is."""

    location: str  # hub id or local folder
    subfolder: str | None
    config: Mapping[str, Any]


# Known names: their geometry is known here, so that nothing is fetched to build a network.
KNOWN_VAES: Mapping[str, VAESource] = {
    "sd3": VAESource(
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "vae",
        {**_KL16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
    "flux": VAESource(
        "black-forest-labs/FLUX.1-schnell",
        "vae",
        {**_KL16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
    ),
    "sdxl": VAESource(
        "stabilityai/sdxl-vae", None, {**_KL, "latent_channels": 4, "scaling_factor": 0.13025}
    ),
    "flux2": VAESource(
        "black-forest-labs/FLUX.2-klein-4B",
        "vae",
        {
            "_class_name": "AutoencoderKLFlux2",
            "block_out_channels": [128, 256, 512, 512],
            "latent_channels": 32,
            "batch_norm_eps": 1e-4,
            "patch_size": [2, 2],
        },
    ),
    "qwen": VAESource(
        "Qwen/Qwen-Image",
        "vae",
        {
            "_class_name": "AutoencoderKLQwenImage",
            "z_dim": 16,
            "temperal_downsample": [False, True, True],  # diffusers' spelling
            "latents_mean": list(QWEN_MEAN),
            "latents_std": list(QWEN_STD),
        },
    ),
}
SUPPORTED_CLASSES = ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderKLQwenImage")


def build_vae_encoder(vae: str = "bundled", pretrained: bool = True) -> Encoder:
    """`BundledVAE` for ``"bundled"``, else `VAEEncoder` of that name, hub id or folder."""
    if vae != "bundled":
        return VAEEncoder(vae, pretrained)
    if not pretrained:
        raise ValueError(
            "The bundled autoencoder always comes with its weights: leave out pretrained: false, "
            f"or name another vae ({', '.join(KNOWN_VAES)}, a hub id or a local folder)."
        )
    return BundledVAE()


class VAEEncoder(Encoder):
    """A diffusers `AutoencoderKL`, `AutoencoderKLFlux2` or `AutoencoderKLQwenImage`.

    Latents are the posterior's mode, normalised as `space` says.

    Args:
        vae: ``"sd3"``, ``"flux"``, ``"sdxl"``, ``"flux2"`` or ``"qwen"`` (geometry known, nothing
            fetched before `load`), a hub id, or a local folder: a diffusers autoencoder's, or a
            pipeline's that holds one in ``vae/``.
        pretrained: whether `load` brings weights; until then the network is on the meta device.
            False builds random weights at once, and warns.

    Raises:
        FileNotFoundError: no such folder, or none with a ``config.json``.
        OSError: an unknown hub id whose configuration cannot be had.
        ValueError: a name or an autoencoder class that is not supported.
    """

    def __init__(self, vae: str, pretrained: bool = True) -> None:
        super().__init__()
        self.vae = vae
        self.pretrained = pretrained
        self.source = find_vae(vae)
        self.loaded = not pretrained
        with torch.device("meta") if pretrained else nullcontext():
            self.network: nn.Module = _diffusers_class(self.source).from_config(
                _architecture(self.source.config)
            )
        if not pretrained:
            warn_random_weights(f"autoencoder {vae!r}")
        space = self._describe_space()
        self.latent_channels = space.channels
        self.latent_stride = space.stride
        self.latent_space = space.name
        self.requires_grad_(False).eval()

    @property
    def space(self) -> LatentSpace:
        """The space of the latents; FLUX.2's is read from the statistics in the network."""
        check_loaded(self.network, None, self.vae)
        return self._describe_space()

    def load(self) -> None:
        """Bring the pretrained weights through diffusers' `from_pretrained`.

        Raises:
            OSError: the weights cannot be had.
            ValueError: the weights do not fill the network.
        """
        if self.loaded:
            return
        location, subfolder, _ = self.source
        try:
            network, report = _diffusers_class(self.source).from_pretrained(
                location,
                subfolder=subfolder,
                output_loading_info=True,
                low_cpu_mem_usage=False,  # the other way wants the accelerate package
            )
        except OSError as error:
            raise unreachable_weights(
                f"autoencoder {self.vae!r} ({location})",
                "vae: a local diffusers folder (config.json and its .safetensors, or a pipeline "
                "folder with vae/)",
                error,
            ) from error
        wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
        if wrong:
            raise ValueError(
                f"The weights in {location} do not fit their own configuration: {len(wrong)} "
                f"tensors are missing, left over or of another shape, the first {wrong[0]!r}."
            )
        current = next(self.network.parameters())
        device = None if current.is_meta else current.device
        self.network = network.to(device=device, dtype=current.dtype).requires_grad_(False).eval()
        self.loaded = True

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to the mode's normalised latents (B, C, h, w).

        Latents come back in the images' dtype; normalisation is computed in float32 at least.

        Raises:
            ValueError: H or W is not a multiple of `latent_stride`.
        """
        check_images(images, self.latent_stride)
        check_loaded(self.network, images, self.vae)
        pixels = images.to(next(self.network.parameters()).dtype)
        if self._is_video:
            pixels = pixels[:, :, None]  # (B, 3, 1, H, W)
        raw = self.network.encode(pixels).latent_dist.mode()
        return self.space.normalise(raw.to(images.dtype))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, h*stride, w*stride).

        Exactly what the autoencoder's `decode` gives: nominally in [-1, 1], not clamped.
        """
        check_loaded(self.network, latents, self.vae)
        raw = self.space.denormalise(latents).to(next(self.network.parameters()).dtype)
        if self._is_video:
            return self.network.decode(raw[:, :, None]).sample[:, :, 0].to(latents.dtype)
        return self.network.decode(raw).sample.to(latents.dtype)

    @property
    def _is_video(self) -> bool:
        return self.source.config["_class_name"] == "AutoencoderKLQwenImage"

    def _describe_space(self) -> LatentSpace:
        config = self.network.config
        if self.source.config["_class_name"] == "AutoencoderKL":
            return autoencoder_kl_space(config)
        if self._is_video:
            return qwen_space(config)
        stride = 2 ** len(config.block_out_channels)  # one halving more than the blocks': packing
        mean, var = self.network.bn.running_mean, self.network.bn.running_var
        if mean.is_meta:  # geometry only: `space` is not to be had before `load`
            mean, var = [0.0] * len(mean), [1.0] * len(mean)
        return flux2_space(mean, var, config.batch_norm_eps, stride)


class BundledVAE(Encoder):
    """The small autoencoder that ships with the package: 16 channels, stride 8, no network."""

    latent_channels = 16
    latent_stride = 8
    latent_space = "pid-small"

    def __init__(self) -> None:
        super().__init__()
        from pid_lightning.nn.autoencoder import load_bundled_autoencoder

        self.network = load_bundled_autoencoder()
        self.requires_grad_(False).eval()

    def load(self) -> None:
        """Nothing to do: the weights are part of the package."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, 16, H/8, W/8)."""
        check_images(images, self.latent_stride)
        pixels = images.to(next(self.network.parameters()).dtype)
        return self.network.encode(pixels).to(images.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 16, h, w) to images (B, 3, 8h, 8w), not clamped."""
        raw = latents.to(next(self.network.parameters()).dtype)
        return self.network.decode(raw).to(latents.dtype)


def find_vae(vae: str) -> VAESource:
    """What `vae` means; only an unknown hub id may touch the network, for its configuration."""
    if vae in KNOWN_VAES:
        return KNOWN_VAES[vae]
    folder = Path(vae).expanduser()
    if folder.is_dir():
        return _read_folder(folder)
    if folder.exists() or vae.startswith((".", "~")) or folder.is_absolute() or vae.count("/") != 1:
        raise FileNotFoundError(
            f"vae: {vae!r} is no folder, no hub id (owner/name) and no known name "
            f"(bundled, {', '.join(KNOWN_VAES)})."
        )
    return _read_hub(vae)


def _read_folder(folder: Path) -> VAESource:
    for subfolder in (None, "vae"):
        path = folder / (subfolder or "") / "config.json"
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON ({error}): copy it again.") from error
        return _supported(VAESource(str(folder), subfolder, config))
    raise FileNotFoundError(
        f"{folder} holds neither config.json nor vae/config.json: give the folder of a diffusers "
        "autoencoder or of a pipeline."
    )


def _read_hub(hub_id: str) -> VAESource:
    from diffusers import AutoencoderKL

    failure: OSError | None = None
    for subfolder in ("vae", None):  # a pipeline's repository, or the autoencoder's own
        try:
            config = AutoencoderKL.load_config(hub_id, subfolder=subfolder)
        except OSError as error:
            failure = failure or error
            continue
        return _supported(VAESource(hub_id, subfolder, config))
    raise unreachable_weights(
        f"autoencoder {hub_id!r}",
        f"vae: a local diffusers folder, or a known name ({', '.join(KNOWN_VAES)}), whose geometry "
        "needs no network",
        failure,
    ) from failure


def _supported(source: VAESource) -> VAESource:
    name = source.config.get("_class_name")
    if name not in SUPPORTED_CLASSES:
        raise ValueError(
            f"{source.location} holds a {name}, which is not supported: give one of "
            f"{', '.join(SUPPORTED_CLASSES)}."
        )
    return source


def _diffusers_class(source: VAESource) -> Any:
    import diffusers

    return getattr(diffusers, source.config["_class_name"])


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def check_images(images: Tensor, stride: int) -> None:
    """Raise ValueError unless images are (B, 3, H, W) with sides that are multiples of stride."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"Images of shape {tuple(images.shape)} are not (B, 3, H, W).")
    height, width = images.shape[-2:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"Pictures of {height} x {width} pixels do not fit this encoder: both sides must be "
            f"multiples of {stride}."
        )


def check_loaded(network: nn.Module, inputs: Tensor | None, name: str) -> None:
    """Raise RuntimeError where a network still on the meta device is asked for numbers."""
    if next(network.parameters()).is_meta and not (inputs is not None and inputs.is_meta):
        raise RuntimeError(f"The encoder {name!r} has no weights yet: call load() first.")


def unreachable_weights(what: str, cure: str, reason: Exception | None) -> OSError:
    """The one sentence for weights that cannot be had."""
    return OSError(
        f"The weights of {what} cannot be had ({first_line(reason)}): connect to the hub (and log "
        f"in where the licence asks for it), or set {cure}, or set "
        "pretrained: false to run with random weights on purpose."
    )


def warn_random_weights(what: str) -> None:
    """Say that an encoder means nothing, once, where it is built."""
    warnings.warn(
        f"pretrained: false gives the {what} random weights: its latents carry no meaning, which "
        "is good for trying things out only.",
        stacklevel=3,
    )


def first_line(error: BaseException | None) -> str:
    """First sentence of an error's first cause, at most 160 characters, to quote in another."""
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].split(". ")[0][:160].rstrip(".: ")
