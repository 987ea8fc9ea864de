"""Compiles what the launchers in `kernels/` launch, for GPUs that need not be there: `cubins.py ARCHITECTURE…`.

Prints one JSON object a line: the kernel, the variant, the architecture, and its resources as `cuobjdump` reads them.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastsds.kernels.add_noise import add_noise, add_noise_backward
from fastsds.kernels.embed_prompts import embed_prompts, embed_prompts_backward
from fastsds.kernels.prefix_attention import prefix_attention, prefix_attention_backward
from fastsds.kernels.sds_loss import sds_loss, sds_loss_backward

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
POINTERS = {F64: "*fp64", F32: "*fp32", F16: "*fp16", BF16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ALIGNED, RAGGED = (4, 64, 64), (3, 33, 31)
DTYPES = ((F32, BF16), (F32, F32), (BF16, BF16), (F16, F16), (F64, F64))  # of latents and prediction
CHANNELS_LAST = ((False, False), (False, True), (True, True))  # latents and prediction
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")
TEXT_WIDTHS, HEAD_WIDTH = (512, 768), 64  # of ViT-B's and ViT-L's text towers
Launch = tuple[JITFunction, dict[str, Any]]
Variants = Iterator[tuple[Callable[..., None], tuple[Any, ...]]]


def tensor(*shape: int, dtype: torch.dtype = F32, channels_last: bool = False) -> Tensor:
    """Not in memory; `shape` ends in channels, height and width where `channels_last`."""
    if not channels_last:
        return torch.empty(shape, dtype=dtype, device="meta")
    *leading, channels, height, width = shape
    return torch.empty((*leading, height, width, channels), dtype=dtype, device="meta").movedim(-1, -3)


def add_noise_variants() -> Variants:
    shapes = [(ALIGNED, False, 4), (ALIGNED, True, 1), (RAGGED, False, 1)]
    for (shape, channels_last, draws), (source, result) in itertools.product(shapes, DTYPES):
        latents = tensor(2, *shape, dtype=source, channels_last=channels_last)
        noised = tensor(2, draws, *shape, dtype=result, channels_last=channels_last)
        coefficient, seed = tensor(2, draws), tensor(dtype=torch.int64)
        yield add_noise, (noised, latents, coefficient, coefficient, seed, result, 0)
        if draws > 1:
            yield add_noise_backward, (latents, noised, coefficient, source)


def sds_loss_variants() -> Variants:
    choices = list(itertools.product(PREDICTION_TYPES, ("forward", "full", "skip"), (False, True)))
    variants = [
        (
            *choice,
            DTYPES[i % 5],
            CHANNELS_LAST[i % 3],
            (1, 4, 16)[i // 2 % 3],
            (ALIGNED, ALIGNED, ALIGNED, RAGGED)[i % 4],
        )
        for i, choice in enumerate(choices)
    ]
    # What takes most registers.
    variants += [("v_prediction", "full", True, dtypes, (False, True), 16, ALIGNED) for dtypes in DTYPES]
    for prediction_type, direction, guided, dtypes, channels_last, draws, shape in variants:
        latents = tensor(2, *shape, dtype=dtypes[0], channels_last=channels_last[0])
        prediction = tensor(2, draws, *shape, dtype=dtypes[1], channels_last=channels_last[1])
        uncond = prediction if guided else None
        coefficient, seed = tensor(2, draws), tensor(dtype=torch.int64)
        loss = tensor(2, draws, dtype=F64 if dtypes[0] == F64 else F32)
        jacobian = "skip" if direction == "skip" else "full"
        arguments = (
            prediction, latents, coefficient, coefficient, coefficient, seed,
            prediction_type, uncond, 2.0 if guided else 1.0, jacobian, 0,
        )  # fmt: skip
        if direction == "forward":
            yield sds_loss, (loss, *arguments)
        else:
            full = direction == "full"
            needs = [full, not full or prediction_type != "epsilon", full and guided]
            yield sds_loss_backward, ((loss, prediction, latents, prediction), loss, *arguments, needs)


def prefix_attention_variants() -> Variants:
    prefix, prompts, tokens = 6, 100, 350
    # The compiler takes a size of 1 for a constant.
    for (dtype, images), ends_only in itertools.product(
        ((F32, 4), (BF16, 4), (F16, 4), (F64, 4), (BF16, 1)), (False, True)
    ):
        heads = TEXT_WIDTHS[0] // HEAD_WIDTH
        head = (heads, HEAD_WIDTH)
        q = tensor(images, prompts if ends_only else tokens, *head, dtype=dtype)
        k, prefix_k = tensor(images, tokens, *head, dtype=dtype), tensor(images, prefix, *head, dtype=dtype)
        log_sums = tensor(images, q.shape[1], heads, dtype=F64 if dtype == F64 else F32)
        read = (q, k, k, prefix_k, prefix_k, tensor(prompts + 1, dtype=torch.int32), 8)
        yield prefix_attention, ((q, log_sums), *read)
        for needs_suffix in (False, True):
            yield prefix_attention_backward, ((q, k, k, prefix_k, prefix_k), q, q, log_sums, *read, needs_suffix)


def embed_prompts_variants() -> Variants:
    images, vectors, tokens = 4, 4, 350
    for width, dtype, with_norm in itertools.product(TEXT_WIDTHS, (F32, BF16, F16, F64), (False, True)):
        table, row = tensor(49408, width, dtype=dtype), tensor(width, dtype=dtype)
        context, attribute = tensor(images, vectors, width, dtype=dtype), tensor(images, width, dtype=dtype)
        ids, result = tensor(tokens, dtype=torch.int64), tensor(images, tokens, width, dtype=dtype)
        norm = (row, row, 1e-5) if with_norm else (None, None, None)
        arguments = (ids, table, context, attribute, tensor(77, width, dtype=dtype), ids, *norm, dtype)
        yield embed_prompts, ((result, result), *arguments)
        needs = [True, True, False, False, False, False]
        gradients = (context, attribute, *[row] * 4)
        yield embed_prompts_backward, (gradients, result, result, result, *arguments, needs)


def record(launcher: Callable[..., None], arguments: tuple[Any, ...]) -> list[Launch]:
    """The kernels that are launched, with their arguments and options by name; none is run."""
    launches = []

    def run(kernel: JITFunction, *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        launches.append((kernel, {**dict(zip(kernel.arg_names, values, strict=False)), **named}))

    original, JITFunction.run = JITFunction.run, run
    try:
        launcher(*arguments)
    finally:
        JITFunction.run = original
    return launches


def compile_for(architecture: int, kernel: JITFunction, values: dict[str, Any]) -> dict[str, int]:
    """Registers, stack, shared and local bytes of the binary that this launch would run, specialised as it would be."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.pop(parameter.name)
        specialised = not parameter.do_not_specialize and isinstance(value, int)
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        scalar = parameter.annotation_type or "i32"
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else scalar
        if isinstance(value, Tensor) or (specialised and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=values).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        dump = [str(CUOBJDUMP), "-res-usage", file.name]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    (resources,) = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    return dict(zip(("registers", "stack", "shared", "local"), map(int, resources), strict=True))


def describe(values: dict[str, Any]) -> str:
    texts = {Tensor: lambda value: str(value.dtype).removeprefix("torch.")}
    shown = {name: texts.get(type(value), str)(value) for name, value in values.items()}
    return " ".join(f"{name}={text}" for name, text in shown.items())


def main() -> None:
    variants = (
        *add_noise_variants(),
        *sds_loss_variants(),
        *prefix_attention_variants(),
        *embed_prompts_variants(),
    )
    for launcher, arguments in variants:
        for kernel, values in record(launcher, arguments):
            for architecture in map(int, sys.argv[1:]):
                resources = compile_for(architecture, kernel, dict(values))
                variant = {"kernel": kernel.__name__, "variant": describe(values), "architecture": architecture}
                print(json.dumps({**variant, **resources}), flush=True)


if __name__ == "__main__":
    main()
