"""Data in the formats that users have."""

from fastsds.data.attributes import label_attributes, read_attributes
from fastsds.data.captions import CaptionDataset, DataError, collate_captions
from fastsds.data.fewshot import FewShotDataset, FewShotSplit, LabelledImage

__all__ = [
    "CaptionDataset",
    "DataError",
    "FewShotDataset",
    "FewShotSplit",
    "LabelledImage",
    "collate_captions",
    "label_attributes",
    "read_attributes",
]
