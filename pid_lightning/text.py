"""Caption features for the denoiser: none, cached on disk, or a frozen language model."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module, ABC):
    """A frozen encoder from captions to the features that the denoiser's text stream reads.

    Constructing one is cheap and offline; `load` brings what it needs.

    Attributes:
        text_width: width D_text of the features.
        description: what the features depend on besides the caption; caches are marked with it.
    """

    text_width: int
    description: str

    @abstractmethod
    def load(self) -> None:
        """Bring weights or files; a second call does nothing.

        Raises:
            OSError: they cannot be had; the sentence says how to mend it.
        """

    @abstractmethod
    def encode(self, captions: list[str]) -> Tensor | None:
        """B captions to features (B, L, D_text); None asks for the denoiser's learned null."""

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode: a frozen encoder has no training behaviour."""
        return super().train(False)


class NoText(TextEncoder):
    """No caption features: the denoiser uses its learned null for every sample.

    Args:
        text_width: width to build the denoiser's text stream for, so that captions may come later.
    """

    def __init__(self, text_width: int = 2304) -> None:
        super().__init__()
        self.text_width = text_width
        self.description = "none"

    def load(self) -> None:
        """Nothing to load."""

    def encode(self, captions: list[str]) -> None:
        """None, whatever the captions."""
        return None


def cache_file(path: str | Path, caption: str) -> Path:
    """The file of a cache folder that holds the features of `caption`."""
    return Path(path) / f"{hashlib.sha256(caption.encode()).hexdigest()[:32]}.safetensors"


def cache_captions(
    encoder: TextEncoder, captions: Iterable[str], path: str | Path, batch_size: int = 8
) -> int:
    """Encode captions once and store their features in a folder for `CachedText`.

    Each caption gets a file of its own that appears only when it is complete, so that several
    processes may fill one folder and a stopped run is continued by running it again.

    Args:
        encoder: a loaded encoder with features, e.g. `LanguageModelText`.
        captions: captions; those already stored are left alone. Include "" for pictures without.
        path: the folder, made if missing.
        batch_size: captions encoded together.

    Returns:
        The number of captions newly stored.

    Raises:
        ValueError: the folder holds features of another encoder, or `encoder` has none to store.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    os.makedirs(path, exist_ok=True)
    missing = []
    for caption in dict.fromkeys(captions):
        file = cache_file(path, caption)
        if not file.exists():
            missing.append(caption)
            continue
        with safe_open(file, "pt") as stored:
            found = stored.metadata()["encoder"]
        if found != encoder.description:
            raise ValueError(
                f"{path} holds caption features of {found}, not of {encoder.description}: "
                "give another folder, or remove that one."
            )
    for start in range(0, len(missing), batch_size):
        batch = missing[start : start + batch_size]
        features = encoder.encode(batch)
        if features is None:
            raise ValueError(f"{type(encoder).__name__} makes no features, nothing can be cached.")
        for caption, feature in zip(batch, features, strict=True):
            file = cache_file(path, caption)
            temporary = file.with_suffix(f".{os.getpid()}.tmp")
            metadata = {"caption": caption, "encoder": encoder.description}
            try:
                save_file({"features": feature.cpu().contiguous()}, temporary, metadata)
                os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)
    return len(missing)


class CachedText(TextEncoder):
    """Features that `cache_captions` stored before: training needs no language model in memory.

    Args:
        path: the folder of the cache.
        text_width: width of the stored features.
    """

    def __init__(self, path: str, text_width: int = 2304) -> None:
        super().__init__()
        self.path = path
        self.text_width = text_width
        self.description = f"cache {path}"
        # Follows `.to(device)`, so that features arrive where the denoiser is.
        self.register_buffer("place", torch.empty(0), persistent=False)

    def load(self) -> None:
        """Look that the folder exists.

        Raises:
            OSError: it does not.
        """
        if not Path(self.path).is_dir():
            raise FileNotFoundError(
                f"text cache {self.path} does not exist: make it with "
                "pid_lightning.text.cache_captions(encoder, captions, path)."
            )

    def encode(self, captions: list[str]) -> Tensor:
        """Stored features (B, L, D_text), in the dtype they were stored in.

        Raises:
            OSError: a caption is not in the cache.
            ValueError: features of another width, or captions of different lengths L.
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
        from safetensors.torch import load_file

        file = cache_file(self.path, caption)
        if not file.exists():
            raise FileNotFoundError(
                f"caption {caption!r} is not in the text cache {self.path}: add it with "
                "pid_lightning.text.cache_captions(encoder, captions, path)."
            )
        return load_file(file)["features"]


def encode_prompts(
    encoder: TextEncoder | None,
    prompts: list[str],
    text_width: int,
    cache: str | Path | None = None,
) -> Tensor:
    """Features (B, L, D_text) of a decoder's prompts.

    Args:
        encoder: the decoder's; None has only the cache.
        prompts: B of them.
        text_width: width D_text that the denoiser reads.
        cache: a folder of `cache_captions`; new prompts are added to it.

    Raises:
        ValueError: no encoder for a prompt that is not in the cache, or one of another width.
    """
    if cache is not None and all(cache_file(cache, prompt).exists() for prompt in prompts):
        return CachedText(str(cache), text_width).encode(prompts)
    if encoder is None:
        raise ValueError(
            f"prompt: {prompts[0]!r} needs a language model: set decoder.text_encoder, e.g. to "
            "pid_lightning.LanguageModelText, or give text features or a cache that has it."
        )
    encoder.load()
    if cache is not None:
        cache_captions(encoder, prompts, cache)
        return CachedText(str(cache), text_width).encode(prompts)
    features = encoder.encode(prompts)
    if features is None or features.shape[-1] != text_width:
        made = "no features" if features is None else f"features {features.shape[-1]} wide"
        raise ValueError(f"prompt: text_encoder makes {made}, this model reads {text_width}.")
    return features


class LanguageModelText(TextEncoder):
    """Features of a frozen language model: its last hidden state after the final norm.

    The model reads prefix + caption, padded or cut on the right to (prefix tokens + length - 2);
    token 0 and the last (length - 1) are kept: the start token, the end of the prefix and the
    caption, `length` features in all. Without a prefix the caption alone is padded to `length`.

    Args:
        model: hub id or local folder of a decoder-only transformers model with its tokenizer; the
            released PiD weights were trained with google/gemma-2-2b-it. Only the base transformer
            is loaded, no language modelling head.
        prefix: instruction in front of every caption.
        length: features L per caption.
        text_width: the model's hidden size, needed before it is loaded.
        dtype: of the weights and features.
    """

    def __init__(
        self,
        model: str,
        prefix: str = "",
        length: int = 300,
        text_width: int = 2304,
        dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    ) -> None:
        super().__init__()
        if length < 2:
            raise ValueError(f"text length: {length} is too short, give at least 2.")
        self.model, self.prefix, self.length = model, prefix, length
        self.text_width, self.dtype = text_width, dtype
        digest = hashlib.sha256(prefix.encode()).hexdigest()[:8]
        self.description = f"{model} in {dtype}, length {length}, prefix {digest}"
        self.tokenizer = None
        self.transformer: nn.Module | None = None

    def load(self) -> None:
        """Load tokenizer and transformer from the folder, the hub's cache or the hub.

        Raises:
            OSError: they cannot be had.
            ValueError: the hidden size is not `text_width`, or the tokenizer cannot pad.
        """
        if self.transformer is not None:
            return
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            transformer = AutoModel.from_pretrained(self.model, dtype=getattr(torch, self.dtype))
        except (OSError, ValueError) as error:
            raise OSError(
                f"language model {self.model!r} cannot be had ({str(error).splitlines()[0]}): give "
                "a local folder with its weights and tokenizer, log in where its licence asks for "
                "that, or train without captions by NoText."
            ) from error
        if transformer.config.hidden_size != self.text_width:
            raise ValueError(
                f"language model {self.model!r} is {transformer.config.hidden_size} wide, "
                f"not {self.text_width}: set text_width to that."
            )
        if tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {self.model!r} has no padding token, give it one.")
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        self.tokenizer = tokenizer
        self.transformer = transformer.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """B captions to features (B, length, D_text) in `dtype`, with or without autocast around.

        Raises:
            RuntimeError: `load` has not been called.
        """
        if self.transformer is None:
            raise RuntimeError(f"language model {self.model!r} is not loaded, call load() first.")
        num_tokens = self.length
        if self.prefix:
            num_tokens += len(self.tokenizer(self.prefix)["input_ids"]) - 2
        tokens = self.tokenizer(
            [self.prefix + caption for caption in captions],
            padding="max_length",
            truncation=True,
            max_length=num_tokens,
            return_tensors="pt",
        )
        device = self.transformer.device
        with torch.autocast(device.type, enabled=False):
            hidden = self.transformer(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                use_cache=False,
            ).last_hidden_state  # (B, num_tokens, D_text)
        if not self.prefix:
            return hidden
        return torch.cat([hidden[:, :1], hidden[:, 1 - self.length :]], dim=1)
