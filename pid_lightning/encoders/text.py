"""Caption features for the denoiser: none, cached on disk, or from a frozen language model."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pid_lightning.checks import Mistake, check_at_least, check_choice
from pid_lightning.encoders.pretrained import reaching
from pid_lightning.files.tensors import building_at_most

if TYPE_CHECKING:
    from pid_lightning.nn import PiDConfig

MOST_TENSORS = 5000  # of a language model


class TextEncoder(nn.Module, ABC):
    """A frozen encoder of captions; its features feed the denoiser's text stream.

    Construction is cheap and offline; `load` gets weights or files.

    Attributes:
        text_width: width D_text of the features.
        description: what features depend on besides the caption; identifies caches.
    """

    text_width: int
    description: str

    def __init__(self) -> None:
        super().__init__()
        # Follows `.to(device)`: where what is loaded later goes.
        self.register_buffer("place", torch.empty(0), persistent=False)

    @abstractmethod
    def load(self) -> None:
        """Get weights or files; a second call does nothing.

        Raises:
            OSError: they are not available; the message says how to fix that.
        """

    @abstractmethod
    def encode(self, captions: list[str]) -> Tensor | None:
        """Encode B captions as features (B, L, D_text); None stands for the learned null."""

    def train(self, mode: bool = True) -> TextEncoder:
        """Stay in evaluation mode: a frozen encoder is never trained."""
        return super().train(False)


class NoText(TextEncoder):
    """No captions: the denoiser uses its learned null for every sample."""

    text_width = 0
    description = "none"

    def load(self) -> None:
        """Do nothing."""

    def encode(self, captions: list[str]) -> None:
        """Return None for any captions."""
        return None


def check_text(encoder: TextEncoder, config: PiDConfig, caption_dropout: float) -> None:
    """Check that a denoiser can be trained with an encoder's features.

    Raises:
        Mistake: features of another width, captions shorter than the learned null that replaces
            some, or neither captions nor a null.
    """
    silent = isinstance(encoder, NoText)
    length = getattr(encoder, "length", None)  # cached captions tell theirs when they are read
    uses_null = config.learned_null and caption_dropout > 0
    if not silent and config.text_length and encoder.text_width != config.text_width:
        sentence = (
            f"its features are {encoder.text_width} wide, but the denoiser's text_width is "
            f"{config.text_width}; set model.denoiser.text_width to {encoder.text_width}."
        )
    elif length is not None and uses_null and length < config.text_length:
        sentence = (
            f"{length} tokens a caption, but the learned null has text_length "
            f"{config.text_length}; set model.denoiser.text_length to {length}."
        )
    elif silent and config.text_length and not config.learned_null:
        sentence = (
            "a denoiser without a learned null, as in the published weights, needs caption "
            "features; give model.text, or set model.denoiser.learned_null to true."
        )
    else:
        return
    raise Mistake("text", sentence)


class LanguageModelText(TextEncoder):
    """Features of a frozen language model: its last hidden state after the final norm.

    The model reads prefix + caption, padded or truncated on the right to (prefix tokens +
    length - 2) tokens. Of these, token 0 and the last (length - 1) are kept: the start token, the
    end of the prefix and the caption. Without a prefix the caption is padded to `length`.

    Args:
        model: hub id or local folder of a decoder-only transformers model with its tokenizer; the
            published PiD weights were trained with google/gemma-2-2b-it. The language modelling
            head is not loaded.
        prefix: instruction in front of every caption.
        length: number of features L per caption.
        text_width: the model's hidden size, needed before loading.
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
        check_at_least("length", length, 2)
        check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
        self.model = model
        self.prefix = prefix
        self.length = length
        self.text_width: int = text_width
        self.dtype = dtype
        digest = hashlib.sha256(prefix.encode()).hexdigest()[:8]
        self.description: str = f"{model} in {dtype}, length {length}, prefix {digest}"
        self.tokenizer: Any = None
        self.transformer: nn.Module | None = None

    def load(self) -> None:
        """Load tokenizer and transformer from the folder, the hub's cache or the hub.

        Raises:
            OSError: they are not available.
            Mistake: the hidden size is not `text_width`.
        """
        if self.transformer is not None:
            return
        from transformers import AutoModel, AutoTokenizer

        with reaching(
            f"language model {self.model!r}",
            "give a local folder with its weights and tokenizer, or train without captions "
            "(text: null)",
        ):
            tokenizer = AutoTokenizer.from_pretrained(self.model, trust_remote_code=False)
            with building_at_most(MOST_TENSORS):
                transformer = AutoModel.from_pretrained(
                    self.model, dtype=getattr(torch, self.dtype), trust_remote_code=False
                )
        hidden_size = transformer.config.hidden_size
        if hidden_size != self.text_width:
            raise Mistake(
                "text_width",
                f"{self.text_width} is not that of language model {self.model!r}; give "
                f"{hidden_size}.",
            )
        tokenizer.padding_side = tokenizer.truncation_side = "right"
        self.tokenizer = tokenizer
        self.transformer = transformer.to(self.place.device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Tensor:
        """Encode B captions as features (B, length, D_text) in `dtype`, regardless of autocast.

        Loads the model if that has not been done.
        """
        self.load()
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
