from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import fastsds
from fastsds.clip import ClipSource, ClipSourceError, ModelMismatchError, export_open_clip, export_tuned
from fastsds.intcoop import CoOp
from fastsds.sdsclip import SDSDistiller
from fastsds.training import DistillConfig, DistillTrainer, read_distilled
from fastsds.training.checkpoint import checkpoint_folder, save_checkpoint

TEXTS = ["a red circle", "a blue square", "a green triangle", "a small red circle"]
BASE = ClipSource("toyworld")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A finished contrastive-only run of two steps with its config, and the text features it ended with."""
    loaded = BASE.load()
    rows = [
        {"images": torch.rand(3, 32, 32), "tokens": tokens, "captions": text}
        for tokens, text in zip(loaded.tokenizer(TEXTS), TEXTS, strict=True)
    ]
    out = tmp_path_factory.mktemp("runs") / "sds-clip"
    distiller = SDSDistiller(loaded.model, None, sds_weight=0)
    config = DistillConfig(out=out, lr=0.05, steps=2, save_every=1, tensorboard=False, progress=False)
    DistillTrainer(distiller, DataLoader(rows, batch_size=2), config).fit()
    (out / "config.yaml").write_text(yaml.safe_dump({"clip": BASE.to_json(), "batch_size": 2}))
    with torch.no_grad():
        return out, loaded.model.eval().encode_text(loaded.tokenizer(TEXTS))


def _text(loaded: Any) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model.encode_text(loaded.tokenizer(TEXTS))


def test_every_kind_of_path_gives_the_trained_model(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, expected = run
    assert not torch.allclose(_text(BASE.load()), expected, atol=1e-2)
    tuned = read_distilled(folder)
    export_tuned(tmp_path / "patch.safetensors", tuned)
    export_open_clip(tmp_path / "clip", tuned.load(), tuned.source)
    checkpoint = folder / "checkpoints" / "step-00000002"
    for path in (folder, str(folder), checkpoint, tmp_path / "patch.safetensors", tmp_path / "clip"):
        model, preprocess, tokenizer = fastsds.load_distilled(path)
        assert torch.equal(_text(fastsds.load_distilled(path)), expected)
        assert not model.training
        assert preprocess.transforms and tokenizer(TEXTS).shape == (4, 12)
    earlier = _text(fastsds.load_distilled(folder / "checkpoints" / "step-00000001"))
    assert not torch.equal(earlier, expected)


def test_the_base_model_can_be_named(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copytree(run[0], folder := tmp_path / "run")
    (folder / "config.yaml").unlink()
    with pytest.raises(
        ClipSourceError, match=r"clip: .*config.yaml is missing, .*; pass the ClipSource it was trained"
    ):
        fastsds.load_distilled(folder)
    assert torch.equal(_text(fastsds.load_distilled(folder, clip=BASE)), run[1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("batch_size: 2", "names no base model under clip; pass the ClipSource it was trained on"),
        ("- a\n- b", "names no base model under clip"),
        ("clip: {name: toyworld", "path: could not read .*config.yaml: "),
        ("clip: {name: ViT-B-23}", "name: 'ViT-B-23' is no open_clip architecture"),
        ("clip: {nam: toyworld}", "nam: expected one of activation, "),
    ],
)
def test_a_config_that_does_not_serve(
    config: str, message: str, run: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(run[0], folder := tmp_path / "run")
    (folder / "config.yaml").write_text(config)
    with pytest.raises(ClipSourceError, match=message) as caught:
        fastsds.load_distilled(folder)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_does_not_load_under_the_other_activation(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copytree(run[0], folder := tmp_path / "run")
    state = folder / "checkpoints" / "step-00000002" / "state.json"
    document = json.loads(state.read_text())
    document["model"]["clip"]["activation"] = "QuickGELU"
    state.write_text(json.dumps(document))
    with pytest.raises(ModelMismatchError, match="activation was 'QuickGELU' when it was written and is 'GELU'"):
        fastsds.load_distilled(folder)


def test_paths_without_a_distilled_model(run: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(ClipSourceError, match=r"path: there is no .*nowhere"):
        fastsds.load_distilled(tmp_path / "nowhere")
    (tmp_path / "epoch_1.pt").touch()
    with pytest.raises(ClipSourceError, match=r"path: expected tuned tensors in a \.safetensors file, got .*epoch"):
        fastsds.load_distilled(tmp_path / "epoch_1.pt")
    with pytest.raises(
        ClipSourceError, match=r"path: .* is no run with a checkpoint, .* expected in it checkpoints/step"
    ):
        fastsds.load_distilled(tmp_path)
    tuned = read_distilled(run[0])
    export_open_clip(tmp_path / "clip", tuned.load(), tuned.source)
    with pytest.raises(ClipSourceError, match=r"clip: .* is a whole model; expected None, got 'toyworld'"):
        fastsds.load_distilled(tmp_path / "clip", clip=BASE)


def test_a_run_that_leaves_clip_as_it_is(tmp_path: Path) -> None:
    loaded = BASE.load()
    model = CoOp(loaded.model, ["red circle", "blue square"], tokenizer=loaded.tokenizer)
    trained = model.trained_parameters()
    folder = checkpoint_folder(tmp_path / "run" / "checkpoints", 1)
    state = {"step": 1, "model": model.identity()}
    save_checkpoint(folder, dict(trained), torch.optim.AdamW(trained.values()), state)
    with pytest.raises(
        ClipSourceError, match="is a checkpoint of CoOp, which leaves CLIP as it is; expected one of SDS"
    ):
        fastsds.load_distilled(tmp_path / "run")
