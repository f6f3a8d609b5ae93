"""Tiny captioners and translators of transformers with seeded weights, saved with their processors and tokenizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from teachers.fit import fit
from teachers.pixels import to_pixels
from teachers.protocols import ImageSpec
from teachers.spec import CaptionerSpec
from teachers.transformers.captioner import TransformersCaptioner
from tests.helpers.models.tiny_models import TOWER, VISION
from tests.helpers.specs import captioner_spec

SIDE = 32
_SQUARE = {"height": SIDE, "width": SIDE}
_TEXT = {**TOWER, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {**_TEXT, "num_key_value_heads": 1}
_GEMMA = {**_LLAMA, "head_dim": 16}
_TEMPLATE = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def _tokenizer(*special: str, **names: str) -> Any:
    """Byte-level BPE: padding is 0, start 1, end 2, then ``special``. ``names`` become attributes of the tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    first = ["<pad>", "<s>", "</s>", *special]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["a photo of a cat and a photo of a dog on the green grass"], trainer)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=list(special),
        model_input_names=["input_ids", "attention_mask"],
        **({"extra_special_tokens": names} if names else {}),
    )


def _save(folder: Path, model: Callable[[], Any], *processors: Any, std: float = 0.3, end: float | None = None) -> str:
    """Save a model whose weights give distributions as peaked as a trained model's.

    ``end`` multiplies the weights of the end token, so that some texts end early.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        captioner = model()
        for parameter in captioner.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=std)
        if end is not None:
            captioner.get_output_embeddings().weight.data[2] *= end
    captioner.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return str(folder)


def _template(image: str) -> str:
    return _TEMPLATE.replace("IMAGE", image)


def blip(folder: Path) -> str:
    """Its vocabulary has two more outputs than the tokenizer has tokens."""
    tokenizer = _tokenizer("[DEC]")
    text = {**_TEXT, "vocab_size": len(tokenizer) + 2, "bos_token_id": 3, "sep_token_id": 2, "encoder_hidden_size": 32}
    config = hf.BlipConfig(text_config={**text, "max_position_embeddings": 64}, vision_config=VISION)
    processor = hf.BlipProcessor(hf.BlipImageProcessor(size=_SQUARE), tokenizer)
    return _save(folder, lambda: hf.BlipForConditionalGeneration(config), processor)


def git(folder: Path) -> str:
    tokenizer = _tokenizer()
    config = hf.GitConfig(
        vision_config=VISION, **{**_TEXT, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    )
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=_SQUARE)
    return _save(folder, lambda: hf.GitForCausalLM(config), hf.GitProcessor(images, tokenizer))


def vision_encoder_decoder(folder: Path) -> str:
    """A ViT and a narrower GPT-2, whose start and end are the same token."""
    tokenizer = _tokenizer()
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    decoder = hf.GPT2Config(vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=2, **size)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**VISION), decoder)
    config.decoder_start_token_id, config.eos_token_id, config.pad_token_id = 2, 2, 0
    images = hf.ViTImageProcessor(size=_SQUARE)
    return _save(folder, lambda: hf.VisionEncoderDecoderModel(config=config), images, tokenizer)


def _llava(folder: Path, names: str, images: Any, template: bool = True, **grid: Any) -> str:
    tokenizer = _tokenizer("<image>")
    config = getattr(hf, f"{names}Config")(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **_LLAMA),
        image_token_index=3,
        vision_feature_layer=-1,
        **grid,
    )
    processor = getattr(hf, f"{names}Processor")(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template("<image>") if template else None,
    )
    return _save(folder, lambda: getattr(hf, f"{names}ForConditionalGeneration")(config), processor)


def llava(folder: Path, template: bool = True) -> str:
    images = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=_SQUARE)
    return _llava(folder, "Llava", images, template)


def llava_next(folder: Path) -> str:
    grid = {"image_grid_pinpoints": [[32, 64], [64, 64]]}
    images = hf.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=_SQUARE, **grid)
    return _llava(folder, "LlavaNext", images, **grid)


def llava_onevision(folder: Path) -> str:
    tokenizer, grid = _tokenizer("<image>", "<video>"), [[32, 32], [64, 64]]
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.Qwen2Config(vocab_size=len(tokenizer), **_LLAMA),
        image_token_index=3,
        video_token_index=4,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=grid,
    )
    processor = hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=_SQUARE, image_grid_pinpoints=grid),
        tokenizer,
        hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_template("<image>"),
    )
    return _save(folder, lambda: hf.LlavaOnevisionForConditionalGeneration(config), processor)


def _qwen(names: str, vision: dict[str, Any], folder: Path, **text: Any) -> str:
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    config = getattr(hf, f"{names}Config")(
        text_config={**_LLAMA, "vocab_size": len(tokenizer), "rope_scaling": rope, **text},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, **vision},
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )
    processor = getattr(hf, f"{names}Processor")(
        hf.Qwen2VLImageProcessor(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=128 * 128),
        tokenizer,
        hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return _save(folder, lambda: getattr(hf, f"{names}ForConditionalGeneration")(config), processor)


def _idefics(names: str, folder: Path) -> str:
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>")
    config = getattr(hf, f"{names}Config")(
        image_token_id=4,
        scale_factor=2,
        pad_token_id=0,
        vision_config=VISION,
        text_config=hf.LlamaConfig(vocab_size=len(tokenizer), **_LLAMA),
    )
    images = getattr(hf, f"{names}ImageProcessor")(
        size={"longest_edge": 4 * SIDE}, max_image_size={"longest_edge": SIDE}
    )
    more = [hf.SmolVLMVideoProcessor()] if names == "SmolVLM" else []
    processor = getattr(hf, f"{names}Processor")(
        images, tokenizer, *more, image_seq_len=4, chat_template=_template("<image>")
    )
    return _save(folder, lambda: getattr(hf, f"{names}ForConditionalGeneration")(config), processor)


def paligemma(folder: Path) -> str:
    """A model without chat template: its prompts are plain text after the image."""
    tokenizer = _tokenizer("<image>")
    images = hf.SiglipImageProcessor(size=_SQUARE)
    images.image_seq_length = 16
    processor = hf.PaliGemmaProcessor(images, tokenizer)  # adds location tokens
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, projection_dim=32),
        text_config=hf.GemmaConfig(vocab_size=len(tokenizer), **_GEMMA),
        image_token_index=3,
        projection_dim=32,
    )
    return _save(folder, lambda: hf.PaliGemmaForConditionalGeneration(config), processor)


def gemma3(folder: Path) -> str:
    tokenizer = _tokenizer(
        "<image_soft_token>", "<start_of_image>", "<end_of_image>",
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>",
    )  # fmt: skip
    config = hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION),
        text_config=hf.Gemma3TextConfig(
            vocab_size=len(tokenizer),
            sliding_window=16,
            layer_types=["full_attention", "sliding_attention"],
            tie_word_embeddings=False,  # a tiny tied model would repeat its last token
            **_GEMMA,
        ),
        image_token_index=3,
        boi_token_index=4,
        eoi_token_index=5,
        mm_tokens_per_image=4,
        tie_word_embeddings=False,
    )
    images = hf.Gemma3ImageProcessor(size=_SQUARE)
    processor = hf.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=_template("<start_of_image>"))
    return _save(folder, lambda: hf.Gemma3ForConditionalGeneration(config), processor)


def internvl(folder: Path) -> str:
    tokenizer = _tokenizer(
        "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = hf.InternVLConfig(
        vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]},
        text_config=hf.Qwen2Config(vocab_size=len(tokenizer), **_LLAMA),
        image_token_id=5,
        downsample_ratio=0.5,
    )
    processor = hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=_SQUARE),
        tokenizer,
        hf.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return _save(folder, lambda: hf.InternVLForConditionalGeneration(config), processor)


IMAGE_TO_TEXT = {"blip": blip, "git": git, "vision-encoder-decoder": vision_encoder_decoder}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
CHAT: dict[str, Callable[[Path], str]] = {
    "gemma3": gemma3,
    "idefics3": partial(_idefics, "Idefics3"),
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "paligemma": paligemma,
    "qwen2_5_vl": partial(_qwen, "Qwen2_5_VL", {**_SIZES, "window_size": 32, "fullatt_block_indexes": [1]}),
    "qwen2_vl": partial(_qwen, "Qwen2VL", {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}),
    "qwen3_vl": partial(
        _qwen, "Qwen3VL", {**_SIZES, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}, head_dim=16
    ),
    "smolvlm": partial(_idefics, "SmolVLM"),
}


def nllb(folder: Path) -> str:
    """An M2M100 with NLLB's tokenizer and three languages."""
    letters = ["<s>", "<pad>", "</s>", "<unk>", *"\u2581abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = hf.NllbTokenizer(vocab=vocabulary, merges=[], additional_special_tokens=[*LANGUAGES])
    config = hf.M2M100Config(
        vocab_size=len(tokenizer), pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2, **_SEQ2SEQ
    )
    return _save(folder, lambda: hf.M2M100ForConditionalGeneration(config), tokenizer, std=0.8, end=3)


def _with_end(*special: str) -> Any:
    """The tokenizer of captioners, which adds the end of a text."""
    tokenizer = _tokenizer(*special)
    end = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = end
    return tokenizer


def marian(folder: Path, *languages: str) -> str:
    """A Marian of one target language, or of several ``languages``. Its own tokenizer needs sentencepiece."""
    tokenizer = _with_end(*(f">>{language}<<" for language in languages))
    config = hf.MarianConfig(
        vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=2, forced_eos_token_id=2, decoder_start_token_id=0,
        share_encoder_decoder_embeddings=False, **_SEQ2SEQ,
    )  # fmt: skip
    return _save(folder, lambda: hf.MarianMTModel(config), tokenizer, std=0.8)


def t5(folder: Path) -> str:
    tokenizer = _with_end()
    config = hf.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, n_positions=POSITIONS,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return _save(folder, lambda: hf.T5ForConditionalGeneration(config), tokenizer, std=0.5, end=2)


LANGUAGES = ("eng_Latn", "deu_Latn", "fra_Latn")
POSITIONS = 40
_SEQ2SEQ = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": POSITIONS,
}  # fmt: skip
TRANSLATORS = {"m2m_100": nllb, "marian": marian, "t5": t5}
PROMPT = "Describe it."
#: Loads the tiny captioner of a kind with options of its spec.
Captioners = Callable[..., TransformersCaptioner]


def spec_of(model: Path | str, kind: str, **options: Any) -> CaptionerSpec:
    chat = {"prompt": PROMPT} if kind in CHAT else {}
    return captioner_spec(family="transformers", model=str(model), **{**chat, **options})


def pictures(count: int, side: int = 40) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def pixels_of(images: list[Image.Image], spec: ImageSpec) -> torch.Tensor:
    """Preprocess images as a run does."""
    return to_pixels(torch.from_numpy(np.stack([fit(image, spec) for image in images])), spec)


def seeds(rows: int, count: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + rows * count, dtype=np.uint64).reshape(rows, count)


def captioned(captioner: TransformersCaptioner, count: int = 6) -> list[list[str]]:
    return captioner.caption(pixels_of(pictures(count), captioner.image), seeds(count, captioner.captions))
