from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPProcessor

from fastsds.clip import (
    ClipFormatError,
    ClipIdentity,
    ClipSource,
    ClipSourceError,
    LoadedCLIP,
    ModelMismatchError,
    TunedCLIP,
    export_open_clip,
    export_transformers,
    export_tuned,
    select_parameters,
)
from fastsds.toyworld import CLIP_FOLDER

TEXTS = ["a red circle", "a large blue square above a small green triangle"]
TOYWORLD = ClipSource(str(CLIP_FOLDER))


@pytest.fixture
def tuned_clip() -> LoadedCLIP:
    """The toy world's CLIP with other LayerNorms."""
    loaded = TOYWORLD.load()
    with torch.no_grad():
        for parameter in select_parameters(loaded.model, "layernorm").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return loaded


@pytest.fixture
def tuned(tuned_clip: LoadedCLIP) -> TunedCLIP:
    tensors = {name: tensor.detach() for name, tensor in select_parameters(tuned_clip.model, "layernorm").items()}
    return TunedCLIP(TOYWORLD, tensors, ClipIdentity.of(tuned_clip.model).to_json())


def _features(clip: Any, preprocess: Any, tokenizer: Any, photo: Image.Image) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([clip.encode_image(preprocess(photo)[None]), clip.encode_text(tokenizer(TEXTS))])


def test_open_clip_reads_its_folder_without_fastsds(tuned_clip: LoadedCLIP, photo: Image.Image, tmp_path: Path) -> None:
    export_open_clip(tmp_path / "clip", tuned_clip, TOYWORLD)
    photo.save(tmp_path / "photo.png")
    code = f"""
import sys, torch, open_clip
from PIL import Image
name = "local-dir:{tmp_path / "clip"}"
model, preprocess = open_clip.create_model_from_pretrained(name)
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("{tmp_path / "photo.png"}"))[None])
    text = model.encode_text(open_clip.get_tokenizer(name)({TEXTS!r}))
assert not any(module.startswith("fastsds") for module in sys.modules)
torch.save(torch.cat([image, text]), "{tmp_path / "features.pt"}")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    # Of another process, where the number of threads may change the order of sums.
    torch.testing.assert_close(torch.load(tmp_path / "features.pt"), _features(*tuned_clip, photo))


def test_transformers_reads_its_folder(tuned_clip: LoadedCLIP, photo: Image.Image, tmp_path: Path) -> None:
    export_transformers(tmp_path / "clip", tuned_clip)
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    with torch.no_grad():
        output = model(**processor(text=TEXTS, images=photo, return_tensors="pt", padding="max_length"))
        image = model.visual_projection(model.vision_model(tuned_clip.preprocess(photo)[None]).pooler_output)
    pixels = processor(images=photo, return_tensors="pt")["pixel_values"][0]
    expected = _features(*tuned_clip, photo)
    # Two resizers of 8-bit pixels may round apart: a step is 2/255 here.
    assert (pixels - tuned_clip.preprocess(photo)).abs().max() < 0.01
    text = torch.nn.functional.normalize(expected[1:], dim=-1)
    assert (output.text_embeds - text).abs().max() <= 1e-5 * text.abs().max()
    assert (image - expected[:1]).abs().max() <= 1e-5 * expected[:1].abs().max()
    assert processor.tokenizer.model_max_length == 12
    assert model.config.text_config.bos_token_id == processor.tokenizer.bos_token_id


def test_an_exported_folder_is_a_source(tuned_clip: LoadedCLIP, photo: Image.Image, tmp_path: Path) -> None:
    export_transformers(tmp_path / "transformers", tuned_clip)
    again = ClipSource(str(tmp_path / "transformers")).load()
    export_open_clip(tmp_path / "open_clip", again, ClipSource(str(tmp_path / "transformers")))
    back = ClipSource(str(tmp_path / "open_clip")).load()
    expected = _features(*tuned_clip, photo)
    for loaded in (again, back):
        torch.testing.assert_close(_features(*loaded, photo), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_classes_and_activations_survive_both_folders(
    kind: str, quick_gelu: bool, tmp_path: Path, photo: Image.Image, make_transformers_clip: Callable[..., Any],
    save_transformers_folder: Callable[..., Path],
) -> None:  # fmt: skip
    act = {"hidden_act": "quick_gelu" if quick_gelu else "gelu"}
    base = save_transformers_folder(make_transformers_clip(vision=act, text=act), tmp_path / "base")
    source = ClipSource(str(base))
    loaded = source.load()
    if kind == "CustomTextCLIP":
        custom = open_clip.CustomTextCLIP(**source.model_config()).eval()
        custom.load_state_dict(open_clip.model.convert_to_custom_text_state_dict(loaded.model.state_dict()))
        open_clip.model.set_model_preprocess_cfg(custom, loaded.model.visual.preprocess_cfg)
        loaded = loaded._replace(model=custom)
    export_open_clip(tmp_path / "open_clip", loaded, source)
    export_transformers(tmp_path / "transformers", loaded)
    expected = _features(*loaded, photo)
    for folder in ("open_clip", "transformers"):
        back = ClipSource(str(tmp_path / folder)).load()
        torch.testing.assert_close(_features(*back, photo), expected, rtol=1e-5, atol=1e-5)
    plain = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}")
    assert ClipIdentity.of(plain) == ClipIdentity.of(loaded.model)


def test_the_simple_tokenizer_becomes_the_same_ids(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"width": 8, "layers": 1}
    clip = open_clip.CLIP(
        8, {**tower, "image_size": 16, "patch_size": 8, "head_width": 8}, {**tower, "heads": 1}, quick_gelu=True
    ).eval()
    open_clip.model.set_model_preprocess_cfg(
        clip, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    )
    loaded = LoadedCLIP(clip, lambda image: image, open_clip.tokenizer.SimpleTokenizer())
    export_transformers(tmp_path / "clip", loaded)
    texts = ["a photo of a cat.", "Ünïcode, naïve façade!", "it's 12345 o'clock", "x" * 300]
    back = ClipSource(str(tmp_path / "clip")).load()
    ours, theirs = loaded.tokenizer(texts), back.tokenizer(texts)
    for row, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        length = row.index(49407) + 1  # what is after the end token is padding, and read by nobody
        assert row[:length] == other[:length]
    assert torch.equal(clip.encode_text(ours), back.model.encode_text(theirs))
    assert back.preprocess(Image.new("RGB", (40, 20))).shape == (3, 16, 16)


def test_a_checkpoint_file_of_ours_keeps_its_activation(
    tmp_path: Path, make_transformers_clip: Callable[..., Any], save_transformers_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source = ClipSource(str(save_transformers_folder(make_transformers_clip(), tmp_path / "base")))
    export_open_clip(tmp_path / "clip", source.load(), source)
    config = source.model_config() | {"quick_gelu": False}
    del config["text_cfg"]["hf_tokenizer_name"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    file = str(tmp_path / "clip" / "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="tiny is built with QuickGELU in place of GELU"):
        ClipSource("tiny", file).load()
    with pytest.raises(ClipSourceError, match=r"activation: .* was trained with QuickGELU, got gelu"):
        ClipSource("tiny", file, activation="gelu").load()


def test_tuned_tensors_load_onto_the_base_model(
    tuned_clip: LoadedCLIP, tuned: TunedCLIP, photo: Image.Image, tmp_path: Path
) -> None:
    export_tuned(tmp_path / "patch.safetensors", tuned)
    assert load_file(tmp_path / "patch.safetensors").keys() == tuned.tensors.keys()
    again = TunedCLIP.read(tmp_path / "patch.safetensors")
    assert again.source == TOYWORLD
    assert torch.equal(_features(*again.load(), photo), _features(*tuned_clip, photo))


def test_the_layernorm_patch_of_vit_b_32_is_65536_numbers(tmp_path: Path) -> None:
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"), quick_gelu=True)
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in select_parameters(clip, "layernorm").items()}
    source = ClipSource("ViT-B-32", "openai")
    export_tuned(tmp_path / "patch.safetensors", TunedCLIP(source, tensors, ClipIdentity.of(clip).to_json()))
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "patch.safetensors").values()) == 65_536
    assert (tmp_path / "patch.safetensors").stat().st_size < 4 * 65_536 + 16_384
    with safe_open(tmp_path / "patch.safetensors", framework="pt") as stored:
        metadata = stored.metadata()
    assert ClipSource.from_json(json.loads(metadata["clip_source"])) == source
    assert json.loads(metadata["clip_identity"])["activation"] == "QuickGELU"


def test_others_may_read_an_export(tuned: TunedCLIP, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    export_tuned(tmp_path / "tuned.safetensors", tuned)
    assert (tmp_path / "tuned.safetensors").stat().st_mode == plain.stat().st_mode


def test_tuned_tensors_do_not_load_under_the_other_activation(tuned: TunedCLIP, tmp_path: Path) -> None:
    assert tuned.identity is not None
    export_tuned(
        tmp_path / "patch.safetensors",
        TunedCLIP(tuned.source, tuned.tensors, {**tuned.identity, "activation": "QuickGELU"}),
    )
    with pytest.raises(
        ModelMismatchError, match=r"activation was 'QuickGELU' .* is 'GELU' in this model; GELU and Quick"
    ):
        TunedCLIP.read(tmp_path / "patch.safetensors").load()


def test_tuned_tensors_that_do_not_fit_change_nothing(tuned: TunedCLIP) -> None:
    tensors = {"visual.ln_post.bias": torch.zeros(7), "visual.ln_middle.bias": torch.zeros(3)}
    with pytest.raises(
        ClipSourceError, match=r"2 tensors do not fit the model: visual.ln_post.bias \(\[7\], expected \[1"
    ):
        TunedCLIP(tuned.source, tensors, tuned.identity).load()


def test_files_that_hold_no_tuned_tensors(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ClipSourceError, match=r"path: .*other.safetensors holds no tuned tensors that export_tuned wrote"
    ):
        TunedCLIP.read(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ClipSourceError, match=r"path: .*broken.safetensors: is no whole safetensors file, "):
        TunedCLIP.read(tmp_path / "broken.safetensors")


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    tuned_clip: LoadedCLIP, tuned: TunedCLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken.safetensors").touch()
    for export in (
        lambda: export_open_clip(tmp_path / "taken", tuned_clip, TOYWORLD),
        lambda: export_transformers(tmp_path / "taken", tuned_clip),
        lambda: export_tuned(tmp_path / "taken.safetensors", tuned),
    ):
        with pytest.raises(FileExistsError, match=r"out: .*taken.* exists; name another place"):
            export()
    assert list((tmp_path / "taken").iterdir()) == []

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastsds.clip.export.save_file", full)
    monkeypatch.setattr(CLIPModel, "save_pretrained", full)
    before = sorted(path.name for path in tmp_path.iterdir())
    for export in (
        lambda: export_open_clip(tmp_path / "new", tuned_clip, TOYWORLD),
        lambda: export_transformers(tmp_path / "new", tuned_clip),
        lambda: export_tuned(tmp_path / "new.safetensors", tuned),
    ):
        with pytest.raises(OSError, match="No space left"):
            export()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_cannot_be_exported_is_refused_by_name(
    tuned_clip: LoadedCLIP, tuned: TunedCLIP, tmp_path: Path, make_open_clip: Callable[..., Any]
) -> None:
    new = tmp_path / "new"
    with pytest.raises(ClipSourceError, match="source: it describes another model than clip: parameters is "):
        export_open_clip(new, tuned_clip._replace(model=make_open_clip()), TOYWORLD)
    with pytest.raises(ClipFormatError, match=r"tokenizer: expected open_clip's HFTokenizer or .* got SimpleTokenizer"):
        export_open_clip(new, tuned_clip._replace(tokenizer=open_clip.tokenizer.SimpleTokenizer()), TOYWORLD)
    with pytest.raises(ClipSourceError, match="clip: its preprocessing is not known; load it with ClipSource"):
        export_transformers(new, tuned_clip._replace(model=make_open_clip()))
    with pytest.raises(ClipFormatError, match=r"logit_bias: .* cannot hold a bias of the logits"):
        export_transformers(new, tuned_clip._replace(model=make_open_clip(init_logit_bias=-1.0)))
    tuned_clip.model.visual.preprocess_cfg["resize_mode"] = "longest"
    with pytest.raises(ClipFormatError, match="CLIPImageProcessor has no resize_mode 'longest'"):
        export_transformers(new, tuned_clip)
    with pytest.raises(ValueError, match=r"out: expected a file that ends with \.safetensors, got .*new"):
        export_tuned(new, tuned)
    with pytest.raises(ValueError, match="has no tuned tensors; export a run or a checkpoint"):
        export_tuned(tmp_path / "new.safetensors", TunedCLIP(TOYWORLD, {}))
    assert list(tmp_path.iterdir()) == []
