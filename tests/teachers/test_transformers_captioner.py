"""Captioners of transformers compared with its own ``generate``, for every supported model type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file

from teachers.device.accelerator import Accelerator
from teachers.registry import load_captioner
from teachers.transformers import captioner as transformers_captioner
from teachers.transformers import catalog
from teachers.transformers.captioner import load
from teachers.transformers.image_to_text import Git
from tests.helpers import tiny_captioners
from tests.helpers.stand_in_cuda import stand_in_cuda
from tests.helpers.tiny_captioners import PROMPT, Captioners, captioned, pictures, pixels_of, seeds, spec_of

KINDS = [*tiny_captioners.IMAGE_TO_TEXT, *tiny_captioners.CHAT]


@pytest.mark.parametrize("kind", KINDS)
def test_a_caption_depends_only_on_its_image_and_seed(build_captioner: Captioners, kind: str) -> None:
    captioner = build_captioner(kind, captions=3, min_length=0, max_length=9, temperature=2.0)
    pixels, all_seeds = pixels_of(pictures(4), captioner.image), seeds(4, 3)
    together = captioner.caption(pixels, all_seeds)
    assert len({text for row in together for text in row}) > 6, "captions depend on seeds and images"
    assert [captioner.caption(pixels[i : i + 1], all_seeds[i : i + 1])[0] for i in range(4)] == together
    order = [2, 0, 3, 1]
    assert captioner.caption(pixels[order], all_seeds[order]) == [together[i] for i in order]
    assert captioner.caption(pixels, all_seeds[:, ::-1].copy()) == [row[::-1] for row in together]
    for rows in (1, 7):
        captioner._rows = rows
        assert captioner.caption(pixels, all_seeds) == together, "also if fewer rows are decoded in parallel"


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
def test_greedy_captions_match_transformers_generate(
    build_captioner: Captioners, captioner_folder: Callable[[str], Path], kind: str
) -> None:
    size = {"image_size": 64} if kind.startswith("qwen") else {}
    captioner = build_captioner(kind, captions=1, top_p=1e-6, min_length=0, max_length=10, **size)
    images = [image.resize((captioner.image.width, captioner.image.height)) for image in pictures(3)]
    suppressed = captioner._rules.impossible.nonzero().squeeze(1).tolist()
    expected = generated(captioner_folder(kind), kind, images, 8, suppressed)
    assert [row[0] for row in captioner.caption(pixels_of(images, captioner.image), seeds(3, 1))] == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_encoded_once_for_all_its_captions(build_captioner: Captioners, kind: str) -> None:
    captioner = build_captioner(kind, captions=4, max_length=9)
    names = ("vision_model", "vision_tower", "visual", "image_encoder", "encoder")
    tower = next(module for name, module in captioner._model.model.named_modules() if name.split(".")[-1] in names)
    passes: list[int] = []
    tower.register_forward_hook(lambda module, inputs, output: passes.append(1))
    captioned(captioner, 2)
    assert len(passes) == 1


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


@pytest.mark.parametrize("kind", ["blip", "qwen2_5_vl"])
def test_bf16_captions_are_repeatable_and_chat_models_store_bf16_weights(
    build_captioner: Captioners, kind: str
) -> None:
    captioner = build_captioner(kind, captions=2, precision="bf16")
    assert captioned(captioner, 2) == captioned(captioner, 2)
    dtype = next(captioner._model.model.parameters()).dtype
    assert dtype == (torch.bfloat16 if kind in tiny_captioners.CHAT else torch.float32)


def test_rows_decoded_in_parallel_are_limited_by_cache_bytes(
    build_captioner: Captioners, monkeypatch: pytest.MonkeyPatch
) -> None:
    # keys and values of two layers, for the prompt and 30 tokens of the caption
    monkeypatch.setattr(transformers_captioner, "_MAX_CACHE_BYTES", 10 * 2 * 2 * 16 * 4 * 100)
    captioner = build_captioner("llava")
    length = captioner._model._prompt_length  # type: ignore[attr-defined]
    assert captioner._rows == 10 * 100 // (length + 30)


def test_logits_that_differ_from_generate_are_rejected_at_loading(
    captioner_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Git.begin

    def counting_the_image(self: Git, pixels: torch.Tensor) -> Any:
        rows = begin(self, pixels)
        rows.positions = (18, ())
        return rows

    monkeypatch.setattr(Git, "begin", counting_the_image)
    with pytest.raises(ValueError, match=r"GitForCausalLM of transformers \S+ gives other logits .* at token 2\)"):
        load(spec_of(captioner_folder("git"), "git"), Accelerator("cpu"))


def test_nan_logits_are_rejected_at_loading(captioner_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for path in captioner_folder("git").iterdir():
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
def test_captions_do_not_depend_on_the_batch_for_any_strategy(
    build_captioner: Captioners, kind: str, strategy: dict[str, Any]
) -> None:
    captioner = build_captioner(kind, captions=3, min_length=1, max_length=9, repetition_penalty=1.3, **strategy)
    pixels, all_seeds = pixels_of(pictures(3), captioner.image), seeds(3, 3)
    together = captioner.caption(pixels, all_seeds)
    assert [captioner.caption(pixels[i : i + 1], all_seeds[i : i + 1])[0] for i in range(3)] == together
    assert len({tuple(row or []) for row in together}) == 3, "captions depend on images"
    captioner._rows = 5
    assert captioner.caption(pixels, all_seeds) == together


def test_greedy_matches_a_tiny_nucleus(build_captioner: Captioners) -> None:
    greedy = captioned(build_captioner("llava", captions=1, strategy="greedy", max_length=9))
    assert greedy == captioned(build_captioner("llava", captions=1, top_p=1e-9, max_length=9))


def test_missing_weights_are_rejected_by_name(captioner_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for path in captioner_folder("git").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if "visual_projection" in name)
    save_file({key: value for key, value in state.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"captioner mine: the weights of .* do not fit GitForCausalLM: {name}"):
        load_captioner("mine", spec_of(tmp_path, "git"), "cpu")


def test_seeds_of_the_wrong_shape_are_rejected(build_captioner: Captioners) -> None:
    captioner = build_captioner("git")
    with pytest.raises(ValueError, match=r"seeds of shape \(2, 5\)"):
        captioner.caption(pixels_of(pictures(2), captioner.image), seeds(2, 4))


def test_all_supported_model_types_are_tested() -> None:
    assert set(KINDS) == {*catalog.IMAGE_TO_TEXT, *catalog.CHAT_MODELS}


@pytest.mark.parametrize("kind", ["blip", "git"])
def test_captions_on_cuda_are_those_of_the_cpu_with_one_wait_a_word(
    captioner_folder: Callable[[str], Path], kind: str
) -> None:
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
    assert 0 < sum(waits.values()) <= 7 + 1, counts.describe()
    assert all("teachers/decoding/device_sampling" in place for place in waits)
