"""The models by name of docs/teachers.md, as tiny models of the same classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, RadioModel, Siglip2Model, XLMRobertaModel

from reinforce.config import parse_config
from reinforce.engine.plan.plan import build_layers, describe_models
from reinforce.engine.worker.models import load_models
from reinforce.engine.worker.producers.registry import check_models
from reinforce.engine.worker.self_test import precisions
from reinforce.errors import UserError
from teachers.registry import describe_model, load_model, teacher_spec
from teachers.transformers.teacher import square_size
from tests.helpers.models import named_models
from tests.helpers.pages import blocks


def tiny(name: str, entry: dict[str, Any], root: Path) -> dict[str, Any]:
    """An entry of the page with the tiny model in place of the large one."""
    if entry.get("family") == "timm":
        describe_model(name, teacher_spec(**entry))  # raises for a name that timm does not have
        return {"family": "timm", "model": named_models.timm_named(root / name, entry["model"])}
    if entry.get("family") != "transformers":
        return {"model": named_models.open_clip_named(root / name, entry["model"])}
    size = {"image_size": named_models.SIDE} if "image_size" in entry else {}
    return {**entry, **size, "model": named_models.TRANSFORMERS[entry["model"]](root / name)}


def load(model: str, **options: Any) -> Any:
    return load_model("named", teacher_spec(family="transformers", model=model, **options), "cpu")


def test_each_passes_the_self_test_with_the_sides_and_the_dimension_that_were_described(tmp_path: Path) -> None:
    shown = yaml.safe_load(blocks("docs/teachers.md", "yaml")[1].text)["teachers"]
    teachers = {name: tiny(name, entry, tmp_path) for name, entry in shown.items()}
    config = parse_config({"source": "x.tar", "output": "out", "teachers": teachers})
    described = describe_models(config)
    layers = build_layers(config, described).values()
    models = load_models(config, layers)
    check_models(models, layers, precisions(config))
    for layer in layers:
        if layer.model is not None and teachers[layer.model].get("family") != "timm":  # known once it is loaded
            assert layer.dim == models.loaded["teachers"][layer.model].dim, layer.name
    sides = {name: (info.images, info.texts) for (_, name), info in described.items()}
    alone = {"dinov2", "dinov3", "c-radio", "dinov2-timm", "dinov3-timm", "siglip2-images"}
    assert {name for name, found in sides.items() if found == (True, False)} == alone
    assert {name for name, found in sides.items() if found == (False, True)} == {"minilm", "e5", "bge"}


def test_a_hub_model_without_texts_is_known_by_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teachers = {"dino": {"family": "transformers", "model": named_models.dinov3(tmp_path / "dino")}}
    config = parse_config({"source": "x.tar", "output": "out", "teachers": teachers})
    alone = parse_config({"source": "x.tar", "output": "out", "teachers": teachers, "input": {"captions": "none"}})
    with monkeypatch.context() as before:
        before.setattr("teachers.transformers.family.read_config", lambda _: None)
        before.setattr("teachers.transformers.family.TransformersTeacherSpec.check_tokenizer", lambda _: None)
        layers, of_images = (build_layers(one, describe_models(one)).values() for one in (config, alone))
    models = load_models(config, layers)
    with pytest.raises(UserError, match=r"dino fails .*it encodes no texts, .* run the command again"):
        check_models(models, layers, precisions(config))
    assert "embeddings/dino/caption" not in {layer.name for layer in of_images}
    check_models(models, of_images, precisions(alone))


def test_siglip_2_needs_texts_in_lower_case(tmp_path: Path) -> None:
    folder = named_models.siglip2(tmp_path / "siglip2")
    with pytest.raises(ValueError, match=r"teacher named: SigLIP 2 was trained on lower-cased .* `lowercase: true`"):
        load(folder)
    lower, kept = (load(folder, lowercase=value).encode_texts(["A Cat", "a cat"]) for value in (True, False))
    assert lower[0].equal(lower[1])
    assert not kept[0].equal(kept[1])
    naflex = load(named_models.naflex(tmp_path / "naflex")).encode_texts(["A Cat", "a cat"])
    assert naflex[0].equal(naflex[1])


def test_the_summary_of_c_radio_is_all_its_class_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = named_models.radio(tmp_path / "radio")
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = RadioModel.from_pretrained(folder).eval()(pixels)
    for options, expected in (({"pooling": "summary"}, output.summary), ({}, output.last_hidden_state[:, 0])):
        teacher = load(folder, **options)
        assert teacher.dim == expected.shape[1]
        found = teacher.encode_images(pixels)
        torch.testing.assert_close(found, torch.nn.functional.normalize(expected), rtol=0, atol=1e-5)
    assert "set `pooling: summary`" in caplog.text


def test_the_first_token_of_a_sentence_encoder_is_taken_on_either_side_of_padding(tmp_path: Path) -> None:
    folder, texts = named_models.xlm_roberta(tmp_path / "words"), ["a", "a photo of a cat"]
    right = load(folder, pooling="cls").encode_texts(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        output = XLMRobertaModel.from_pretrained(folder).eval()(**tokenizer(texts, padding=True, return_tensors="pt"))
    expected = torch.nn.functional.normalize(output.last_hidden_state[:, 0])
    torch.testing.assert_close(right, expected, rtol=0, atol=1e-6)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    torch.testing.assert_close(load(folder, pooling="cls").encode_texts(texts), expected, rtol=0, atol=1e-6)


def test_options_that_a_model_does_not_use_are_refused(tmp_path: Path) -> None:
    clip, dino = named_models.metaclip2(tmp_path / "clip"), named_models.dinov3(tmp_path / "dino")
    words = named_models.xlm_roberta(tmp_path / "words")
    refused: list[tuple[str, dict[str, Any], str]] = [
        (clip, {"pooling": "cls"}, "`pooling` is not used by MetaClip2Model"),
        (clip, {"image_size": 48}, "MetaClip2Model cannot be a teacher: .*32"),
        (dino, {"pooling": "summary"}, "DINOv3ViTModel cannot be a teacher: .*no summary"),
        (dino, {"lowercase": True}, "are for texts"),
        (words, {"image_size": 48}, "are for images"),
    ]
    for model, options, message in refused:
        with pytest.raises(ValueError, match=f"teacher named: .*{message}"):
            load(model, **options)
    with pytest.raises(ValueError, match="pooling: used only with family transformers; remove it"):
        teacher_spec(model="ViT-B-32", pretrained="openai", pooling="cls")


@pytest.mark.parametrize("size", [None, 64])
def test_square_images_get_the_embeddings_of_transformers(tmp_path: Path, size: int | None) -> None:
    folder = named_models.naflex(tmp_path / "naflex")
    teacher = load_model("naflex", teacher_spec(family="transformers", model=folder, image_size=size), "cpu")
    side = size or 32
    assert teacher.image.size == side
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    processor = AutoImageProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.fromarray(image)], max_num_patches=(side // 8) ** 2, return_tensors="pt")
    with torch.no_grad():
        output = Siglip2Model.from_pretrained(folder).eval().get_image_features(**inputs)
    expected = torch.nn.functional.normalize(output if isinstance(output, torch.Tensor) else output.pooler_output)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255 * 2 - 1
    torch.testing.assert_close(teacher.encode_images(pixels), expected, rtol=0, atol=1e-5)


def test_a_size_between_patches_is_refused_with_the_nearest() -> None:
    processor = {"patch_size": 16, "max_num_patches": 256}
    assert square_size(processor, None) == 256
    assert square_size({}, 224) == 224
    with pytest.raises(ValueError, match=r"250` is not a multiple of the model's patch of 16 pixels: use 256"):
        square_size(processor, 250)
