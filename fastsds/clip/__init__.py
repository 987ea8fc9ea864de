"""What a CLIP model is to us: where it comes from and goes to, its text tower on packed tokens, which parameters are
tuned, how two are told apart."""

from fastsds.clip.errors import ClipFormatError, ClipSourceError
from fastsds.clip.export import export_open_clip, export_transformers, export_tuned
from fastsds.clip.identity import ClipIdentity, ModelMismatchError
from fastsds.clip.source import ClipSource, LoadedCLIP
from fastsds.clip.text import PrefixTextEncoder
from fastsds.clip.tower import UnsupportedTowerError
from fastsds.clip.tuned import TunedCLIP
from fastsds.clip.tuning import select_parameters, set_tuned

__all__ = [
    "ClipFormatError",
    "ClipIdentity",
    "ClipSource",
    "ClipSourceError",
    "LoadedCLIP",
    "ModelMismatchError",
    "PrefixTextEncoder",
    "TunedCLIP",
    "UnsupportedTowerError",
    "export_open_clip",
    "export_transformers",
    "export_tuned",
    "select_parameters",
    "set_tuned",
]
