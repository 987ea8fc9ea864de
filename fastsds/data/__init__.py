"""Data in the formats that users have."""

from fastsds.data.attributes import label_attributes, read_attributes
from fastsds.data.bad_images import BadImages
from fastsds.data.captions import CaptionDataset, collate_captions
from fastsds.data.fewshot import FewShotDataset, FewShotSplit, LabelledImage
from fastsds.data.files import DataError
from fastsds.data.loader import caption_loader
from fastsds.data.source import CaptionSource

__all__ = [
    "BadImages",
    "CaptionDataset",
    "CaptionSource",
    "DataError",
    "FewShotDataset",
    "FewShotSplit",
    "LabelledImage",
    "caption_loader",
    "collate_captions",
    "label_attributes",
    "read_attributes",
]
