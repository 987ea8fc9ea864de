"""What a CLIP model is to us: its text tower on packed tokens, which parameters are tuned, how two are told apart."""

from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.text import PrefixTextEncoder
from fastsds.clip.tower import UnsupportedTowerError
from fastsds.clip.tuning import select_parameters, set_tuned

__all__ = [
    "ClipIdentity",
    "ModelMismatchError",
    "PrefixTextEncoder",
    "UnsupportedTowerError",
    "select_parameters",
    "set_tuned",
]
