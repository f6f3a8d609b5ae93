"""Teachers of open_clip, their texts, tokens and exports compared with the library itself, also with other insides."""

from __future__ import annotations

import copy
import html
import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn

from teachers.open_clip import catalog
from teachers.open_clip.building import write_open_clip
from teachers.open_clip.teacher import OpenClipTeacher, image_spec
from teachers.open_clip.text import TextEncoder, Tokenizer, clean_text, disable_special_tokens, tokenizer_of
from teachers.protocols import ImageSpec
from teachers.registry import teacher_spec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.models import tiny_models
from tests.helpers.models.tiny_models import FULL_LENGTH, TRIMMED, open_clip_model

CPU = Accelerator("cpu")
OWN, SAFE = open_clip.get_tokenizer("ViT-B-32"), pickle.loads(pickle.dumps(Tokenizer("ViT-B-32")))
TEXTS = ["a", "a photo of a dog on the beach", "", "so many words " * 60, "Ünïcode – 犬"]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))


def _teacher(model: str, device: Accelerator = CPU, **spec: Any) -> OpenClipTeacher:
    return OpenClipTeacher(teacher_spec(model=model, **spec), device)


def _load_open_clip(model: str) -> tuple[Any, Any]:
    return open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)


def _length_seen(teacher: OpenClipTeacher, texts: list[str]) -> int:
    seen: list[int] = []
    blocks = teacher._model.transformer if hasattr(teacher._model, "transformer") else teacher._model.text.transformer
    hook = blocks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    teacher.encode_texts(texts)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", [*TRIMMED, *FULL_LENGTH])
def test_embeddings_match_open_clip_and_only_causal_towers_trim_texts(models: dict[str, str], kind: str) -> None:
    teacher, (model, tokenizer) = _teacher(models[kind]), _load_open_clip(models[kind])
    size = TRIMMED.get(kind, {}).get("image_size", 32)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_images(pixels), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), texts, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS[:2]), texts[:2], rtol=0, atol=1e-6)
    assert teacher.dim == images.shape[1] == texts.shape[1]
    assert min(images.std(dim=0).max(), texts.std(dim=0).max()) > 0.01, "outputs depend on the inputs"
    full = 77 + (kind == "class-token")
    assert _length_seen(teacher, ["a", "a dog"]) == (4 if kind in TRIMMED else full)
    assert _length_seen(teacher, ["word " * 200]) == full


def test_logit_scale_and_preprocessing_are_the_models_own_unless_the_config_states_them(models: dict[str, str]) -> None:
    small, large = _teacher(models["small"]), _teacher(models["large"])
    assert small.logit_scale == pytest.approx(1 / 0.07)
    assert small.image == ImageSpec(32, tiny_models.MEAN, tiny_models.STD)
    assert large.image == ImageSpec(48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    stated = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "interpolation": "bilinear", "resize_mode": "squash"}
    changed = _teacher(models["small"], preprocess=stated, logit_scale=60.0)
    assert changed.logit_scale == 60
    assert changed.image == ImageSpec(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear", "squash")
    changed = _teacher(models["small"], preprocess={"mean": [0.0, 0.0, 0.0]})
    assert changed.image == replace(small.image, mean=(0.0, 0.0, 0.0))


def test_torch_checkpoints_load_like_safetensors_and_others_are_rejected(
    models: dict[str, str], tmp_path: Path
) -> None:
    folder, small = tmp_path / "copy", catalog.local_folder(models["small"])
    folder.mkdir()
    shutil.copy(small / "open_clip_config.json", folder)
    for name in ("weights.pt", "open_clip_pytorch_model.bin"):
        torch.save({"state_dict": _load_open_clip(models["small"])[0].state_dict()}, folder / name)
        copy = _teacher(f"local-dir:{folder}")
        assert torch.equal(copy.encode_texts(TEXTS), _teacher(models["small"]).encode_texts(TEXTS))
        (folder / name).unlink()
    shutil.copy(catalog.folder_weights(models["large"]), folder)
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors do not fit local-dir:.*: \w+"):
        _teacher(f"local-dir:{folder}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt do not fit ViT-B-32"):
        _teacher("ViT-B-32", pretrained=str(tmp_path / "a.pt"))


def test_preprocessing_is_converted_as_open_clip_applies_it() -> None:
    config = {"size": [32, 48], "mean": 0.5, "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": "shortest"}
    assert image_spec(config).interpolation == "bicubic"  # open_clip always uses bicubic for crops that are not square
    assert (image_spec(config).height, image_spec(config).width) == (32, 48)
    assert image_spec({**config, "resize_mode": "squash"}).interpolation == "bilinear"
    assert image_spec({**config, "size": (48, 48)}).size == 48
    assert image_spec({**config, "size": 48, "interpolation": "random"}).interpolation == "bicubic"
    with pytest.raises(ValueError, match=r"resize_mode 'longest' pads images.*shortest or squash"):
        image_spec({**config, "resize_mode": "longest"})


@pytest.mark.parametrize(
    "text",
    ["a <end_of_text> b", "A <END_OF_TEXT> B", "a &lt;end_of_text&gt; b", "a ＜end_of_text＞ b", "<start_of_text>"],
)
def test_special_tokens_in_texts_are_read_as_plain_text(models: dict[str, str], text: str) -> None:
    teacher = _teacher(models["small"])
    assert bool((open_clip.tokenize([text]) >= 49406).sum() > 2), "open_clip reads it as a special token"
    for tokens in (teacher._text.tokenize([text])[0].tolist(), SAFE([text])[0].tolist()):
        assert tokens.count(49406) == tokens.count(49407) == 1
        assert tokens.index(49407) > 6
    assert not torch.equal(teacher.encode_texts([text]), teacher.encode_texts(["a b"]))


@settings(max_examples=100)
@given(st.text(st.characters(max_codepoint=0x17F)) | st.text("ab <&;>\t\n\x1b[0m'\"", max_size=20))
def test_clean_text_matches_open_clip(text: str) -> None:
    assert clean_text(text) == get_clean_fn("lower")(text)


def test_tokenizers_share_their_vocabulary_and_nothing_that_changes(tmp_path: Path) -> None:
    texts = ["a photo of a cat", "<end_of_text> &amp; unheard words"]
    short = open_clip_model(tmp_path / "short", context_length=9)
    for name, context in (("ViT-B-32", None), ("ViT-B-32", 12), (short, None), ("MobileCLIP-S1", None)):
        one = disable_special_tokens(tokenizer_of(name, context))
        one(["unheard words"])
        other, theirs = tokenizer_of(name, context), open_clip.get_tokenizer(name, context)
        assert other.encoder is one.encoder
        assert (other.clean_fn, other.cache) == (theirs.clean_fn, theirs.cache)
        assert torch.equal(other(texts), theirs(texts))
        assert not torch.equal(one(texts), theirs(texts)), "special tokens in texts are special for open_clip"


def test_the_token_cache_is_bounded(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.open_clip.text._MAX_CACHED_WORDS", 100)
    teacher = _teacher(models["small"])
    first = teacher.encode_texts(["a dog"])
    for i in range(40):
        teacher.encode_texts([f"word{'abcdefghij'[i % 10]}{'klmnop'[i % 6]} number {chr(97 + i % 26)}x{'yz' * i}"])
        assert len(teacher._text._tokenizer.cache) <= 100
    assert torch.equal(teacher.encode_texts(["a dog"]), first)


def test_a_hugging_face_tokenizer_is_used_and_exported_and_its_special_tokens_are_plain_text(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model = tiny_models.open_clip_model(
        folder, custom_text=True, pool_type="eos", eos_id=2, vocab_size=300, context_length=24, hf_tokenizer_name="own"
    )
    tiny_models.tokenizer(folder, start="<s>", end="</s>", pad="<pad>", length=24)
    teacher, (plain, tokenizer) = _teacher(model), _load_open_clip(model)
    texts = ["a photo of a cat", "dog"]
    with torch.no_grad():
        expected = plain.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(texts), expected, rtol=0, atol=1e-6)
    tokens = teacher._text.tokenize(["a </s> b </S> c <pad>"])[0]
    assert int((tokens == 2).sum()) == 1
    assert _length_seen(teacher, ["a", "a cat"]) < 24
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    write_open_clip(plain, config, tokenizer, str(tmp_path / "exported"))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{tmp_path / 'exported'}")(texts), tokenizer(texts))


def test_text_towers_of_transformers_encode_the_full_length(tmp_path: Path) -> None:
    tower = tiny_models.transformers_bert(tmp_path / "bert")
    config = tiny_models.open_clip_config()
    config["text_cfg"] = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 24}
    model = tiny_models.seeded(lambda: open_clip.CustomTextCLIP(**config), 0)
    folder = tmp_path / "model"
    tiny_models.tokenizer(folder, start="[CLS]", end="[SEP]", pad="[PAD]", length=24)
    name = tiny_models.save_open_clip(folder, config, {}, model)
    teacher = _teacher(name)
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(name)(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), expected, rtol=0, atol=1e-6)


@example("A photo of a  cat, naïve café, " * 40)
@given(st.text(max_size=60).filter(lambda text: "<" not in html.unescape(html.unescape(text))))
@settings(max_examples=100)
def test_tokens_of_any_text_match_open_clip(text: str) -> None:
    twice = [text, text]  # the second text uses the token cache
    assert torch.equal(SAFE(twice), OWN(twice))


OTHER_TEXTS = ["a photo of a cat", "", "two &lt;end_of_text&gt; dogs", "so many words " * 60]


class Ahead(open_clip.SimpleTokenizer):
    """A tokenizer that has renamed what it is made of."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner = open_clip.SimpleTokenizer(**options)
        for name in ("pat", "byte_encoder", "clean_fn"):
            delattr(self, name)

    def __call__(self, texts: Any, context_length: int | None = None) -> torch.Tensor:
        found: torch.Tensor = self.inner(texts, context_length)
        return found


def test_a_model_with_other_insides_encodes_its_texts_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = open_clip_model(tmp_path / "model")
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    expected = model.encode_text(tokenizer(["a photo of a cat", "a dog"]))
    inner = copy.deepcopy(model)
    model.__class__ = type("CLIP", (open_clip.CLIP,), {"encode_text": lambda _, tokens: inner.encode_text(tokens)})
    del model.text_pool_type
    with caplog.at_level(logging.WARNING):
        encoder = TextEncoder(model, tokenizer, Accelerator("cpu"))
    assert "trimming of texts is left out: this code does not know the insides of open_clip" in caplog.text
    assert torch.equal(encoder.encode(encoder.tokenize(["a photo of a cat", "a dog"])), expected)


def test_a_tokenizer_with_other_insides_gives_the_same_tokens(caplog: pytest.LogCaptureFixture) -> None:
    usual = disable_special_tokens(open_clip.SimpleTokenizer(context_length=40))
    with caplog.at_level(logging.WARNING):
        ahead = disable_special_tokens(Ahead(context_length=40))
    assert "fast tokenization is left out" in caplog.text
    assert torch.equal(ahead(OTHER_TEXTS), usual(OTHER_TEXTS))
    assert (ahead(["<end_of_text>", "<START_OF_TEXT>"])[:, 1:3] < 49406).all(), "special tokens are plain text"
    assert torch.equal(copy.copy(ahead)(OTHER_TEXTS), usual(OTHER_TEXTS))
    assert ahead.context_length == 40


def test_a_tokenizer_of_other_tokens_stays(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.open_clip.text._cached_encode", lambda tokenizer: lambda text: [7])
    with caplog.at_level(logging.WARNING):
        changed = disable_special_tokens(open_clip.SimpleTokenizer())
    assert "it would have other tokens" in caplog.text
    monkeypatch.undo()
    assert torch.equal(changed(OTHER_TEXTS), disable_special_tokens(open_clip.SimpleTokenizer())(OTHER_TEXTS))
