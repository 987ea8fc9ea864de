"""Distil the toy teacher into the toy CLIP beside its control, compare the two, and hand the model on to open_clip."""

from pathlib import Path

import open_clip

import fastsds
from fastsds import DistillConfig, DistillTrainer, SDSDistiller
from fastsds.clip import ClipSource, export_open_clip
from fastsds.data import CaptionSource, caption_loader
from fastsds.evaluation import ClipJudge, compare, comparison_table, read_winoground, two_by_two_outcomes
from fastsds.toyworld.files import write_captions, write_winoground

data, runs = Path("toyworld-data"), Path("runs")
write_captions(data / "coco", 256)
write_winoground(data / "winoground", 40)

source = ClipSource("toyworld")  # or ClipSource("ViT-B-32", "openai")
captions = CaptionSource(data / "coco/annotations/captions_train.json", images=data / "coco/train")
examples = read_winoground(data / "winoground")


def distil(name: str, sds_weight: float) -> ClipJudge:
    clip = source.load()
    teacher = fastsds.toyworld.load_teacher() if sds_weight else None
    loader = caption_loader(captions.load(clip.preprocess, clip.tokenizer), batch_size=32, workers=0)
    distiller = SDSDistiller(clip.model, teacher, sds_weight, tune="layernorm", teacher_batch=8)
    DistillTrainer(distiller, loader, DistillConfig(out=runs / name, steps=8)).fit()
    if sds_weight:
        export_open_clip(Path("exported"), clip, source)
    return ClipJudge(*clip)


control, distilled = (two_by_two_outcomes(distil(*run), examples) for run in (("control", 0.0), ("sds", 1e-3)))
print(comparison_table(compare(control, distilled)))

model, preprocess = open_clip.create_model_from_pretrained("local-dir:exported")  # without fastsds
tokenizer = open_clip.get_tokenizer("local-dir:exported")
print(f"open_clip loads it: {type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters")
