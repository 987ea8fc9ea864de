"""What a CLIP model is to us: which of its parameters are tuned, and how it is told from another."""

from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.tuning import select_parameters, set_tuned

__all__ = ["ClipIdentity", "ModelMismatchError", "select_parameters", "set_tuned"]
