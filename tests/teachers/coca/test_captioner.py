"""CoCa captioners compared with open_clip, and when their compiled steps are used."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from teachers.coca.captioner import CocaCaptioner
from teachers.coca.decoder import CocaDecoder, CocaNetwork, PlainCocaDecoder
from teachers.decoding.decode import decode
from teachers.open_clip.teacher import load_model
from teachers.protocols import Captioner, ImageSpec
from teachers.runtime.accelerator import Accelerator
from tests.helpers.compiled_graphs import captured_graphs
from tests.helpers.models.tiny_captioners import seeds
from tests.helpers.models.tiny_coca import END, IMAGE_SIZE, batch, build, coca_config, coca_model
from tests.helpers.specs import captioner_spec

START = END - 1


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A CoCa whose most probable next token is the start, which no text may contain."""
    folder = tmp_path_factory.mktemp("coca")
    name, path = coca_model(folder), folder / "open_clip_model.safetensors"
    state = load_file(path)
    state["text_decoder.text_projection"][:, START] = 50 * state["text_decoder.ln_final.bias"]
    save_file(state, path)
    return name


def build_captioner(model: str, **options) -> CocaCaptioner:
    precision = options.get("precision", "fp32")
    return CocaCaptioner(captioner_spec(model=model, **options), Accelerator("cpu", precision))


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def decoded(captioner: CocaCaptioner, pixels: torch.Tensor, row_seeds: np.ndarray) -> list[list[int]]:
    """Tokens of each caption."""
    with torch.inference_mode():
        captioner._decoder.begin(captioner._visual(pixels)[1], captioner.captions)
        texts = decode(captioner._decoder, captioner._rules, captioner._spec, row_seeds)
    return [words for of_image in texts for words in of_image or []]


def test_a_captioner_has_the_models_preprocessing_where_the_config_states_none(model):
    captioner: Captioner = build_captioner(model, captions=3)
    assert captioner.captions == 3
    assert captioner.image == ImageSpec(IMAGE_SIZE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", "crop")
    captioner = build_captioner(model, captions=1, preprocess={"mean": [0.1, 0.1, 0.1], "interpolation": "bilinear"})
    assert captioner.image == ImageSpec(IMAGE_SIZE, (0.1, 0.1, 0.1), (0.2, 0.3, 0.4), "bilinear", "crop")


class OtherAttention(torch.nn.Module):
    """An attention of another release: its weights are elsewhere."""

    def __init__(self, attention):
        super().__init__()
        self.inner = attention

    def forward(self, *inputs, **options):
        return self.inner(*inputs, **options)


@pytest.mark.parametrize("strategy", [{"top_p": 0.9}, {"strategy": "top_k", "top_k": 20}])
def test_another_release_of_open_clip_costs_speed_and_not_captions(model, strategy, monkeypatch, caplog):
    options = {"captions": 2, "max_length": 9, **strategy}
    usual = decoded(build_captioner(model, **options), images(3), seeds(3, 2))
    monkeypatch.setattr(open_clip, "__version__", "4.0.0")
    alike = build_captioner(model, **options)
    assert isinstance(alike._decoder, CocaDecoder), "compared, and used"
    assert decoded(alike, images(3), seeds(3, 2)) == usual

    def load(spec):
        coca = load_model(spec)
        for block in (*coca.text.transformer.resblocks, *coca.text_decoder.resblocks, *coca.text_decoder.cross_attn):
            block.attn = OtherAttention(block.attn)
        return coca

    monkeypatch.setattr("teachers.coca.captioner.load_model", load)
    plain = build_captioner(model, **options)
    assert isinstance(plain._decoder, PlainCocaDecoder)
    assert "captions are decoded without a cache, many times as slowly" in caplog.text
    assert decoded(plain, images(3), seeds(3, 2)) == usual
    assert len(plain.caption(images(3), seeds(3, 2))) == 3

    monkeypatch.undo()
    monkeypatch.setattr(open_clip, "__version__", "4.0.0")
    monkeypatch.setattr(CocaNetwork, "_logits", lambda self, x, added: -self.vocabulary(self.final_norm(x + added)))
    assert isinstance(build_captioner(model, **options)._decoder, PlainCocaDecoder)
    assert "logits differ by" in caplog.text


@pytest.mark.parametrize(("shortest", "longest"), [(0, 2), (0, 6), (4, 6), (10, 12)])
def test_lengths_are_within_bounds_and_captions_have_no_special_tokens(model, shortest, longest):
    captioner = build_captioner(model, captions=8, min_length=shortest, max_length=longest, temperature=3.0, top_p=1.0)
    rows = decoded(captioner, images(8), seeds(8, 8))
    assert all(shortest <= len(tokens) <= longest - 2 for tokens in rows)
    assert not {START, END} & {token for tokens in rows for token in tokens}


def test_captions_are_decoded_and_stripped_text(model):
    captioner = build_captioner(model, captions=4)
    tokenizer = open_clip.SimpleTokenizer()
    rows = decoded(captioner, images(6), seeds(6, 4))
    assert len({len(tokens) for tokens in rows}) > 3  # rows end at different steps
    expected = [tokenizer.decode(tokens).strip() for tokens in rows]
    captions = captioner.caption(images(6), seeds(6, 4))
    assert [text for row in captions for text in row] == expected
    assert all(text == text.strip() and "_of_text>" not in text for text in expected)


def test_a_hugging_face_tokenizer_is_supported(tmp_path):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "dog": 5, "Grass": 6, "on": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $0 </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.save_pretrained(tmp_path)
    # two more outputs than the tokenizer has tokens
    name = coca_model(tmp_path, vocab_size=10, hf_tokenizer_name="words")
    captions = build_captioner(name, captions=6, top_p=1.0, temperature=50.0).caption(images(6), seeds(6, 6))
    found = {word for row in captions for text in row for word in text.split()}
    assert found == {"cat", "dog", "Grass", "on"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["model_cfg"].pop("multimodal_cfg"), "is not a CoCa"),
        (lambda config: config["model_cfg"]["text_cfg"].update(no_causal_mask=True), "not causal"),
    ],
)
def test_a_model_that_cannot_caption_is_rejected_by_name(tmp_path, change, message):
    name = coca_model(tmp_path)
    config = coca_config()
    change(config)
    Path(tmp_path, "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as refusal:
        build_captioner(name)
    assert name in str(refusal.value)


def test_captions_can_fill_the_context_and_longer_ones_are_rejected(model):
    with pytest.raises(ValueError, match=r"max_length 78 exceeds the 77 tokens .* can write"):
        build_captioner(model, max_length=78)
    long = build_captioner(model, captions=1, min_length=75, max_length=77)
    assert [len(tokens) for tokens in decoded(long, images(1), seeds(1, 1))] == [75]


@pytest.fixture
def deterministic(request: pytest.FixtureRequest) -> Iterator[None]:
    """The flag that workers with a GPU set, and that decoding lifts."""
    torch.use_deterministic_algorithms(request.param, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("precision", "deterministic"), [("fp32", False), ("bf16", True)], indirect=["deterministic"])
def test_a_compiled_captioner_has_the_same_captions_and_graphs_for_batches_that_grow_and_shrink(precision):
    on_cpu = build("cpu", precision=precision)
    with captured_graphs() as graphs, torch._dynamo.config.patch(recompile_limit=1):  # 8 by default
        compiled = build("cpu", precision=precision, compile=True)
        loaded = len(graphs.captured)
        pixels, seeds = batch(on_cpu, 8)
        wanted = on_cpu.caption(pixels, seeds)
        for count in (1, 8, 1, 8):
            found = compiled.caption(pixels[:count], seeds[:count])
            assert precision == "bf16" or found == wanted[:count], "in bf16 rounding may choose other words"
        assert torch._dynamo.config.recompile_limit == 1
    parts = "of the image tower, two kinds of blocks, the masks, the newest tokens, the logits and the choice"
    assert len(graphs.captured) == loaded <= 9, parts
