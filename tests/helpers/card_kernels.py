"""Kernels that inductor writes for a card, assembled by triton without a card. Run it by `tests.helpers.card_hooks`.

Models have their real sizes, and fake tensors, which have no memory. torch traces and compiles as on a card, up to the
source of its kernels; triton's compiler and assembler make machine code of it. Nothing runs.

Not found here: kernels of torch itself (products, attention, sorting), which have been compiled already. A torch
without CUDA would divide attention into products, so that its operation for CUDA is named in ``_attention``.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import open_clip
import torch
import torch._dynamo.device_interface as interface
import triton
from torch._functorch import config as functorch_config
from torch._inductor import compile_fx, graph
from torch._inductor import config as inductor_config
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from reinforce.student.model import StudentModel
from reinforce.student.teachers import CAPTION, IMAGE, SYNTHETIC
from teachers.coca.captioner import probe
from teachers.coca.decoder import CocaNetwork
from teachers.coca.fixed_decoder import FixedCocaDecoder
from teachers.decoding.device_sampling import DeviceSampler
from teachers.decoding.sampling import DecodingRules, TokenChooser
from teachers.fast_paths import recompilation, towers
from teachers.fast_paths.recompilation import Compiler, many_shapes
from teachers.open_clip.teacher import image_spec, keep_residual_in_float32
from teachers.runtime.accelerator import Accelerator
from tests.helpers.specs import captioner_spec
from tests.helpers.stand_in_cuda import StandIn, _replacements

DEVICE = "cuda:0"  # with its index, which torch would ask CUDA for
_KERNEL = re.compile(r"async_compile\.triton\('([^']+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
_SHARED = {80: 166_912, 90: 232_448}  # bytes of shared memory that a block can have
_IMAGES = 256


def kernels(path: str, arch: int) -> list[dict[str, Any]]:
    """A row for each kernel of a path and each of its configurations that torch would try: registers, bytes of shared
    memory and bytes of registers that are spilled to memory, or the ``error`` of a kernel that is not compiled."""
    sources: dict[str, str] = {}
    name, run = PATHS[path]
    model: Any = open_clip.create_model(name, pretrained=None, device="meta").float().eval()
    with _card(arch, sources):
        run(model, name)
    rows = []
    for source, name in sources.items():
        try:
            rows += _assemble(name, source, arch)
        except Exception as error:
            rows.append({"kernel": name, "error": f"{type(error).__name__}: {error}"[:500]})
    return rows


def _assemble(name: str, source: str, arch: int) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path, binary = Path(folder, f"{name}.py"), Path(folder, "kernel.cubin")
        path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        for config in tuner.configs:
            meta = tuner._create_compile_meta(config)
            code = ASTSource(tuner.fn, meta["signature"], meta["constants"], meta["configs"][0])
            options = tuner._create_compile_options(config, meta)
            compiled = triton.compile(code, target=GPUTarget("cuda", arch, 32), options=options)
            binary.write_bytes(compiled.asm["cubin"])
            command = [str(_TOOLS / "cuobjdump"), "--dump-resource-usage", str(binary)]
            report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
            yield {
                "kernel": name,
                "config": {**config.kwargs, "warps": config.num_warps},
                "registers": used["REG"],
                "spilled": used["STACK"] + used["LOCAL"],
                "shared": compiled.metadata.shared,
            }


# -- paths


def _teacher(model: Any, name: str) -> None:
    """The blocks of an image tower, in bf16."""
    accelerator = Accelerator(DEVICE, "bf16")
    accelerator.prepare(model)
    keep_residual_in_float32(model)
    with torch.inference_mode():  # there is nothing to compare
        assert towers.hold_in_precision(model, accelerator, list)
        towers.fuse_attention(model, accelerator, list)
    assert towers.compile_blocks(model.visual, Compiler("the image tower", asked=True))
    size = image_spec(open_clip.get_model_preprocess_cfg(model)).height
    with accelerator.forward(), many_shapes():
        model.encode_image(accelerator.layout(torch.zeros(_IMAGES, 3, size, size, device=DEVICE)))


def _decoding(model: Any, name: str) -> None:
    """The steps of a CoCa, with sampling, in bf16."""
    accelerator = Accelerator(DEVICE, "bf16")
    spec = captioner_spec(model=name)
    network = _on_card(CocaNetwork(accelerator.prepare(model), accelerator, spec.max_length - 2, packed=False))
    decoder, compiler = FixedCocaDecoder(network, accelerator, graphs=False), Compiler("the steps", asked=True)
    impossible = torch.zeros(network.vocabulary_size, dtype=torch.bool, device=DEVICE)
    rules = DecodingRules(0, 1, impossible, min_tokens=spec.min_length, max_tokens=spec.max_length - 2)
    with patch.object(torch.Tensor, "argmax", lambda *_: 0):  # the padding token, which is read from the device
        sampler = DeviceSampler(rules, TokenChooser(spec))
    decoder.compile(compiler)
    sampler.advance = compiler.for_any_rows(sampler.advance)
    probe(decoder, sampler)


def _student(model: Any, name: str) -> None:
    """A step of a student in bf16, forward and backward, as ``compute.compile`` compiles it.

    At most two blocks of a stage are kept: further ones have the same shapes, so the same kernels.
    """
    for path, blocks in list(model.named_modules()):
        if path.endswith("blocks"):
            del blocks[2:]
    accelerator = Accelerator(DEVICE, "bf16")
    image = image_spec(open_clip.get_model_preprocess_cfg(model))
    student = _on_card(StudentModel(name, model, open_clip.get_model_config(name), image, ())).train()
    texts = torch.zeros(_IMAGES, model.context_length, dtype=torch.int64, device=DEVICE)
    images = torch.zeros(_IMAGES, image.height, image.width, 3, dtype=torch.uint8, device=DEVICE)
    batch = {IMAGE: images, CAPTION: texts, SYNTHETIC: texts.clone()}
    step = Compiler(name, asked=True).compile(student._call_impl, dynamic=False)
    with functorch_config.patch(force_non_lazy_backward_lowering=True), accelerator.autocast():
        step(batch)


#: The model of each path, and what runs it.
PATHS: dict[str, tuple[str, Callable[[Any, str], None]]] = {
    "blocks of ViT-L-14-quickgelu": ("ViT-L-14-quickgelu", _teacher),
    "blocks of ViT-L-14": ("ViT-L-14", _teacher),
    "steps of coca_ViT-L-14": ("coca_ViT-L-14", _decoding),
    "student ViT-B-16": ("ViT-B-16", _student),
    "student MobileCLIP2-S0": ("MobileCLIP2-S0", _student),
}


def _on_card(module: Any) -> Any:
    """Replace the tensors of a module by those of the card; ``Module.to`` cannot replace fake tensors."""
    for each in module.modules():
        for tensors in (each._parameters, each._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type != "cuda":
                    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                    moved = torch.empty_like(tensor.detach(), device=DEVICE, memory_format=layout)
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    tensors[name] = torch.nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module


# -- the card


@contextmanager
def _card(arch: int, sources: dict[str, str]) -> Iterator[None]:
    """A card of an architecture, for fake tensors. The sources of kernels, with their names, are added to ``sources``;
    kernels of different graphs may have one name."""

    def compile_to_module(lowered: Any) -> Any:
        code = lowered.codegen()[0]
        sources.update((source, name) for name, source in _KERNEL.findall(getattr(code, "value", code)))
        return SimpleNamespace(call=lambda _: None, __file__="none.py", runner=None)

    def backend(traced: Any, inputs: Any) -> Any:
        compile_fx.compile_fx(traced, inputs)
        return traced.forward

    properties = SimpleNamespace(
        name="card", type="cuda", major=arch // 10, minor=arch % 10, total_memory=80 * 2**30, uuid="0", gcnArchName="",
        multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, warp_size=32,
        max_threads_per_block=1024, L2_cache_size=50 * 2**20, shared_memory_per_block=49152,
        shared_memory_per_block_optin=_SHARED[arch],
    )  # fmt: skip
    of_torch = {
        **_replacements(StandIn(80 * 2**30)),
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (properties.major, properties.minor),
    }
    of_dynamo = {
        "get_device_properties": lambda device=None: properties,
        "get_compute_capability": lambda device=None: arch,
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "synchronize": lambda device=None: None,
    }
    cuda = interface.CudaInterface
    replaced: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in of_torch.items()),
        *((cuda, name, staticmethod(value)) for name, value in of_dynamo.items()),
        (cuda.Worker, "get_device_properties", staticmethod(of_dynamo["get_device_properties"])),
        (graph.GraphLowering, "compile_to_module", compile_to_module),
        *((passes, "lazy_init", _on_cpu(passes.lazy_init)) for passes in (joint_graph, post_grad)),
        (recompilation, "inductor", backend),
        (torch.nn.functional, "scaled_dot_product_attention", _attention),
        (torch.Tensor, "pin_memory", lambda tensor, *_: tensor),
        (Accelerator, "place", lambda accelerator, module: _on_card(module)),
    ]
    driver.set_active(SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", arch, 32)))  # type: ignore[arg-type]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(patch.object(owner, name, value))
        stack.enter_context(inductor_config.patch(joint_graph_constant_folding=False, force_disable_caches=True))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def _on_cpu(lazy_init: Callable[..., Any]) -> Callable[..., Any]:
    """Patterns of inductor are traced with tensors that are not fake."""
    return lambda device=None: lazy_init(torch.device("cpu"))


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, **_: Any,
) -> Any:  # fmt: skip
    """The operation that torch chooses on CUDA."""
    aten = torch.ops.aten
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    gradient = torch.is_grad_enabled()
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, gradient, dropout_p, is_causal, scale=scale
    )[0]
