"""``reinforce export transformers``: what transformers loads of it, and what is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from teachers.open_clip.text import Tokenizer
from tests.helpers import shipping as models
from tests.helpers.commands import Printed
from tests.helpers.models.tiny_models import open_clip_config, save_open_clip, seeded
from tests.helpers.students import student_folder

EXPORT = ("export", "transformers")
LABELS = ["a cat", "a dog", "<end_of_text>"]  # as plain text


def picture(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(width).integers(0, 256, (5, 5, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def text_of_transformers(folder: Path, pooler: str) -> str:
    """Write a ViT of open_clip with a text tower of transformers."""
    student_folder(folder, "hf", text_cfg={"hf_pooler_type": pooler, "hf_proj_type": "linear"})
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_model_pretrained"] = False
    config = {**config, "custom_text": True}
    preprocess = {"mean": models.MEAN, "std": models.STD, "resize_mode": "squash", "interpolation": "bilinear"}
    plain = {key: value for key, value in config.items() if key != "custom_text"}
    return save_open_clip(folder, config, preprocess, seeded(lambda: open_clip.CustomTextCLIP(**plain), 5))


def biased(folder: Path) -> str:
    """Write a FastViT whose projection has a bias, and no norm before it."""
    name = models.fastvit(folder, causal=True)
    weights = folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.trunk.head.fc.bias"].fill_(0.1)
    save_file(state, weights)
    return name


def quick(folder: Path) -> str:
    """Write a ViT with QuickGELU, whose projections are left out, and texts that are pooled at a stated end token."""
    config = {**open_clip_config(embed_dim=32, pool_type="eos", eos_id=49407, proj_type="none"), "quick_gelu": True}
    model = seeded(lambda: open_clip.CustomTextCLIP(**config), 4)
    return save_open_clip(folder, {**config, "custom_text": True}, {"mean": 0.5, "std": 0.5, "size": 32}, model)


WRITTEN: dict[str, tuple[Any, str]] = {
    "vit": (models.vit, "CLIPModel"),
    "quick": (quick, "CLIPModel"),
    "timm with a bias": (models.timm_vit, "VisionTextDualEncoderModel"),
    "timm with a projection": (lambda folder: models.timm_vit(folder, "linear"), "VisionTextDualEncoderModel"),
    "text of transformers": (lambda folder: text_of_transformers(folder, "cls_pooler"), "VisionTextDualEncoderModel"),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_pipeline_gives_the_probabilities_of_open_clip(kind: str, tmp_path: Path, printed: Printed) -> None:
    write, class_name = WRITTEN[kind]
    name, folder = write(tmp_path / "model"), str(tmp_path / "out")
    differences = [float(one) for one in re.findall(r"largest difference (\S+)", printed(*EXPORT, name, folder))]
    assert len(differences) == 2
    assert max(differences) < 1e-4
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        images = clip.eval().encode_image(torch.stack([preprocess(picture(*size)) for size in ((50, 40), (32, 32))]))
        texts = clip.encode_text(Tokenizer(name)(LABELS))
        scale = clip.logit_scale.exp()
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert type(model).__name__ == class_name
    processor = transformers.AutoProcessor.from_pretrained(folder)
    given = processor(text=LABELS, images=[picture(32, 32)], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**given)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    torch.testing.assert_close(found.text_embeds, unit(texts), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.image_embeds, unit(images[1:]), rtol=0, atol=1e-4)
    assert float(unit(texts).std(0).max()) > 0.01, "equal texts would agree too"

    classify = transformers.pipeline("zero-shot-image-classification", model=folder)
    found = classify(picture(50, 40), candidate_labels=LABELS, hypothesis_template="{}")
    expected = (scale * unit(images[0]) @ unit(texts).T).softmax(0)
    scores = {one["label"]: one["score"] for one in found}
    assert [scores[label] for label in LABELS] == pytest.approx(expected.tolist(), abs=5e-3), "resizers differ"

    printed(*EXPORT, folder, "--check")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), flags=re.DOTALL)
    compile(code, "README.md", "exec")


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "fastvit"])
def test_image_tower_alone_has_the_embeddings_of_open_clip(kind: str, tmp_path: Path, printed: Printed) -> None:
    name, folder = getattr(models, kind)(tmp_path / "model"), str(tmp_path / "out")
    assert printed(*EXPORT, name, folder, "--tower", "image").count("largest difference") == 1
    (code_block,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out/README.md").read_text(), flags=re.DOTALL)
    picture(128, 70).save(tmp_path / "cat.jpg")
    scope: dict[str, Any] = {}
    exec(code_block.replace('"."', repr(folder)).replace("cat.jpg", f"{tmp_path}/cat.jpg"), scope)
    clip, _, preprocess = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        expected = clip.eval().encode_image(preprocess(Image.open(tmp_path / "cat.jpg"))[None])
        found = scope["model"](**scope["pixels"])
    embedding = found.get("image_embeds", found.get("logits"))
    torch.testing.assert_close(embedding, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert not (tmp_path / "out/tokenizer.json").exists()
    printed(*EXPORT, folder, "--check")


def not_finite(folder: Path) -> str:
    """Write a ViT with weights that are no numbers, from which all results differ infinitely."""
    name, weights = models.vit(folder), folder / "open_clip_model.safetensors"
    state = load_file(weights)
    state["visual.conv1.weight"].fill_(float("nan"))
    save_file(state, weights)
    return name


REFUSED: dict[str, tuple[Any, str]] = {
    "tokens attend to later ones": (models.fastvit, "its text tower lets tokens attend to later ones"),
    "bias": (biased, "its image tower's projection has a bias"),
    "several layers": (lambda folder: models.timm_vit(folder, "mlp"), "its image tower ends with timm_mlp"),
    "bias of texts": (lambda folder: models.timm_vit(folder, proj_bias=True), "its text tower's projection has a bias"),
    "last token": (lambda folder: models.timm_vit(folder, pool_type="last"), "its text tower pools by `last`"),
    "mean": (lambda folder: text_of_transformers(folder, "mean_pooler"), "its text tower pools by MeanPooler"),
    "resnet": (models.resnet, "no image tower like open_clip's ModifiedResNet"),
    "not finite": (not_finite, "differs by inf from torch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_transformers_cannot_compute_is_refused_and_nothing_is_written(
    kind: str, tmp_path: Path, refused: Printed
) -> None:
    write, reason = REFUSED[kind]
    assert reason in refused(*EXPORT, write(tmp_path / "model"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
