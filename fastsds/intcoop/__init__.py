"""IntCoOp: prompt-tuning CLIP with predicted attributes, and what it is compared with."""

from fastsds.intcoop.attributes import Explanation
from fastsds.intcoop.baselines import CoCoOp, CoOp, ZeroShot
from fastsds.intcoop.checkpoints import export_coop, load_coop, load_prompts, save_prompts
from fastsds.intcoop.extractor import AttributeExtractor
from fastsds.intcoop.model import IntCoOp
from fastsds.intcoop.prompts import PromptedCLIP, PromptLosses

__all__ = [
    "AttributeExtractor",
    "CoCoOp",
    "CoOp",
    "Explanation",
    "IntCoOp",
    "PromptLosses",
    "PromptedCLIP",
    "ZeroShot",
    "export_coop",
    "load_coop",
    "load_prompts",
    "save_prompts",
]
