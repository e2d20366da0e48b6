"""Caption features: token selection, right padding, and a bit-exact cache."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors import safe_open

from pid_lightning.encoders.text import LanguageModelText, NoText
from pid_lightning.encoders.text_cache import CachedText, cache_captions, cache_file

PREFIX = "describe the picture : "
WORDS = [
    "<pad>",
    "<bos>",
    "<unk>",
    "describe",
    "the",
    "picture",
    ":",
    "a",
    "red",
    "fox",
    "on",
    "snow",
]
LENGTH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Gemma 2 with 32 channels and a whole-word tokenizer, saved as on the hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
    )
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            pad_token_id=0,
            bos_token_id=1,
        )
    )
    path = tmp_path_factory.mktemp("gemma")
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def encoder(folder: str, **changes) -> LanguageModelText:
    options = {"prefix": PREFIX, "length": LENGTH, "text_width": 32, "dtype": "float32"}
    text = LanguageModelText(folder, **(options | changes))
    text.load()
    return text


def by_hand(folder: str, ids: list[int]) -> torch.Tensor:
    """Last hidden state (L, 32) of the full model with head and masked padding."""
    from transformers import Gemma2ForCausalLM

    model = Gemma2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mask = torch.tensor([[int(i != 0) for i in ids]])
    with torch.no_grad():
        out = model(torch.tensor([ids]), attention_mask=mask, output_hidden_states=True)
    return out.hidden_states[-1][0]


def test_features_are_token_0_and_the_last_ones(folder):
    text = encoder(folder)
    features = text.encode(["a fox", "a red fox on snow"])
    # <bos> and 4 prefix words are 5 tokens, so 5 + 6 - 2 = 9 tokens with right padding.
    short = by_hand(folder, [1, 3, 4, 5, 6, 7, 9, 0, 0])
    long = by_hand(folder, [1, 3, 4, 5, 6, 7, 8, 9, 10])
    kept = [0, 4, 5, 6, 7, 8]
    assert features.shape == (2, LENGTH, 32)
    torch.testing.assert_close(features[0], short[kept])
    torch.testing.assert_close(features[1], long[kept])


def test_without_a_prefix_all_tokens_are_kept(folder):
    features = encoder(folder, prefix="").encode(["a fox"])
    torch.testing.assert_close(features[0], by_hand(folder, [1, 7, 9, 0, 0, 0]))


def test_padding_does_not_reach_the_words_before_it(folder):
    features = encoder(folder).encode(["a fox", "a fox on"])
    torch.testing.assert_close(features[0, :4], features[1, :4])
    assert not torch.allclose(features[0, 4], features[1, 4])


def test_only_the_base_transformer_is_loaded_and_it_is_frozen(folder):
    text = encoder(folder)
    assert not hasattr(text.transformer, "lm_head")
    assert not any(p.requires_grad for p in text.parameters())
    assert not text.train().transformer.training


def test_autocast_around_it_changes_nothing(folder):
    text = encoder(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = text.encode(["a fox"])
    assert torch.equal(inside, text.encode(["a fox"]))
    assert encoder(folder, dtype="bfloat16").encode(["a fox"]).dtype == torch.bfloat16


def test_the_cache_gives_back_every_bit(folder, tmp_path):
    text = encoder(folder, dtype="bfloat16")
    captions = ["a fox", "", "a red fox", "a fox"]
    assert cache_captions(text, captions, tmp_path, batch_size=2) == 3
    assert cache_captions(text, captions, tmp_path) == 0
    cached = CachedText(str(tmp_path), text_width=32)
    cached.load()
    assert torch.equal(cached.encode(captions[:2]), text.encode(captions[:2]))
    assert sorted(os.listdir(tmp_path)) == sorted(
        cache_file(tmp_path, c).name for c in set(captions)
    )
    with safe_open(cache_file(tmp_path, "a fox"), "pt") as file:
        assert file.metadata()["caption"] == "a fox"


def test_a_write_that_fails_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        cache_captions(encoder(folder), ["a fox"], tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_missing_caption_is_named_with_its_cure(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'a cat' is not in .* add it with .*cache_cap"):
        CachedText(str(tmp_path)).encode(["a cat"])
    with pytest.raises(FileNotFoundError, match="does not exist: create it with"):
        CachedText(str(tmp_path / "none")).load()


def test_features_of_two_encoders_are_not_mixed(folder, tmp_path):
    cache_captions(encoder(folder), ["a fox"], tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        cache_captions(encoder(folder, prefix=""), ["a fox"], tmp_path)
    with pytest.raises(ValueError, match="another folder"):
        cache_captions(encoder(folder, prefix=""), ["red snow"], tmp_path)
    with pytest.raises(ValueError, match="set text_width"):
        CachedText(str(tmp_path), text_width=64).encode(["a fox"])


def test_no_text_is_none_and_cannot_be_cached(tmp_path):
    assert NoText().encode(["a fox"]) is None
    with pytest.raises(ValueError, match="makes no features"):
        cache_captions(NoText(), ["a fox"], tmp_path)


def test_mistakes_are_one_sentence(folder, tmp_path):
    with pytest.raises(OSError, match=r"is not available .* give a local folder") as caught:
        LanguageModelText(str(tmp_path)).load()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is 32 wide, not 2304: set text_width"):
        LanguageModelText(folder).load()
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        LanguageModelText(folder).encode(["a fox"])
