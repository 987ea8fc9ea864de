"""How composition and classification are measured; strict on ties throughout."""

from fastsds.evaluation.base_to_novel import (
    BaseToNovelScores,
    base_to_novel,
    classification_accuracy,
    summarise_base_to_novel,
)
from fastsds.evaluation.similarity import encode_captions, encode_images
from fastsds.evaluation.statistics import summarise, wilson_interval
from fastsds.evaluation.winoground import WinogroundScores, winoground_scores, winoground_similarity
from fastsds.evaluation.zeroshot import zero_shot_accuracy

__all__ = [
    "BaseToNovelScores",
    "WinogroundScores",
    "base_to_novel",
    "classification_accuracy",
    "encode_captions",
    "encode_images",
    "summarise",
    "summarise_base_to_novel",
    "wilson_interval",
    "winoground_scores",
    "winoground_similarity",
    "zero_shot_accuracy",
]
