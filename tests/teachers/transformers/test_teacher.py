"""Teachers of transformers compared with the library itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BitImageProcessor,
    CLIPModel,
    Dinov2Model,
    LlamaConfig,
    LlamaModel,
    SiglipModel,
)

from teachers.registry import describe_model, load_model, teacher_spec
from teachers.runtime.accelerator import Accelerator
from teachers.transformers import family
from teachers.transformers.teacher import ImageTeacher, TextTeacher, TransformersTeacher, image_spec, load
from tests.helpers.models import tiny_models

CPU = Accelerator("cpu")
TEXTS = ["a", "a photo of a dog on the beach", "", "so many words " * 60, "Ünïcode – 犬"]


def _load(folder: Path, device: Accelerator = CPU, **spec: Any) -> Any:
    return load(teacher_spec(family="transformers", model=str(folder), **spec), device)


def _pixels(size: int) -> torch.Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))


def _plain_features(output: Any) -> torch.Tensor:
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features, dim=-1)


def _assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found.std(dim=0).max() > 0.01, "outputs depend on the inputs"


@pytest.mark.parametrize(("kind", "plain"), [("clip", CLIPModel), ("siglip", SiglipModel)])
def test_dual_encoders_match_transformers_with_texts_of_full_length(root: Path, kind: str, plain: Any) -> None:
    teacher = _load(root / kind)
    assert isinstance(teacher, TransformersTeacher)
    model, tokenizer = plain.from_pretrained(root / kind).eval(), AutoTokenizer.from_pretrained(root / kind)
    tokens = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=24, return_tensors="pt")
    if kind == "siglip":  # its tokenizer on the hub returns no mask
        del tokens["attention_mask"]
    with torch.no_grad():
        texts = _plain_features(model.get_text_features(**tokens))
        images = _plain_features(model.get_image_features(pixel_values=_pixels(32)))
    _assert_close(teacher.encode_texts(TEXTS), texts)
    _assert_close(teacher.encode_texts(TEXTS[:2]), texts[:2])
    _assert_close(teacher.encode_images(_pixels(32)), images)
    assert teacher.dim == texts.shape[1] == images.shape[1]
    assert teacher.logit_scale == pytest.approx(model.logit_scale.exp().item())


def test_clip_texts_are_trimmed_and_siglip_texts_have_full_length(root: Path) -> None:
    for kind, length in (("clip", 3), ("siglip", 24)):
        teacher, seen = _load(root / kind), list[int]()
        teacher._model.text_model.encoder.register_forward_hook(
            lambda module, inputs, kwargs, output, seen=seen: seen.append(kwargs["inputs_embeds"].shape[1]),
            with_kwargs=True,
        )
        teacher.encode_texts(["a", "a"])
        assert seen == [length]


def test_an_image_encoder_has_no_encode_texts(root: Path) -> None:
    teacher = _load(root / "dinov2", logit_scale=30.0)
    assert isinstance(teacher, ImageTeacher)
    assert not hasattr(teacher, "encode_texts")
    with torch.no_grad():
        output = Dinov2Model.from_pretrained(root / "dinov2").eval()(_pixels(28)).pooler_output
    _assert_close(teacher.encode_images(_pixels(28)), torch.nn.functional.normalize(output, dim=-1))
    assert (teacher.dim, teacher.image.size, teacher.logit_scale) == (32, 28, 30.0)


def test_a_text_encoder_averages_tokens_and_has_no_encode_images(root: Path) -> None:
    teacher = _load(root / "bert")
    assert isinstance(teacher, TextTeacher)
    assert not hasattr(teacher, "encode_images")
    assert (teacher.dim, teacher.image, teacher.logit_scale) == (32, None, None)
    model, tokenizer = BertModel.from_pretrained(root / "bert").eval(), AutoTokenizer.from_pretrained(root / "bert")
    with torch.no_grad():  # one by one, without padding
        alone = [
            model(**tokenizer(text, truncation=True, max_length=24, return_tensors="pt")).last_hidden_state.mean(dim=1)
            for text in TEXTS
        ]
    _assert_close(teacher.encode_texts(TEXTS), torch.nn.functional.normalize(torch.cat(alone), dim=-1))


def test_a_pooler_without_weights_is_not_used(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "bert", tmp_path / "bert")
    config = BertConfig.from_pretrained(root / "bert")
    tiny_models.seeded(lambda: BertForMaskedLM(config), 0).save_pretrained(tmp_path / "bert")
    first, second = (_load(tmp_path / "bert").encode_texts(TEXTS) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("kind", "text"), [("clip", "a <|endoftext|> b"), ("siglip", "a </S> b"), ("bert", "[SEP]")])
def test_special_tokens_in_texts_are_read_as_plain_text(root: Path, kind: str, text: str) -> None:
    tokens = _load(root / kind)._tokenize([text.lower(), text.upper()], CPU)["input_ids"]
    assert ((tokens == 1).sum(dim=1) == 1).all()
    assert ((tokens == 2).sum(dim=1) == 1).all()


def test_half_precision_checkpoints_compute_in_float32_and_missing_weights_raise(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "clip", tmp_path / "clip")
    CLIPModel.from_pretrained(root / "clip").half().save_pretrained(tmp_path / "clip")
    half = _load(tmp_path / "clip")
    assert {parameter.dtype for parameter in half._model.parameters()} == {torch.float32}
    assert (half.encode_texts(TEXTS) * _load(root / "clip").encode_texts(TEXTS)).sum(dim=-1).min() > 0.999
    state = load_file(tmp_path / "clip" / "model.safetensors")
    del state["text_projection.weight"]
    save_file(state, tmp_path / "clip" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"do not fit CLIPModel: text_projection\.weight"):
        _load(tmp_path / "clip")


def test_models_that_cannot_be_teachers_are_rejected(root: Path, tmp_path: Path) -> None:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaModel(LlamaConfig(vocab_size=300, **tower)).save_pretrained(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(root / "bert")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="has no padding token"):
        _load(tmp_path / "llama")
    small = BertConfig(vocab_size=100, max_position_embeddings=24, **tower)
    BertModel(small).save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(root / "bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="BertModel cannot be a teacher: IndexError"):
        _load(tmp_path / "bert")


PROCESSOR = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25], "resample": 2}


@pytest.mark.parametrize(
    ("config", "size", "resize"),
    [
        ({"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}, 32, "crop"),
        ({"size": 36, "crop_size": {"height": 32, "width": 24}, "do_center_crop": True}, (32, 24), "crop"),
        ({"size": 36, "crop_size": 32, "do_center_crop": True}, 32, "crop"),
        ({"size": {"height": 32, "width": 32}, "crop_size": {"height": 9, "width": 9}}, 32, "squash"),
        ({"size": {"height": 32, "width": 48}}, (32, 48), "squash"),
        ({"size": 32}, 32, "squash"),
    ],
)
def test_both_formats_of_image_processors_are_read(config: dict[str, Any], size: Any, resize: str) -> None:
    spec = image_spec({**PROCESSOR, **config})
    assert (spec.size, spec.resize, spec.interpolation) == (size, resize, "bilinear")
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.25,) * 3)
    plain = image_spec({**PROCESSOR, **config, "do_normalize": False})
    assert (plain.mean, plain.std) == ((0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": {"shortest_edge": 32}}, "no fixed size"),
        ({"size": {"height": 32, "width": 32}, "do_resize": False}, "no fixed size"),
        ({"size": {"height": 32, "width": 32}, "resample": 1}, "filter 1, not by nearest, bilinear or bicubic"),
        ({"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5}, "not scaled by 1/255"),
    ],
)
def test_unsupported_image_processing_is_rejected(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        image_spec({**PROCESSOR, **config})


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "bert"])
def test_a_folder_loads_as_described_wherever_it_is(root: Path, tmp_path: Path, kind: str) -> None:
    spec = teacher_spec(family="transformers", model=str(root / kind))
    info, teacher = describe_model("t", spec), load_model("t", spec, "cpu")
    assert info.dim == teacher.dim
    assert (info.images, info.texts) == (hasattr(teacher, "encode_images"), hasattr(teacher, "encode_texts"))
    shutil.copytree(root / kind, tmp_path / "moved")
    assert describe_model("t", teacher_spec(family="transformers", model=str(tmp_path / "moved"))) == info


def test_content_files_are_weights_and_settings(root: Path, tmp_path: Path) -> None:
    CLIPModel.from_pretrained(root / "clip").save_pretrained(tmp_path / "clip", max_shard_size="100KB")
    (tmp_path / "clip" / "README.md").write_text("about")
    names = [path.name for path in family.content_files(tmp_path / "clip")]
    assert names[0] == "model.safetensors.index.json"
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert "config.json" in names
    assert "README.md" not in names


def test_absent_and_incomplete_folders_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert family.read_config("models/absent") is None, "may be a model of the hub"
    (tmp_path / "models").mkdir()
    assert family.read_config("absent") is None
    for model, message in (
        ("models/absent", "folder models/absent does not exist"),
        ("local-dir:absent", "local-dir:absent"),
        ("/absent/model", "folder /absent/model does not exist"),
        (str(tmp_path), r"config\.json does not exist: use a folder written by save_pretrained"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            family.read_config(model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="has no `model_type`"):
        family.read_config(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no weights: expected model\.safetensors"):
        family.content_files(tmp_path)


_OWN_CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

class Config(PretrainedConfig):
    model_type = "own"
    def __init__(self, hidden_size=6, image_size=8, **keys):
        super().__init__(**keys)
        self.hidden_size, self.image_size = hidden_size, image_size

class Model(PreTrainedModel):
    config_class = Config
    def __init__(self, config):
        super().__init__(config)
        self.net = torch.nn.Linear(3 * config.image_size**2, config.hidden_size)
        self.post_init()
    def forward(self, pixel_values):
        found = self.net(pixel_values.flatten(1))
        return BaseModelOutputWithPooling(last_hidden_state=found[:, None], pooler_output=found)
"""


def test_the_code_of_a_model_runs_only_if_the_config_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    BitImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}).save_pretrained(folder)
    classes = {"AutoConfig": "own_code.Config", "AutoModel": "own_code.Model"}
    config = {"model_type": "own", "auto_map": classes, "hidden_size": 6, "image_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own_code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{_OWN_CODE}")
    net = torch.nn.Linear(3 * 8 * 8, 6)
    save_file({f"net.{name}": value for name, value in net.state_dict().items()}, folder / "model.safetensors")
    spec = {"family": "transformers", "model": str(folder)}
    with pytest.raises(ValueError, match=r"teacher own: .*/own needs code in .* `trust_remote_code: true` to run it"):
        load_model("own", teacher_spec(**spec), "cpu")
    trusting = teacher_spec(**spec, trust_remote_code=True)
    before = describe_model("own", trusting)
    assert (before.dim, before.images, before.texts) == (6, True, False)
    assert not (tmp_path / "ran").exists(), "planning runs nothing of it"
    teacher = load_model("own", trusting, "cpu")
    assert (tmp_path / "ran").exists()
    _assert_close(teacher.encode_images(_pixels(8)), torch.nn.functional.normalize(net(_pixels(8).flatten(1))))
    (folder / "own_code.py").write_text(f"{_OWN_CODE}\n# changed")
    assert describe_model("own", trusting).identity != before.identity
    assert "trust_remote_code" not in describe_model("own", teacher_spec(**spec)).identity
