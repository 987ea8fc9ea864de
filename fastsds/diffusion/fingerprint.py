"""What computed a tensor, as a key: the weights of models, their configuration and the rules of tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastsds.diffusion.cache import content_key

# Where it came from and how it was loaded, not what it computes.
_INCIDENTAL = ("transformers_version", "torch_dtype", "dtype", "architectures")


def fingerprint(components: Iterable[Any]) -> str:
    """SHA-256, in hexadecimal, of what diffusers' and transformers' models and tokenizers compute, in their order."""
    return content_key(
        *(_model_key(part) if isinstance(part, nn.Module) else _tokenizer_key(part) for part in components)
    )


def _model_key(model: Any) -> str:
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    lasting = {name: value for name, value in config.items() if name[0] != "_" and name not in _INCIDENTAL}
    tensors = [part for name, tensor in model.state_dict().items() for part in (name, tensor)]
    return content_key(type(model).__name__, json.dumps(lasting, sort_keys=True, default=str), *tensors)


def _tokenizer_key(tokenizer: Any) -> str:
    if tokenizer is None:
        return ""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules |= {"truncation": None, "padding": None}  # left there by the last call
    else:
        rules = [sorted(tokenizer.get_vocab().items()), list(getattr(tokenizer, "bpe_ranks", ()))]
    return content_key(json.dumps([rules, tokenizer.model_max_length, tokenizer.pad_token], sort_keys=True))
