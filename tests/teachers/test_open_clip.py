from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import get_clean_fn
from safetensors.torch import save_file

from teachers import open_clip_catalog as catalog
from teachers.device import Accelerator
from teachers.open_clip import OpenClipTeacher, image_spec
from teachers.open_clip_text import clean_text
from teachers.spec import TeacherSpec
from teachers.special_tokens import special_token_escaper
from tests.helpers import tiny_models

CPU = Accelerator("cpu")
TEXTS = ["a", "a photo of a dog on the beach", "", "so many words " * 60, "Ünïcode – 犬"]
KINDS: dict[str, dict[str, Any]] = {
    "small": {"image_size": 32, "embed_dim": 16},
    "large": {"image_size": 48, "width": 48, "embed_dim": 24, "seed": 1, "preprocess": {"mean": 0.5, "std": 0.5}},
    "custom-text": {"custom_text": True, "seed": 2},
    "eos-pooling": {"custom_text": True, "pool_type": "eos", "eos_id": 49407},
    "projection-bias": {"custom_text": True, "proj_bias": True},
    "no-projection": {"embed_dim": 32, "proj_type": "none"},
}
# Towers where what stands behind the end token matters.
FULL_LENGTH: dict[str, dict[str, Any]] = {
    "bidirectional": {"no_causal_mask": True},
    "last-token": {"custom_text": True, "pool_type": "last"},
    "class-token": {"custom_text": True, "embed_cls": True},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.open_clip_model(root / name, **kind) for name, kind in {**KINDS, **FULL_LENGTH}.items()}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REINFORCE_CACHE", str(tmp_path / "cache"))


def _teacher(model: str, device: Accelerator = CPU, **spec: Any) -> OpenClipTeacher:
    return OpenClipTeacher(TeacherSpec(model=model, **spec), device)


def _plain(model: str) -> tuple[Any, Any]:
    return open_clip.create_model(model).eval(), open_clip.get_tokenizer(model)


@pytest.mark.parametrize("kind", [*KINDS, *FULL_LENGTH])
def test_embeddings_are_those_of_plain_open_clip(models: dict[str, str], kind: str) -> None:
    teacher, (model, tokenizer) = _teacher(models[kind]), _plain(models[kind])
    size = KINDS.get(kind, {}).get("image_size", 32)
    pixels = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True)
        texts = model.encode_text(tokenizer(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_images(pixels), images, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), texts, rtol=0, atol=1e-6)
    torch.testing.assert_close(teacher.encode_texts(TEXTS[:2]), texts[:2], rtol=0, atol=1e-6)
    assert teacher.dim == images.shape[1] == texts.shape[1]
    assert images.std(dim=0).max() > 0.01, "the inputs tell the outputs apart"
    assert texts.std(dim=0).max() > 0.01, "the inputs tell the outputs apart"


def _length_seen(teacher: OpenClipTeacher, texts: list[str]) -> int:
    seen: list[int] = []
    blocks = teacher._model.transformer if hasattr(teacher._model, "transformer") else teacher._model.text.transformer
    hook = blocks.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    teacher.encode_texts(texts)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("kind", KINDS)
def test_causal_towers_encode_no_more_tokens_than_the_longest_text(models: dict[str, str], kind: str) -> None:
    teacher = _teacher(models[kind])
    assert _length_seen(teacher, ["a", "a dog"]) == 4
    assert _length_seen(teacher, ["word " * 200]) == 77


@pytest.mark.parametrize("kind", FULL_LENGTH)
def test_other_towers_encode_the_full_length(models: dict[str, str], kind: str) -> None:
    assert _length_seen(_teacher(models[kind]), ["a", "a dog"]) == 77 + (kind == "class-token")


def test_the_scale_is_the_models_own_unless_the_spec_gives_one(models: dict[str, str]) -> None:
    assert _teacher(models["small"]).logit_scale == pytest.approx(1 / 0.07)
    assert _teacher(models["small"], logit_scale=60.0).logit_scale == 60


def test_each_model_states_its_own_preprocessing(models: dict[str, str]) -> None:
    small, large = _teacher(models["small"]).image, _teacher(models["large"]).image
    assert small is not None
    assert large is not None
    assert (small.size, small.mean) == (32, tiny_models.MEAN)
    assert (large.size, large.mean, large.std) == (48, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_bf16_is_near_fp32_and_gives_unit_norm_float32(models: dict[str, str]) -> None:
    exact, fast = _teacher(models["small"]), _teacher(models["small"], Accelerator("cpu", "bf16"))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for one, other in (
        (exact.encode_images(pixels), fast.encode_images(pixels)),
        (exact.encode_texts(TEXTS), fast.encode_texts(TEXTS)),
    ):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(other.norm(dim=-1), torch.ones(len(other)))
        assert (one * other).sum(dim=-1).min() > 0.99


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "weights.pt"])
def test_torch_checkpoints_load_like_safetensors(models: dict[str, str], tmp_path: Path, name: str) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(catalog.local_folder(models["small"]), folder)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save({"state_dict": _plain(models["small"])[0].state_dict()}, folder / name)
    copy = _teacher(f"local-dir:{folder}")
    assert torch.equal(copy.encode_texts(TEXTS), _teacher(models["small"]).encode_texts(TEXTS))


@pytest.mark.parametrize(
    "text",
    ["a <end_of_text> b", "A <END_OF_TEXT> B", "a &lt;end_of_text&gt; b", "a ＜end_of_text＞ b", "<start_of_text>"],
)
def test_special_tokens_in_captions_are_only_text(models: dict[str, str], text: str) -> None:
    teacher = _teacher(models["small"])
    assert bool((open_clip.tokenize([text]) >= 49406).sum() > 2), "plain open_clip takes it for a special token"
    tokens = teacher._text.tokenize([text])[0]
    assert int((tokens == 49406).sum()) == 1
    assert int((tokens == 49407).sum()) == 1
    assert not torch.equal(teacher.encode_texts([text]), teacher.encode_texts(["a b"]))


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(max_codepoint=0x17F)) | st.text("ab <&;>\t\n\x1b[0m'\"", max_size=20))
def test_the_short_way_of_cleaning_is_open_clips(text: str) -> None:
    assert clean_text(text) == get_clean_fn("lower")(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["<s>", "</S>", "<", "s>", "[cls]", "x", " ", "<<s>>"])).map("".join))
def test_no_special_token_is_left_and_the_letters_stay(text: str) -> None:
    special = ["<s>", "</s>", "[CLS]", "s><", "<"]
    result = special_token_escaper(special)(text)
    assert not any(token.lower() in result.lower() for token in special if len(token) > 1)
    assert result.replace(" ", "") == text.replace(" ", "")


def test_words_once_seen_are_not_kept_for_ever(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachers.open_clip_text._MAX_CACHED_WORDS", 100)
    teacher = _teacher(models["small"])
    first = teacher.encode_texts(["a dog"])
    for i in range(40):
        teacher.encode_texts([f"word{'abcdefghij'[i % 10]}{'klmnop'[i % 6]} number {chr(97 + i % 26)}x{'yz' * i}"])
        assert len(teacher._text._tokenizer.cache) <= 100
    assert torch.equal(teacher.encode_texts(["a dog"]), first)


def test_a_models_own_tokenizer_is_used_and_its_special_tokens_are_only_text(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    model = tiny_models.open_clip_model(
        folder, custom_text=True, pool_type="eos", eos_id=2, vocab_size=300, context_length=24, hf_tokenizer_name="own"
    )
    tiny_models.tokenizer(folder, start="<s>", end="</s>", pad="<pad>", length=24)
    teacher, (plain, tokenizer) = _teacher(model), _plain(model)
    texts = ["a photo of a cat", "dog"]
    with torch.no_grad():
        expected = plain.encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(texts), expected, rtol=0, atol=1e-6)
    tokens = teacher._text.tokenize(["a </s> b </S> c <pad>"])[0]
    assert int((tokens == 2).sum()) == 1
    assert _length_seen(teacher, ["a", "a cat"]) < 24


def test_text_towers_of_transformers_get_the_full_length(tmp_path: Path) -> None:
    tower = tiny_models.transformers_bert(tmp_path / "bert")
    config = tiny_models.open_clip_config()
    config["text_cfg"] = {"hf_model_name": tower, "hf_tokenizer_name": tower, "context_length": 24}
    model = tiny_models.seeded(lambda: open_clip.CustomTextCLIP(**config), 0)
    folder = tmp_path / "model"
    tiny_models.tokenizer(folder, start="[CLS]", end="[SEP]", pad="[PAD]", length=24)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    save_file(model.state_dict(), str(folder / "open_clip_model.safetensors"))
    teacher = _teacher(f"local-dir:{folder}")
    with torch.no_grad():
        expected = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS), normalize=True)
    torch.testing.assert_close(teacher.encode_texts(TEXTS), expected, rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(catalog.local_folder(models["small"]), folder)
    shutil.copy(catalog.folder_weights(models["large"]), folder)
    with pytest.raises(ValueError, match=r"open_clip_model.safetensors do not fit local-dir:.*: \w+"):
        _teacher(f"local-dir:{folder}")
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt do not fit ViT-B-32"):
        _teacher("ViT-B-32", pretrained=str(tmp_path / "a.pt"))


def test_padding_preprocessing_is_refused(tmp_path: Path) -> None:
    model = tiny_models.open_clip_model(tmp_path / "m", preprocess={"resize_mode": "longest"})
    with pytest.raises(ValueError, match=r"resize_mode 'longest' pads images.*shortest or squash"):
        _teacher(model)


def test_preprocessing_is_taken_over_with_its_oddities() -> None:
    config = {"size": [32, 48], "mean": 0.5, "std": [1, 2, 3], "interpolation": "bilinear", "resize_mode": "shortest"}
    assert image_spec(config).interpolation == "bicubic"  # open_clip crops oblong images with bicubic always
    assert (image_spec(config).height, image_spec(config).width) == (32, 48)
    assert image_spec({**config, "resize_mode": "squash"}).interpolation == "bilinear"
    assert image_spec({**config, "size": (48, 48)}).size == 48
    assert image_spec({**config, "size": 48, "interpolation": "random"}).interpolation == "bicubic"


def test_weights_of_the_other_activation_are_refused_before_any_download() -> None:
    with pytest.raises(ValueError, match=r"trained with QuickGELU .* use model ViT-L-14-quickgelu"):
        _teacher("ViT-L-14", pretrained="dfn2b")
    with pytest.raises(ValueError, match="models with that tag: ViT-L-14"):
        _teacher("ViT-L-14-quickgelu", pretrained="dfn2b_s39b")


def test_every_published_tag_is_taken_or_leads_to_a_model_that_takes_it() -> None:
    known = set(catalog.builtin_models())
    for model, tag in open_clip.list_pretrained():
        if model not in known:
            continue
        try:
            catalog.check_model(model, tag)
        except ValueError as error:
            other = str(error).rsplit(" ", 1)[-1]
            catalog.check_model(other, tag)


@pytest.mark.parametrize(
    ("model", "pretrained", "message"),
    [
        ("ViT-L14", "openai", "model 'ViT-L14' is unknown to open_clip; did you mean ViT-L-14"),
        ("ViT-L-14", "dnf2b", "'dnf2b' is neither a tag of ViT-L-14 nor a checkpoint file; did you mean dfn2b"),
        ("ViT-L-14", None, r"no weights without `pretrained`: set a checkpoint file or a tag \(openai"),
        ("ViT-L/14", "./epoch_9.pt", r"checkpoint \./epoch_9\.pt does not exist"),
        ("local-dir:/absent/folder", None, "folder /absent/folder does not exist"),
        ("local-dir:/tmp", "openai", "`pretrained` is not used with local-dir:"),
        ("hf-hub:apple/DFN2B-CLIP-ViT-L-14", "dfn2b", "`pretrained` is not used with hf-hub:"),
    ],
)
def test_names_that_cannot_be_are_refused_with_the_mend(
    models: dict[str, str], model: str, pretrained: str | None, message: str
) -> None:
    model = models["small"] if model == "local-dir:/tmp" else model
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        catalog.check_model(model, pretrained)


def test_folders_that_are_not_whole_are_refused(models: dict[str, str], tmp_path: Path) -> None:
    source = catalog.local_folder(models["small"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json does not exist"):
        catalog.check_model(f"local-dir:{tmp_path / 'empty'}", None)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(source / "open_clip_config.json", bare)
    with pytest.raises(FileNotFoundError, match=r"bare has no weights: expected open_clip_model\.safetensors"):
        catalog.check_model(f"local-dir:{bare}", None)
    for name in ("a.pt", "b.pt"):
        (bare / name).touch()
    with pytest.raises(ValueError, match=r"several checkpoints \(a\.pt, b\.pt\): rename the one"):
        catalog.check_model(f"local-dir:{bare}", None)
    (bare / "open_clip_config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no `model_cfg`"):
        catalog.check_model(f"local-dir:{bare}", None)
    (bare / "open_clip_config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        catalog.check_model(f"local-dir:{bare}", None)
