"""Caption features kept in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pid_lightning.encoders.text import TextEncoder
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import opened_safetensors, read_tensors


def cache_file(path: str | Path, caption: str) -> Path:
    """Path in a cache folder of the features of `caption`."""
    return Path(path) / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"


def cache_captions(
    encoder: TextEncoder, captions: Iterable[str], path: str | Path, batch_size: int = 8
) -> int:
    """Encode captions once and store their features in a folder for `CachedText`.

    Each caption has its own file, which appears only when complete: several processes can fill
    one folder, and running it again resumes a stopped one.

    Args:
        encoder: makes features, e.g. `LanguageModelText`; loaded, unless all captions are stored.
        captions: what to encode; stored ones are skipped. Include "" for pictures without one.
        path: the folder, created if missing.
        batch_size: captions per batch.

    Returns:
        The number of captions newly stored.

    Raises:
        ValueError: the folder holds another encoder's features, or `encoder` makes none.
    """
    from safetensors.torch import save_file

    files = {caption: cache_file(path, caption) for caption in captions}
    missing = [caption for caption, file in files.items() if not file.exists()]
    # Any other one too: a folder holds the features of one encoder.
    present = {file for file in files.values() if file.exists()}
    present.update(islice(Path(path).glob("*.safetensors"), 1))
    for file in present:
        with opened_safetensors(file) as stored:
            found = (stored.metadata() or {}).get("encoder")
        if found != encoder.description:
            raise ValueError(
                f"{path} holds caption features of {found}, not of {encoder.description}: "
                "name another folder, or remove this one."
            )
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        features = encoder.encode(batch)
        if features is None:
            raise ValueError(
                f"{type(encoder).__name__} makes no features to cache; use LanguageModelText."
            )
        for caption, feature in zip(batch, features, strict=True):
            metadata = {"caption": caption, "encoder": encoder.description}
            with replaced_file(cache_file(path, caption)) as temporary:
                save_file({"features": feature.cpu().contiguous()}, temporary, metadata)
    return len(missing)


class CachedText(TextEncoder):
    """Features stored by `cache_captions`: training needs no language model in memory.

    Args:
        path: the folder of the cache.
        text_width: width of the stored features.
    """

    def __init__(self, path: str, text_width: int = 2304) -> None:
        super().__init__()
        self.path = path
        self.text_width = text_width
        self.description = f"cache {path}"
        # Follows `.to(device)`, so that features are returned on the denoiser's device.
        self.register_buffer("place", torch.empty(0), persistent=False)

    def load(self) -> None:
        """Check that the folder exists.

        Raises:
            FileNotFoundError: it does not.
        """
        if not Path(self.path).is_dir():
            raise FileNotFoundError(
                f"text cache {self.path} does not exist: create it with "
                "pid_lightning.encoders.text_cache.cache_captions(encoder, captions, path)."
            )

    def encode(self, captions: list[str]) -> Tensor:
        """Read features (B, L, D_text), in their stored dtype.

        Raises:
            FileNotFoundError: a caption is not in the cache.
            ValueError: features of another width, or of different lengths L.
        """
        features = [self._read(caption) for caption in captions]
        shapes = sorted({tuple(feature.shape) for feature in features})
        if len(shapes) > 1 or shapes[0][-1] != self.text_width:
            raise ValueError(
                f"text cache {self.path} holds features of shapes {shapes}, expected one length "
                f"and width {self.text_width}: set text_width, or cache all with one encoder."
            )
        return torch.stack(features).to(self.place.device)

    def _read(self, caption: str) -> Tensor:
        file = cache_file(self.path, caption)
        if not file.exists():
            raise FileNotFoundError(
                f"caption {caption!r} is not in the text cache {self.path}: add it with "
                "pid_lightning.encoders.text_cache.cache_captions(encoder, captions, path)."
            )
        return read_tensors(file)["features"]


def encode_prompts(
    encoder: TextEncoder | None,
    prompts: list[str],
    text_width: int,
    cache: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Encode a decoder's prompts as features (B, L, D_text).

    Args:
        encoder: the decoder's text encoder; None reads from the cache only.
        prompts: B prompts.
        text_width: width D_text that the denoiser expects.
        cache: folder of `cache_captions`; new prompts are added to it.
        device: where the encoder is moved and runs; None leaves it where it is.

    Raises:
        ValueError: no encoder for a prompt that is not cached, one of another width, or a cache of
            another one.
    """
    missing = [p for p in prompts if cache is None or not cache_file(cache, p).exists()]
    if missing and encoder is None:
        raise ValueError(
            f"prompt: {missing[0]!r} needs a language model: set decoder.text_encoder, e.g. to "
            "pid_lightning.LanguageModelText, or give text features or a cache that has it."
        )
    if missing:
        encoder.load()
        encoder.to(device)
    if cache is not None:
        if encoder is not None:  # even if nothing is missing: it compares what made the features
            cache_captions(encoder, prompts, cache)
        return CachedText(str(cache), text_width).encode(prompts)
    features = encoder.encode(prompts)
    if features is None or features.shape[-1] != text_width:
        made = "no features" if features is None else f"features {features.shape[-1]} wide"
        raise ValueError(
            f"prompt: text_encoder makes {made}, but this model expects {text_width}; use the "
            "encoder it was trained with."
        )
    return features
