"""Captioners of transformers compared with its own ``generate``, for every supported model type."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from teachers.protocols import ImageSpec
from teachers.registry import load_model
from teachers.runtime.accelerator import Accelerator
from teachers.transformers import captioner as transformers_captioner
from teachers.transformers import family
from teachers.transformers.captioner import ImageToText, chat_image_spec, end_tokens_of, load, merge_end_tokens
from tests.helpers.models import tiny_captioners
from tests.helpers.models.tiny_captioners import PROMPT, Captioners, captioned, pictures, pixels_of, seeds, spec_of
from tests.helpers.stand_in_cuda import stand_in_cuda

Folder = Callable[[str], Path]

KINDS = [*tiny_captioners.IMAGE_TO_TEXT, *tiny_captioners.CHAT]


def generated(folder: Path, kind: str, pictures: list[Image.Image], words: int, suppressed: list[int]) -> list[str]:
    """Greedy captions by transformers' own processor and ``generate``."""
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
        if kind in tiny_captioners.IMAGE_TO_TEXT:
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
def test_greedy_captions_match_generate(build_captioner: Captioners, captioner_folder: Folder, kind: str) -> None:
    size = {"image_size": 64} if kind.startswith("qwen") else {}
    captioner = build_captioner(kind, captions=1, top_p=1e-6, min_length=0, max_length=10, **size)
    images = [image.resize((captioner.image.width, captioner.image.height)) for image in pictures(3)]
    suppressed = captioner._rules.impossible.nonzero().squeeze(1).tolist()
    expected = generated(captioner_folder(kind), kind, images, 8, suppressed)
    assert [row[0] for row in captioner.caption(pixels_of(images, captioner.image), seeds(3, 1))] == expected
    assert len(set(expected)) > 1
    if kind in tiny_captioners.IMAGE_TO_TEXT:
        starts = {"blip": 3, "git": 1, "vision-encoder-decoder": 2}
        model = captioner._model
        assert (model.start, model.ends, model.max_length) == (starts[kind], (2,), 64)


@pytest.mark.parametrize("kind", ["blip", "git", "vision-encoder-decoder", "qwen2_vl", "paligemma"])
@pytest.mark.parametrize(("shortest", "longest"), [(0, 2), (0, 6), (4, 6), (12, 14)])
def test_lengths_are_within_bounds_and_captions_have_no_special_tokens(
    build_captioner: Captioners, kind: str, shortest: int, longest: int
) -> None:
    captioner = build_captioner(kind, captions=6, min_length=shortest, max_length=longest, temperature=4.0, top_p=1.0)
    words: list[list[int]] = []
    captioner._text = lambda tokens: words.append(tokens) or ""  # type: ignore[method-assign, func-returns-value]
    captioned(captioner, 6)
    assert all(shortest <= len(row) <= longest - 2 for row in words)
    assert len({len(row) for row in words}) > 1 or longest - 2 == shortest or longest == 2
    tokenizer = captioner._tokenizer
    assert not {token for row in words for token in row} & {*tokenizer.all_special_ids, *captioner._model.ends}
    assert all(token < len(tokenizer) for row in words for token in row)
    assert not any("<" in tokenizer.convert_ids_to_tokens(token)[:-1] for row in words for token in row)


def test_rows_in_parallel_are_limited_by_bytes(build_captioner: Captioners, monkeypatch: pytest.MonkeyPatch) -> None:
    # keys and values of two layers, for the prompt and 30 tokens of the caption
    monkeypatch.setattr(transformers_captioner, "_MAX_CACHE_BYTES", 10 * 2 * 2 * 16 * 4 * 100)
    captioner = build_captioner("llava")
    length = captioner._model._prompt_length  # type: ignore[attr-defined]
    assert captioner._rows == 10 * 100 // (length + 30)


def test_logits_other_than_generates_are_rejected(captioner_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = ImageToText.begin

    def counting_the_image(self: ImageToText, pixels: torch.Tensor) -> Any:
        rows = begin(self, pixels)
        rows.positions = (18, ())
        return rows

    monkeypatch.setattr(ImageToText, "begin", counting_the_image)
    with pytest.raises(ValueError, match=r"GitForCausalLM of transformers \S+ gives other logits .* at token 2\)"):
        load(spec_of(captioner_folder("git"), "git"), Accelerator("cpu"))


def test_nan_logits_and_missing_weights_are_rejected_at_loading(captioner_folder: Folder, tmp_path: Path) -> None:
    for path in captioner_folder("git").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    state["output.bias"][7] = torch.nan
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="captioner mine: logits are not finite: check the weights"):
        load_model("mine", spec_of(tmp_path, "git"), "cpu")
    name = next(name for name in state if "visual_projection" in name)
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"captioner mine: the weights of .* do not fit GitForCausalLM: {name}"):
        load_model("mine", spec_of(tmp_path, "git"), "cpu")


def test_all_supported_model_types_are_tested() -> None:
    assert set(KINDS) == {*family.IMAGE_TO_TEXT, *family.CHAT_MODELS}


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_captions_on_cuda_are_those_of_the_cpu_with_one_wait_a_word(captioner_folder: Folder, kind: str) -> None:
    spec = spec_of(captioner_folder(kind), kind, captions=3, min_length=1, max_length=9, top_p=0.99)
    on_cpu = load(spec, Accelerator("cpu"))
    pixels, all_seeds = pixels_of(pictures(4), on_cpu.image), seeds(4, 3)
    wanted = on_cpu.caption(pixels, all_seeds)
    with stand_in_cuda() as cuda:
        accelerator = Accelerator("cuda")
        captioner = load(spec, accelerator)
        on_device = accelerator.put(pixels)
        with cuda.counted() as counts:
            assert captioner.caption(on_device, all_seeds) == wanted
    # transformers' own forward passes may wait, too
    waits = {place: count for place, count in counts.waits.items() if "teachers/decoding/" in place}
    assert 0 < sum(waits.values()) <= 7 + 1, counts
    assert all("teachers/decoding/device_sampling" in place for place in waits)


def test_a_prompt_is_formatted_by_the_chat_template_unless_it_contains_the_image_token_and_limits_the_length(
    build_captioner: Captioners, tmp_path: Path
) -> None:
    def asked(**options: Any) -> str:
        model: Any = build_captioner("llava", **options)._model
        room = 256 - model._prompt_length
        build_captioner("llava", max_length=room, **options)
        with pytest.raises(ValueError, match=f"max_length {room + 1} exceeds the {room} tokens that"):
            build_captioner("llava", max_length=room + 1, **options)
        text: str = model.tokenizer.decode(model._prompt["input_ids"][0])
        return text.replace("<image>" * 16, "IMAGE").replace("<s>", "")

    assert asked() == "USER: IMAGE\nDescribe it. ASSISTANT:"
    assert asked(prompt="Look: <image> It shows") == "Look: IMAGE It shows"
    name = tiny_captioners.llava(tmp_path / "llava", template=False)
    with pytest.raises(ValueError, match="no chat template: write the whole `prompt`, with <image> in place"):
        load(spec_of(name, "llava"), Accelerator("cpu"))
    load(spec_of(name, "llava", prompt="<image> It shows"), Accelerator("cpu"))


def test_a_larger_image_size_gives_more_image_tokens_or_is_refused(build_captioner: Captioners) -> None:
    def tokens(kind: str, **options: Any) -> tuple[int, int]:
        captioner: Any = build_captioner(kind, captions=1, max_length=9, **options)
        assert captioned(captioner, 2)[0][0]
        return captioner.image.height, captioner._model._prompt_length

    for kind, side in (("idefics3", 64), ("qwen2_vl", 96), ("llava_next", 64)):
        usual = tokens(kind, **({"image_size": 48} if kind == "qwen2_vl" else {}))
        larger = tokens(kind, image_size=side)
        assert larger[0] == side
        assert larger[1] > usual[1]
    for kind, side, message in (
        ("llava", 64, "image_size 64 is not used: the model's images are 32 x 32 pixels; remove it"),
        ("qwen2_vl", 50, "image_size 50 must be a multiple of 16"),
    ):
        with pytest.raises(ValueError, match=message):
            build_captioner(kind, image_size=side)


def test_images_are_squares_of_the_processors_size_or_a_default_size() -> None:
    qwen = hf.Qwen2VLImageProcessor().to_dict()
    assert chat_image_spec(qwen, None) == (ImageSpec(448, (0.0,) * 3, (1.0,) * 3, resize="squash"), {})  # type: ignore[arg-type]
    tiles = chat_image_spec(hf.Idefics3ImageProcessor().to_dict(), None)
    assert (tiles[0].size, tiles[1]) == (364, {"size": {"longest_edge": 364}, "do_image_splitting": False})
    llava = chat_image_spec(hf.CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336).to_dict(), None)[0]
    assert (llava.size, llava.resize, llava.interpolation) == (336, "crop", "bicubic")


def test_each_of_several_end_tokens_ends_a_caption(build_captioner: Captioners, captioner_folder: Folder) -> None:
    captioner = build_captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
    lengths = [len(text) for row in captioned(captioner) for text in row]
    config = json.loads((captioner_folder("llava") / "generation_config.json").read_text())
    try:
        more = {**config, "eos_token_id": [2, *range(100, 250)], "do_sample": True, "temperature": 0.3}
        (captioner_folder("llava") / "generation_config.json").write_text(json.dumps(more))
        with_more = build_captioner("llava", captions=8, min_length=0, max_length=40, temperature=3.0)
        assert with_more._model.ends[:2] == (2, 100)
        shorter = [len(text) for row in captioned(with_more) for text in row]
    finally:
        (captioner_folder("llava") / "generation_config.json").write_text(json.dumps(config))
    assert sum(shorter) < sum(lengths) / 2


def test_end_tokens_come_from_the_first_config_that_has_any() -> None:
    first, second, none = SimpleNamespace(eos_token_id=None), SimpleNamespace(eos_token_id=[3, 4]), SimpleNamespace()
    assert end_tokens_of(first, second) == (3, 4)
    assert end_tokens_of(SimpleNamespace(eos_token_id=0), second) == (0,)
    with pytest.raises(ValueError, match="config has no eos_token_id: it cannot caption"):
        end_tokens_of(first, none)


def test_merged_end_tokens_have_their_total_probability() -> None:
    logits = torch.tensor([[0.5, 1.0, -2.0, 3.0]])
    probabilities = logits.softmax(-1)[0]
    merged = merge_end_tokens(logits.clone(), (1, 3))[0]
    share = merged[[0, 1, 2]].softmax(-1)  # token 3 is counted in token 1
    torch.testing.assert_close(share, torch.stack([probabilities[0], probabilities[[1, 3]].sum(), probabilities[2]]))
    assert torch.equal(merge_end_tokens(logits, (2,)), logits)
