"""SDS-CLIP (Basu et al., EMNLP 2024): the distiller, the latent projector, and teacher ranking beside them."""

from fastsds.sdsclip.distiller import DistillOutput, SDSDistiller
from fastsds.sdsclip.projector import LatentProjector
from fastsds.sdsclip.ranking import batch_candidates, swap_phrases

__all__ = ["DistillOutput", "LatentProjector", "SDSDistiller", "batch_candidates", "swap_phrases"]
