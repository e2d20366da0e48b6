"""Caption features: token selection, right padding, and a bit-exact cache."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import safe_open

from pid_lightning.checks import Mistake
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


def test_features_of_two_encoders_are_not_mixed(folder, tmp_path):
    cache_captions(encoder(folder), ["a fox"], tmp_path)
    for caption in ("a fox", "red snow"):
        with pytest.raises(Mistake) as told:
            cache_captions(encoder(folder, prefix=""), [caption], tmp_path)
        assert told.value.option == "path"


def test_no_text_is_none():
    assert NoText().encode(["a fox"]) is None


def test_the_model_is_loaded_when_it_is_needed_and_fits(folder, tmp_path):
    """Not for captions that a cache has."""
    options = {"prefix": PREFIX, "length": LENGTH, "text_width": 32, "dtype": "float32"}
    for is_needed in (True, False):
        text = LanguageModelText(folder, **options)
        cache_captions(text, ["a fox"], tmp_path)
        assert (text.transformer is not None) == is_needed
    with pytest.raises(Mistake) as told:
        LanguageModelText(folder).load()
    assert told.value.option == "text_width"


def test_features_come_from_where_the_encoder_was_moved(folder):
    text = LanguageModelText(folder, text_width=32).to("meta")
    text.load()
    assert next(text.transformer.parameters()).is_meta


def test_code_in_a_language_models_folder_is_never_run(tmp_path):
    pytest.importorskip("transformers")
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    (folder / "theirs.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Theirs: pass\n")
    theirs = {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": theirs}))
    tokenizer = {"auto_map": {"AutoTokenizer": ["theirs.Theirs", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    text = LanguageModelText(str(folder))
    with pytest.raises((ValueError, OSError)):
        text.load()
    assert text.transformer is None
    assert not ran.exists()
