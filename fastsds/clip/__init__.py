"""What a CLIP model is to us: its text tower on packed tokens, which parameters are tuned, how two are told apart."""

from fastsds.clip.errors import ClipSourceError
from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.clip.text import PrefixTextEncoder
from fastsds.clip.tower import UnsupportedTowerError
from fastsds.clip.tuning import select_parameters, set_tuned

__all__ = [
    "ClipIdentity",
    "ClipSource",
    "ClipSourceError",
    "LoadedCLIP",
    "ModelMismatchError",
    "PrefixTextEncoder",
    "UnsupportedTowerError",
    "select_parameters",
    "set_tuned",
]
