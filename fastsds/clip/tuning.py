"""Which of CLIP's parameters are tuned."""

from __future__ import annotations

import re

from torch import nn

LAYERNORM, PROJECTOR, ALL = "layernorm", "projector", "all"


def select_parameters(model: nn.Module, tune: str) -> dict[str, nn.Parameter]:
    """The parameters of `model` that `tune` names, by their full names.

    Args:
        tune: `layernorm`, the scales and shifts of every LayerNorm (the paper's, *stated*: 65,536 numbers for
            ViT-B/32); `projector`, none of the model's; `all`; or a regular expression searched in the names.

    Raises:
        ValueError: an invalid expression, or one that matches nothing.
    """
    named = dict(model.named_parameters())
    if tune == PROJECTOR:
        return {}
    if tune == ALL:
        return named
    if tune == LAYERNORM:
        wanted = {
            f"{prefix}.{name}" if prefix else name
            for prefix, module in model.named_modules()
            if isinstance(module, nn.LayerNorm)
            for name, _ in module.named_parameters(recurse=False)
        }
    else:
        try:
            pattern = re.compile(tune)
        except re.error as error:
            raise ValueError(
                f"tune: expected layernorm, projector, all or a regular expression, got {tune!r}: {error}"
            ) from error
        wanted = {name for name in named if pattern.search(name)}
    if not wanted:
        examples = ", ".join(list(named)[:3])
        raise ValueError(f"tune: {tune!r} matches none of the model's {len(named)} parameters ({examples}, …)")
    return {name: parameter for name, parameter in named.items() if name in wanted}


def set_tuned(model: nn.Module, tune: str) -> dict[str, nn.Parameter]:
    """Leaves gradients to the parameters that `tune` names, freezes the others, and returns the former."""
    selected = select_parameters(model, tune)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    return selected
