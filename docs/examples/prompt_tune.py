"""Prompt-tune the toy CLIP with predicted attributes on half of its classes, and measure it on the other half."""

from pathlib import Path

from torch.utils.data import DataLoader

import fastsds
from fastsds.data import FewShotDataset, FewShotSplit, read_attributes
from fastsds.evaluation import base_to_novel
from fastsds.intcoop import CoOp
from fastsds.toyworld.files import write_few_shot

data = Path("toyworld-data/fewshot")
write_few_shot(data, train_per_class=16, test_per_class=20)

clip, preprocess, tokenizer = fastsds.toyworld.load_clip()
split = FewShotSplit.from_json(data / "split.json", data)
few = split.few_shot(8, seed=1).with_attributes(read_attributes(data / "attributes.jsonl"))
base, novel = few.base(), few.novel()
base_test, novel_test = (DataLoader(FewShotDataset(half.test, preprocess), 32) for half in (base, novel))

for method in (fastsds.IntCoOp, CoOp):
    model = method(clip, base.classnames, tokenizer=tokenizer)
    config = fastsds.IntCoOpConfig(out=Path("runs") / method.__name__, shots=None, epochs=4)
    fastsds.IntCoOpTrainer(model, DataLoader(FewShotDataset(base.train, preprocess), 8), config).fit()
    scores = base_to_novel(model, base_test, novel_test, novel.classnames)
    print(f"{method.__name__}: base {scores.base:.3f}, novel {scores.novel:.3f}, harmonic {scores.harmonic:.3f}")
    if isinstance(model, fastsds.IntCoOp):
        seen = next(iter(base_test))["images"][:3]
        explanation = model.explain(seen, top=2)
        for classname, words in zip(explanation.classnames, explanation.words, strict=True):
            print(f"  a {words[0]} {classname} (or {words[1]})")
