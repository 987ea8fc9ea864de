"""Data in the formats that users have."""

from fastsds.data.captions import CaptionDataset, DataError, collate_captions

__all__ = ["CaptionDataset", "DataError", "collate_captions"]
