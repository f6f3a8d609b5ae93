"""Captioners of transformers against transformers' own `generate`, for every kind of model that is supported."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from teachers import transformers_captioner
from teachers import transformers_catalog as catalog
from teachers.chat_captioner import chat_image_spec
from teachers.device import Accelerator
from teachers.image_to_text import Git
from teachers.pixels import fit, to_pixels
from teachers.protocols import ImageSpec
from teachers.registry import describe_captioner, load_captioner
from teachers.spec import CaptionerSpec
from teachers.transformers_captioner import TransformersCaptioner, load
from tests.helpers import tiny_captioners, tiny_models

KINDS = [*tiny_captioners.PLAIN, *tiny_captioners.CHAT]
PROMPT = "Describe it."
Captioners = Callable[..., TransformersCaptioner]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a kind's tiny model, made once."""
    root = tmp_path_factory.mktemp("captioners")

    def made(kind: str) -> Path:
        if not (root / kind).exists():
            {**tiny_captioners.PLAIN, **tiny_captioners.CHAT}[kind](root / kind)
        return root / kind

    return made


def spec_of(model: Path | str, kind: str, **options: Any) -> CaptionerSpec:
    chat = {"prompt": PROMPT} if kind in tiny_captioners.CHAT else {}
    return CaptionerSpec(family="transformers", model=str(model), **{**chat, **options})


@pytest.fixture
def captioner(folder: Callable[[str], Path]) -> Captioners:
    def made(kind: str, **options: Any) -> TransformersCaptioner:
        found = load(spec_of(folder(kind), kind, **options), Accelerator("cpu", options.get("precision", "fp32")))
        assert isinstance(found, TransformersCaptioner)
        return found

    return made


def pictures(count: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def pixels_of(images: list[Image.Image], spec: ImageSpec) -> torch.Tensor:
    """As the pipeline makes them."""
    return to_pixels(torch.from_numpy(np.stack([fit(image, spec) for image in images])), spec)


def seeds(rows: int, count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + rows * count, dtype=np.uint64).reshape(rows, count)


def captioned(made: TransformersCaptioner, count: int = 6) -> list[list[str]]:
    return made.caption(pixels_of(pictures(count), made.image), seeds(count, made.captions))


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_depends_on_its_image_and_seed_alone(captioner: Captioners, kind: str) -> None:
    made = captioner(kind, captions=3, min_length=0, max_length=9, temperature=2.0)
    pixels, all_seeds = pixels_of(pictures(4), made.image), seeds(4, 3)
    together = made.caption(pixels, all_seeds)
    assert len({text for row in together for text in row}) > 6, "seeds and images do matter"
    assert [made.caption(pixels[i : i + 1], all_seeds[i : i + 1])[0] for i in range(4)] == together
    order = [2, 0, 3, 1]
    assert made.caption(pixels[order], all_seeds[order]) == [together[i] for i in order]
    assert made.caption(pixels, all_seeds[:, ::-1].copy()) == [row[::-1] for row in together]
    for rows in (1, 7):
        made._rows = rows
        assert made.caption(pixels, all_seeds) == together, "also when fewer rows fit side by side"


def generated(folder: Path, kind: str, pictures: list[Image.Image], words: int, suppressed: list[int]) -> list[str]:
    """The greedy captions of transformers' own pipeline, from pictures to texts."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": words, "suppress_tokens": suppressed}
    if kind == "vision-encoder-decoder":
        tokenizer: Any = hf.AutoTokenizer.from_pretrained(folder)
        inputs = hf.AutoImageProcessor.from_pretrained(folder)(images=pictures, return_tensors="pt")
    else:
        processor = hf.AutoProcessor.from_pretrained(folder)
        tokenizer, images = processor.tokenizer, processor.image_processor
        one_tile = {"do_image_splitting": False, "size": {"longest_edge": tiny_captioners.SIDE}}
        resize = one_tile if kind in ("idefics3", "smolvlm") else {}
        if kind in tiny_captioners.PLAIN:
            inputs = images(images=pictures, return_tensors="pt")
        else:
            message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}
            text = "<image>" + PROMPT
            if kind != "paligemma":
                text = processor.apply_chat_template([message], add_generation_prompt=True)
            many = {"images": [[picture] for picture in pictures], "text": [text] * len(pictures)}
            inputs = processor(**many, return_tensors="pt", **resize)
            inputs.pop("labels", None)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else 1
    with torch.no_grad():
        tokens = model.generate(**inputs, **options)[:, prompt:]
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_probable_caption_is_that_of_transformers_own_pipeline(
    captioner: Captioners, folder: Callable[[str], Path], kind: str
) -> None:
    size = {"image_size": 64} if kind.startswith("qwen") else {}
    made = captioner(kind, captions=1, top_p=1e-6, min_length=0, max_length=10, **size)
    images = [image.resize((made.image.width, made.image.height)) for image in pictures(3)]
    suppressed = made._rules.impossible.nonzero().squeeze(1).tolist()
    expected = generated(folder(kind), kind, images, 8, suppressed)
    assert [row[0] for row in made.caption(pixels_of(images, made.image), seeds(3, 1))] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_goes_through_the_model_once_for_all_its_captions(captioner: Captioners, kind: str) -> None:
    made = captioner(kind, captions=4, max_length=9)
    names = ("vision_model", "vision_tower", "visual", "image_encoder", "encoder")
    tower = next(module for name, module in made._model.model.named_modules() if name.split(".")[-1] in names)
    passes: list[int] = []
    tower.register_forward_hook(lambda module, inputs, output: passes.append(1))
    captioned(made, 2)
    assert len(passes) == 1


@pytest.mark.parametrize("kind", ["blip", "git", "vision-encoder-decoder", "qwen2_vl", "paligemma"])
@pytest.mark.parametrize(("shortest", "longest"), [(0, 2), (0, 6), (4, 6), (12, 14)])
def test_lengths_keep_their_bounds_and_no_special_token_is_among_the_words(
    captioner: Captioners, kind: str, shortest: int, longest: int
) -> None:
    made = captioner(kind, captions=6, min_length=shortest, max_length=longest, temperature=4.0, top_p=1.0)
    words: list[list[int]] = []
    made._text = lambda tokens: words.append(tokens) or ""  # type: ignore[method-assign, func-returns-value]
    captioned(made, 6)
    assert all(shortest <= len(row) <= longest - 2 for row in words)
    assert len({len(row) for row in words}) > 1 or longest - 2 == shortest or longest == 2
    tokenizer = made._tokenizer
    assert not {token for row in words for token in row} & {*tokenizer.all_special_ids, *made._model.ends}
    assert all(token < len(tokenizer) for row in words for token in row)
    assert not any("<" in tokenizer.convert_ids_to_tokens(token)[:-1] for row in words for token in row)


def test_any_of_several_end_tokens_ends_a_caption(captioner: Captioners, folder: Callable[[str], Path]) -> None:
    made = captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
    lengths = [len(text) for row in captioned(made) for text in row]
    config = json.loads((folder("llava") / "generation_config.json").read_text())
    try:
        more = {**config, "eos_token_id": [2, *range(100, 250)], "do_sample": True, "temperature": 0.3}
        (folder("llava") / "generation_config.json").write_text(json.dumps(more))
        with_more = captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
        assert with_more._model.ends[:2] == (2, 100)
        shorter = [len(text) for row in captioned(with_more) for text in row]
    finally:
        (folder("llava") / "generation_config.json").write_text(json.dumps(config))
    assert sum(shorter) < sum(lengths) / 2


@pytest.mark.parametrize("kind", ["blip", "qwen2_5_vl"])
def test_bf16_captions_are_repeatable_and_chat_models_hold_their_weights_in_it(
    captioner: Captioners, kind: str
) -> None:
    made = captioner(kind, captions=2, precision="bf16")
    assert captioned(made, 2) == captioned(made, 2)
    dtype = next(made._model.model.parameters()).dtype
    assert dtype == (torch.bfloat16 if kind in tiny_captioners.CHAT else torch.float32)


def test_what_a_batch_holds_side_by_side_is_bounded_by_the_caches_bytes(
    captioner: Captioners, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two layers of keys and values of 32 numbers for 44 tokens of prompt and 30 of caption.
    monkeypatch.setattr(transformers_captioner, "_MAX_CACHE_BYTES", 10 * 2 * 2 * 16 * 4 * 100)
    made = captioner("llava")
    length = made._model._prompt_length  # type: ignore[attr-defined]
    assert made._rows == 10 * 100 // (length + 30)


def test_logits_that_are_not_those_of_generate_are_refused_at_loading(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Git.begin

    def counting_the_image(self: Git, pixels: torch.Tensor) -> Any:
        rows = begin(self, pixels)
        rows.positions = (18, ())
        return rows

    monkeypatch.setattr(Git, "begin", counting_the_image)
    with pytest.raises(ValueError, match=r"GitForCausalLM of transformers \S+ gives other logits .* at token 2\)"):
        load(spec_of(folder("git"), "git"), Accelerator("cpu"))


def test_weights_that_give_nan_are_refused_at_loading(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for path in folder("git").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["output.bias"][7] = torch.nan
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="captioner mine: logits are not finite: check the weights"):
        load_captioner("mine", spec_of(tmp_path, "git"), "cpu")


@pytest.mark.parametrize("kind", ["blip", "git", "qwen2_vl"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"strategy": "top_k", "top_k": 5},
        {"strategy": "beams", "beams": 4},
        {"strategy": "diverse_beams", "beams": 4, "groups": 2, "length_penalty": 0.5},
    ],
)
def test_every_strategy_gives_an_image_alone_what_it_gives_it_in_a_batch(
    captioner: Captioners, kind: str, strategy: dict[str, Any]
) -> None:
    made = captioner(kind, captions=3, min_length=1, max_length=9, repetition_penalty=1.3, **strategy)
    pixels, all_seeds = pixels_of(pictures(3), made.image), seeds(3, 3)
    together = made.caption(pixels, all_seeds)
    assert [made.caption(pixels[i : i + 1], all_seeds[i : i + 1])[0] for i in range(3)] == together
    assert len({tuple(row or []) for row in together}) == 3, "images do matter"
    made._rows = 5
    assert made.caption(pixels, all_seeds) == together


def test_greedy_captions_are_those_of_the_smallest_nucleus(captioner: Captioners) -> None:
    greedy = captioned(captioner("llava", captions=1, strategy="greedy", max_length=9))
    assert greedy == captioned(captioner("llava", captions=1, top_p=1e-9, max_length=9))


def test_a_prompt_is_framed_by_the_models_template_unless_it_holds_the_image_itself(captioner: Captioners) -> None:
    def asked(**options: Any) -> str:
        made: Any = captioner("llava", **options)
        text: str = made._tokenizer.decode(made._model._prompt["input_ids"][0])
        return text.replace("<image>" * 16, "IMAGE").replace("<s>", "")

    assert asked() == "USER: IMAGE\nDescribe it. ASSISTANT:"
    assert asked(prompt="Look: <image> It shows") == "Look: IMAGE It shows"


def test_a_chat_model_without_a_template_must_be_given_the_whole_prompt(tmp_path: Path) -> None:
    name = tiny_captioners.llava(tmp_path / "llava", template=False)
    with pytest.raises(ValueError, match="no chat template: write the whole `prompt`, with <image> in place"):
        load(spec_of(name, "llava"), Accelerator("cpu"))
    load(spec_of(name, "llava", prompt="<image> It shows"), Accelerator("cpu"))


def test_a_larger_image_is_more_tiles_or_tokens_where_the_model_can(captioner: Captioners) -> None:
    def tokens(kind: str, **options: Any) -> tuple[int, int]:
        made: Any = captioner(kind, captions=1, max_length=9, **options)
        assert captioned(made, 2)[0][0]
        return made.image.height, made._model._prompt_length

    for kind, side in (("idefics3", 64), ("qwen2_vl", 96), ("llava_next", 64)):
        usual = tokens(kind, **({"image_size": 48} if kind == "qwen2_vl" else {}))
        larger = tokens(kind, image_size=side)
        assert larger[0] == side
        assert larger[1] > usual[1]


@pytest.mark.parametrize(
    ("kind", "side", "message"),
    [
        ("llava", 64, "image_size 64 is not used: the model's images are 32 x 32 pixels; remove it"),
        ("qwen2_vl", 50, "image_size 50 must be a multiple of 16"),
    ],
)
def test_an_image_size_that_a_model_cannot_have_is_refused(
    captioner: Captioners, kind: str, side: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        captioner(kind, image_size=side)


def test_images_are_squares_of_the_processors_own_size_or_of_a_common_one() -> None:
    qwen = hf.Qwen2VLImageProcessor().to_dict()
    assert chat_image_spec(qwen, None) == (ImageSpec(448, (0.0,) * 3, (1.0,) * 3, resize="squash"), {})  # type: ignore[arg-type]
    tiles = chat_image_spec(hf.Idefics3ImageProcessor().to_dict(), None)
    assert (tiles[0].size, tiles[1]) == (364, {"size": {"longest_edge": 364}, "do_image_splitting": False})
    llava = chat_image_spec(hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).to_dict(), None)[0]
    assert (llava.size, llava.resize, llava.interpolation) == (336, "crop", "bicubic")


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            "llava",
            {"prompt": None},
            r"type 'llava' needs a prompt, such as prompt: \"Describe the image in one sentence\.\"",
        ),
        ("blip", {"prompt": "a photo of"}, "`prompt` is not used by a model of type 'blip': remove it"),
        ("git", {"image_size": 64}, "`image_size` is not used by a model of type 'git'"),
        ("git", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("vision-encoder-decoder", {"max_length": 65}, "max_length 65 exceeds the model's context of 64 tokens"),
        ("qwen2_vl", {"max_length": 257}, "max_length 257 exceeds the model's context of 256 tokens"),
        ("blip", {"pretrained": "x"}, "`pretrained` is not used with family transformers"),
    ],
)
def test_what_a_model_cannot_do_is_told_while_planning(
    folder: Callable[[str], Path], kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"captioner mine: .*{message}"):
        describe_captioner("mine", spec_of(folder(kind), kind, **options))


def test_a_model_that_does_not_caption_is_told_while_planning(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    name = tiny_models.transformers_siglip(tmp_path / "siglip")
    with pytest.raises(
        ValueError, match=r"captioner mine: .* type 'siglip' is not a supported captioner: use blip, git"
    ):
        describe_captioner("mine", spec_of(name, "siglip"))
    config = json.loads((folder("blip") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BlipForQuestionAnswering"]}))
    with pytest.raises(ValueError, match="BlipForQuestionAnswering does not write captions"):
        describe_captioner("mine", spec_of(tmp_path, "blip"))
    with pytest.raises(FileNotFoundError, match="captioner mine: folder /absent/it does not exist"):
        describe_captioner("mine", spec_of("/absent/it", "blip"))


def test_planning_a_captioner_loads_neither_torch_nor_transformers(folder: Callable[[str], Path]) -> None:
    code = f"""
import sys
from teachers.registry import describe_captioner
from teachers.spec import CaptionerSpec
describe_captioner("a", CaptionerSpec(family="transformers", model={str(folder("git"))!r}))
describe_captioner("b", CaptionerSpec(family="transformers", model="Salesforce/blip-image-captioning-base"))
print(sorted({{"torch", "transformers"}} & set(sys.modules)))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_identity_holds_the_files_the_prompt_and_the_sampling(folder: Callable[[str], Path]) -> None:
    plain = describe_captioner("c", spec_of(folder("qwen2_vl"), "qwen2_vl"))
    assert (plain.dim, plain.images, plain.texts) == (None, True, False)
    files = {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"}
    assert files <= plain.identity["files"].keys()
    for change in ({"prompt": "What is it?"}, {"image_size": 64}, {"top_p": 0.5}, {"captions": 2}):
        assert describe_captioner("c", spec_of(folder("qwen2_vl"), "qwen2_vl", **change)).identity != plain.identity
    hub = describe_captioner("c", CaptionerSpec(family="transformers", model="Salesforce/blip-image-captioning-base"))
    assert hub.identity["model"] == "Salesforce/blip-image-captioning-base"


def test_a_caption_cannot_be_longer_than_what_the_prompt_leaves(captioner: Captioners) -> None:
    made: Any = captioner("llava")
    room = 256 - made._model._prompt_length
    captioner("llava", max_length=room)
    with pytest.raises(ValueError, match=f"max_length {room + 1} exceeds the {room} tokens that"):
        captioner("llava", max_length=room + 1)


def test_weights_that_do_not_fill_the_model_are_refused_by_name(folder: Callable[[str], Path], tmp_path: Path) -> None:
    for path in folder("git").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "visual_projection" in name)
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"captioner mine: the weights of .* do not fit GitForCausalLM: {name}"):
        load_captioner("mine", spec_of(tmp_path, "git"), "cpu")


def test_seeds_of_the_wrong_shape_are_refused(captioner: Captioners) -> None:
    made = captioner("git")
    with pytest.raises(ValueError, match=r"seeds of shape \(2, 5\)"):
        made.caption(pixels_of(pictures(2), made.image), seeds(2, 4))


def test_every_supported_kind_is_tried_here() -> None:
    assert set(KINDS) == {*catalog.IMAGE_TO_TEXT, *catalog.CHAT_MODELS}
