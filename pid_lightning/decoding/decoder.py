"""PiDDecoder: decodes latents to pictures, for inference only; does not need Lightning."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pid_lightning.checks import Mistake, check_choice
from pid_lightning.decoding.arguments import (
    check_features,
    check_latents,
    check_options,
    check_pictures,
    check_takes_text,
    noise_levels,
    noise_source,
)
from pid_lightning.decoding.latents import decode_latents
from pid_lightning.decoding.memory_estimate import estimate_working_memory, weight_bytes
from pid_lightning.decoding.plan import Plan
from pid_lightning.decoding.tile_choice import TileChoice, check_tile_choice, choose_tile
from pid_lightning.diffusion.randomness import Generators
from pid_lightning.encoders.base import Encoder
from pid_lightning.encoders.families import build_encoder
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.encoders.text_cache import encode_prompts
from pid_lightning.files import hub
from pid_lightning.files.models import DTYPES, ModelInfo, load_model
from pid_lightning.nn import PiD
from pid_lightning.nn.changes import check_allowed
from pid_lightning.nn.compilation import compile_for_inference
from pid_lightning.nn.fixed_times import fix_times
from pid_lightning.nn.quantisation import quantise


class PiDDecoder:
    """A trained PiD with an interface like ``vae.decode``::

        decoder = PiDDecoder.from_pretrained("model.safetensors").to("cuda")
        pictures = decoder.decode(latents, seed=0)

    Args:
        denoiser: the network, with weights in the dtype to compute in.
        info: description of the model.
        encoder: encodes pictures to its latents; None builds the one named by `info` on first use.

    Attributes:
        text_encoder: for prompts given as words; None until set, since model files do not name it.

    Raises:
        Mistake: the network's geometry differs from that in `info`.
    """

    def __init__(self, denoiser: PiD, info: ModelInfo, encoder: Encoder | None = None) -> None:
        if denoiser.geometry != info.geometry:
            raise Mistake(
                "denoiser",
                f"this network was built for {denoiser.geometry}, but was trained for "
                f"{info.geometry}; build it with info.build().",
            )
        self.denoiser: PiD = denoiser.eval()
        self.info = info
        self.text_encoder: TextEncoder | None = None
        self._encoder = encoder
        self._source: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = hub.DEFAULT_MODEL,
        dtype: torch.dtype | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PiDDecoder:
        """Load a decoder on the CPU.

        Args:
            name: a model's ``.safetensors``, a run's ``.ckpt`` (its averaged weights), a folder of
                `save_pretrained`, a bundled name (left out, the bundled model for FLUX.2's
                latents), or a hub id ``owner/name``.
            dtype: dtype to compute in; None is the dtype of the stored weights.
            revision: branch, tag or commit of the hub; a commit never changes.
            token, cache_dir, local_files_only: of the hub download, kept in `cache_dir`, or where
                HF_HOME says; with `local_files_only`, or HF_HUB_OFFLINE, nothing is asked for.

        Raises:
            FileNotFoundError: there is no such model on this machine.
            OSError: the hub does not provide it.
            ValueError: the file is damaged or does not match its own description, or `dtype` is no
                dtype of weights.
        """
        check_choice("dtype", dtype, (None, *DTYPES.values(), torch.float64))
        path = hub.find_model(
            name,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        denoiser, info = load_model(path)
        decoder = cls(denoiser.requires_grad_(False).to(dtype=dtype), info)
        decoder._source = path
        return decoder

    def save_pretrained(self, folder: str | Path, license: str = "other") -> None:
        """Write the model, its description and a model card, for `from_pretrained`; see
        `card.model_card`, which tells of the run where the model is one's checkpoint."""
        hub.save_folder(self.denoiser, self.info, folder, self.dtype, license, self._source)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a PiD decoder",
        license: str = "other",
    ) -> str:
        """Upload what `save_pretrained` writes to ``owner/name``, created if missing, and return
        the URL of the commit."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, license)
            return hub.upload_folder(folder, repo_id, private, token, commit_message)

    @property
    def scale(self) -> int:
        """Side of the output divided by the side of the native decoder's picture."""
        return self.info.geometry.scale

    @property
    def latent_space(self) -> str:
        """Name of the latent space, e.g. ``"flux"``."""
        return self.info.latent_space

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.denoiser.out.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return self.denoiser.dtype

    def to(
        self,
        device: torch.device | str | torch.dtype | None = None,
        dtype: torch.dtype | None = None,
    ) -> PiDDecoder:
        """Move everything to a device; `dtype` applies to the denoiser only, and may stand alone.

        Raises:
            ValueError: a dtype for weights that are in 8 bits or frozen.
        """
        if isinstance(device, torch.dtype):  # `to(torch.bfloat16)`, as modules are cast
            device, dtype = None, device
        if dtype is not None:
            check_allowed(self.denoiser.changes, "dtype")
        self.denoiser.to(device=device, dtype=dtype)
        for other in filter(None, (self._encoder, self.text_encoder)):
            other.to(device=device)
        return self

    def compile(self, freeze: bool = False, cuda_graphs: bool = False) -> PiDDecoder:
        """Compile the network, once per size of output or tile. `freeze` is for CPUs, `cuda_graphs`
        for small pictures on a GPU: see `compilation.compile_for_inference`, also for errors."""
        compile_for_inference(self.denoiser, freeze, cuda_graphs)
        return self

    def fix_times(self) -> PiDDecoder:
        """Precompute a student's modulations and drop the weights that make them: same pictures,
        29 % less weight memory at the published size; see `fixed_times.fix_times`, also for
        errors."""
        fix_times(self.denoiser, self.info.student_times)
        return self

    def attend_in_windows(self, size: int | None) -> PiDDecoder:
        """Restrict the patch blocks' attention to windows of at most `size` pixels a side, for
        nearly the exact picture; None undoes it. See `PiD.attend_in_windows`, also for errors."""
        self.denoiser.attend_in_windows(size)
        return self

    def quantise(self, activations: bool = False) -> PiDDecoder:
        """Store weights in 8 bits, half the memory of bf16, close to the exact picture, and with
        `activations` also multiply in 8 bits; see `quantisation.quantise`, also for errors. Only
        `from_pretrained` undoes it."""
        quantise(self.denoiser, activations)
        return self

    def release(self) -> None:
        """Free memory: drop the encoders (`encoder` is rebuilt when needed) and move the network to
        the CPU; `to` moves it back. Compiled graphs keep what they hold."""
        self._encoder = self.text_encoder = None
        device = self.device
        self.denoiser.to("cpu")
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.empty_cache()

    @property
    def encoder(self) -> Encoder:
        """The encoder of the model's latents, loaded, on the network's device.

        Raises:
            OSError: its weights are not available.
            ValueError: `info` names a family that this package does not have.
        """
        if self._encoder is None:
            self._encoder = build_encoder(self.info)
        self._encoder.load()
        return self._encoder.to(self.device)

    def encode(self, images: Tensor) -> Tensor:
        """Encode pictures (B, 3, H, W) in [-1, 1] to clean normalised latents (B, C, h, w).

        Raises:
            ValueError: see `check_pictures`; or sides that do not fit.
        """
        check_pictures(images)
        return self.encoder.encode(images.to(self.device))

    def encode_prompt(self, prompt: str | list[str], cache: str | Path | None = None) -> Tensor:
        """Encode prompts by `text_encoder` to features (B, L, D_text), which `decode` takes instead
        of words, so that the language model may be dropped (``text_encoder = None``).

        Args:
            prompt: one or several.
            cache: a folder of features (`text_cache.cache_captions`); prompts found there need no
                `text_encoder`, others are added.

        Raises:
            Mistake: a network without text, or no words.
            ValueError: no `text_encoder` for an unknown prompt.
        """
        check_takes_text(self.denoiser)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        is_list = isinstance(prompts, (list, tuple)) and len(prompts) > 0
        if not is_list or not all(isinstance(words, str) for words in prompts):
            raise Mistake("prompt", f"{prompt!r} must be words or a list of words, one per sample.")
        width = self.info.config.text_width
        return encode_prompts(self.text_encoder, prompts, width, cache, self.device).to(self.device)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        latent_sigma: float | Sequence[float] | Tensor = 0.0,
        prompt: str | list[str] | Tensor | None = None,
        steps: int | None = None,
        generator: Generators = None,
        seed: int | None = None,
        tile: TileChoice = None,
        progress: bool = True,
        guidance_scale: float = 1.0,
        negative_prompt: str | list[str] | Tensor | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Decode normalised latents to pictures.

        Args:
            latents: (B, C, h, w); see `latent_spaces` for what normalised means.
            latent_sigma: noise level of the latents in [0, 1], one or one per sample; 0 is clean.
            prompt: words, one or one per sample; or text features (L, D_text) or (B, L, D_text);
                None is the learned null.
            steps: sampling steps; None is as many as trained (a teacher: 25).
            generator: the source of noise, one or one per sample.
            seed: instead of a generator: sample i draws its noise on the CPU from (seed, i), so
                its picture depends neither on the rest of the batch nor on the device. Without
                seed and generator, torch's global generator is used. Large pictures on a GPU
                are faster with a generator of the GPU, which draws their noise there.
            tile: side of tiles in output pixels; ``"auto"`` takes tiles of the trained size for
                larger pictures, and smaller ones if memory is short; None decodes without tiles.
            progress: whether to show a progress bar.
            guidance_scale: strength of a teacher's text guidance; 1 turns it off.
            negative_prompt: what guidance leads away from, like `prompt`; None is the learned null,
                or "" for a model that has none.
            deterministic: whether a student adds no fresh noise between its steps.

        Returns:
            (B, 3, H, W) in [-1, 1], fp32, on the network's device.

        Raises:
            ValueError: an argument does not fit the model, or its weights overflow in their dtype.
        """
        info = self.info
        check_options(self.denoiser, info.student_times, steps, tile, prompt, guidance_scale)
        check_latents(latents, info)
        batch_size = len(latents)
        noise = noise_source(generator, seed, batch_size)
        sigma = noise_levels(latent_sigma, batch_size, info.latent_sigma_max).to(self.device)
        plan = Plan.of(
            self.denoiser,
            latents,
            student_times=info.student_times,
            time_shift=info.time_shift,
            steps=steps,
            tile=choose_tile(self.denoiser, info, *self.output_size(latents), tile, batch_size),
            guidance_scale=guidance_scale,
            deterministic=deterministic,
        )
        if guidance_scale != 1 and not info.config.learned_null and negative_prompt is None:
            negative_prompt = ""
        text, null_text = (self._features(p, batch_size) for p in (prompt, negative_prompt))
        latents = latents.to(self.device)
        bar = tqdm(total=plan.num_forwards, desc=str(plan), disable=not progress, leave=False)
        with bar:
            pictures = decode_latents(
                self.denoiser, plan, latents, sigma, text, null_text, noise, bar.update
            )
        if not pictures.isfinite().all():
            raise Mistake(
                "dtype",
                f"the picture is not finite in {self.dtype}; use torch.bfloat16 or float32 instead "
                "of float16, or check the weights.",
            )
        return pictures

    def _features(self, prompt: str | list[str] | Tensor | None, batch_size: int) -> Tensor | None:
        """Features (B, L, D_text) of a prompt; None stays."""
        if prompt is None:
            return None
        features = prompt if isinstance(prompt, Tensor) else self.encode_prompt(prompt)
        return check_features(features, self.info.config.text_width, batch_size).to(self.device)

    def output_size(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in pixels of the pictures that latents (B, C, h, w) decode to."""
        return self.denoiser.geometry.output_size(latents)

    def choose_tile(
        self, height: int, width: int, tile: TileChoice, batch_size: int = 1
    ) -> int | None:
        """The side of the tiles that `decode` uses, see `tile_choice.choose_tile`."""
        check_tile_choice(tile, self.denoiser.alignment)
        return choose_tile(self.denoiser, self.info, height, width, tile, batch_size)

    def estimate_memory(
        self, height: int, width: int, tile: int | None = None, batch_size: int = 1
    ) -> int:
        """Estimate the peak bytes of decoding to height x width pixels, including the weights but
        not copies in compiled graphs; see `memory_estimate`."""
        working = estimate_working_memory(self.info, height, width, tile, self.dtype, batch_size)
        return weight_bytes(self.denoiser) + working
