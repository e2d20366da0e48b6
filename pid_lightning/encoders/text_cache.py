"""Caption features kept in files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pid_lightning.checks import Mistake
from pid_lightning.encoders.text import TextEncoder
from pid_lightning.files.atomic import replaced_file
from pid_lightning.files.tensors import check_weights, opened_safetensors, read_tensors


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
        encoder: makes features, e.g. `LanguageModelText`; not loaded if all are stored.
        captions: what to encode; stored ones are skipped. Include "" for pictures without one.
        path: the folder, created if missing.
        batch_size: captions per batch.

    Returns:
        The number of captions newly stored.

    Raises:
        Mistake: the folder holds another encoder's features.
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
            raise Mistake(
                "path",
                f"{path} holds caption features of {found}, not of {encoder.description}; name "
                "another folder, or remove this one.",
            )
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        for caption, feature in zip(batch, encoder.encode(batch), strict=True):
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
        self.description: str = f"cache {path}"

    def load(self) -> None:
        """Check that the folder exists.

        Raises:
            FileNotFoundError: it does not.
        """
        self._check_present(Path(self.path), "the folder")

    def encode(self, captions: list[str]) -> Tensor:
        """Read features (B, L, D_text), in their stored dtype, to where the encoder was moved.

        Raises:
            FileNotFoundError: a caption is not in the cache.
            Mistake: features of another width, or of different lengths L.
        """
        features = [self._read(caption) for caption in captions]
        shapes = sorted({tuple(feature.shape) for feature in features})
        if len(shapes) > 1 or shapes[0][1:] != (self.text_width,) or not shapes[0][0]:
            raise Mistake(
                "text_width",
                f"{self.path} holds features of shapes {shapes} instead of one length and width "
                f"{self.text_width}; set text_width, or cache all with one encoder.",
            )
        return torch.stack(features).to(self.place.device)

    def _read(self, caption: str) -> Tensor:
        file = cache_file(self.path, caption)
        self._check_present(file, f"caption {caption!r}")
        features = read_tensors(file).get("features", Tensor())
        check_weights({"features": features}, f"remove {file}, which is damaged")
        return features

    def _check_present(self, path: Path, what: str) -> None:
        if not path.exists():
            raise FileNotFoundError(
                f"text cache {self.path}: {what} is not there; add it with "
                "pid_lightning.cache_captions(encoder, captions, path)."
            )


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
        text_width: width D_text that the denoiser expects of a cache.
        cache: folder of `cache_captions`; new prompts are added to it.
        device: where the encoder is moved and runs; None leaves it where it is.

    Raises:
        Mistake: no encoder for a prompt that is not cached, or a cache of another encoder.
    """
    missing = [p for p in prompts if cache is None or not cache_file(cache, p).exists()]
    if missing and encoder is None:
        raise Mistake(
            "prompt",
            f"{missing[0]!r} needs a language model; set decoder.text_encoder, e.g. to "
            "pid_lightning.LanguageModelText, or give text features or a cache that has it.",
        )
    if missing:
        encoder.load()
        encoder.to(device)
    if cache is not None:
        if encoder is not None:  # even if nothing is missing: it compares what made the features
            cache_captions(encoder, prompts, cache)
        return CachedText(str(cache), text_width).encode(prompts)
    return encoder.encode(prompts)
