"""How composition and classification are measured; strict on ties throughout."""

from fastsds.evaluation.aro import read_order, read_vg_attribution, read_vg_relation, with_published_macro
from fastsds.evaluation.base_to_novel import (
    BaseToNovelScores,
    base_to_novel,
    classification_accuracy,
    summarise_base_to_novel,
)
from fastsds.evaluation.classification import (
    ClassifiedImages,
    read_class_folders,
    read_classnames,
    read_templates,
    read_torchvision,
)
from fastsds.evaluation.compare import Comparison, FigureComparison, compare
from fastsds.evaluation.diffusion_score import (
    DecisionCost,
    DiffusionOutcomes,
    diffusion_outcomes,
    diffusion_retrieval_outcomes,
    diffusion_zero_shot_outcomes,
)
from fastsds.evaluation.examples import CaptionChoice, TwoByTwo
from fastsds.evaluation.judge import ClipJudge, Judge, caption_choice_outcomes, two_by_two_outcomes
from fastsds.evaluation.outcomes import Figure, Outcomes, read_outcomes
from fastsds.evaluation.retrieval import CaptionedImages, read_captioned_images, retrieval_outcomes
from fastsds.evaluation.shuffles import write_shuffles
from fastsds.evaluation.similarity import encode_captions, encode_images
from fastsds.evaluation.statistics import (
    bootstrap_interval,
    exact_mcnemar,
    share_interval,
    summarise,
    wilson_interval,
)
from fastsds.evaluation.sugarcrepe import read_sugarcrepe
from fastsds.evaluation.tables import comparison_table, results_table, write_results
from fastsds.evaluation.winoground import WinogroundScores, read_winoground, winoground_scores, winoground_similarity
from fastsds.evaluation.zeroshot import zero_shot_accuracy, zero_shot_outcomes

__all__ = [
    "BaseToNovelScores",
    "CaptionChoice",
    "CaptionedImages",
    "ClassifiedImages",
    "ClipJudge",
    "Comparison",
    "DecisionCost",
    "DiffusionOutcomes",
    "Figure",
    "FigureComparison",
    "Judge",
    "Outcomes",
    "TwoByTwo",
    "WinogroundScores",
    "base_to_novel",
    "bootstrap_interval",
    "caption_choice_outcomes",
    "classification_accuracy",
    "compare",
    "comparison_table",
    "diffusion_outcomes",
    "diffusion_retrieval_outcomes",
    "diffusion_zero_shot_outcomes",
    "encode_captions",
    "encode_images",
    "exact_mcnemar",
    "read_captioned_images",
    "read_class_folders",
    "read_classnames",
    "read_order",
    "read_outcomes",
    "read_sugarcrepe",
    "read_templates",
    "read_torchvision",
    "read_vg_attribution",
    "read_vg_relation",
    "read_winoground",
    "results_table",
    "retrieval_outcomes",
    "share_interval",
    "summarise",
    "summarise_base_to_novel",
    "two_by_two_outcomes",
    "wilson_interval",
    "winoground_scores",
    "winoground_similarity",
    "with_published_macro",
    "write_results",
    "write_shuffles",
    "zero_shot_accuracy",
    "zero_shot_outcomes",
]
