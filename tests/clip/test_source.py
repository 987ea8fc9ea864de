from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save, save_file
from transformers import CLIPProcessor, CLIPTokenizer

from fastsds.clip import ClipSource, ClipSourceError
from fastsds.clip.identity import activation_of
from fastsds.toyworld import CLIP_FOLDER

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
TEXTS = ["a red circle", "a large blue square above a small green triangle"]


@pytest.fixture
def architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Registers a tiny architecture with open_clip, for the test, under the name `tiny`."""
    from open_clip import factory

    def register(**config: Any) -> str:
        text = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}
        vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
        path = tmp_path / "architectures" / "tiny.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"embed_dim": 8, "vision_cfg": vision, "text_cfg": text, **config}))
        monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", [*factory._MODEL_CONFIG_PATHS, path.parent])
        monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
        factory._rescan_model_configs()
        return "tiny"

    return register


def _save_weights(name: str, file: Path, **config: Any) -> Any:
    torch.manual_seed(0)
    clip = open_clip.CLIP(**open_clip.get_model_config(name) | config).eval()
    if file.suffix == ".safetensors":
        save_file(clip.state_dict(), file)
    else:
        torch.save(clip.state_dict(), file)
    return clip


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
def test_an_open_clip_folder_is_what_open_clip_loads(prefix: str, photo: Image.Image) -> None:
    ours = ClipSource(f"{prefix}{CLIP_FOLDER}").load()
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{CLIP_FOLDER}")
    tokens = open_clip.get_tokenizer(f"local-dir:{CLIP_FOLDER}")(TEXTS)
    assert not ours.model.training
    assert torch.equal(ours.preprocess(photo), preprocess(photo))
    assert torch.equal(ours.tokenizer(TEXTS), tokens)
    assert torch.equal(ours.model.encode_text(tokens), model.eval().encode_text(tokens))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_architecture_with_a_checkpoint_file(
    suffix: str, architecture: Callable[..., str], tmp_path: Path, assert_same_features: Callable[..., None]
) -> None:
    name, file = architecture(), tmp_path / f"weights{suffix}"
    expected = _save_weights(name, file)
    clip, preprocess, tokenizer = ClipSource(name, str(file)).load()
    assert torch.equal(clip.encode_text(tokenizer(TEXTS)), expected.encode_text(open_clip.tokenize(TEXTS)))
    assert preprocess(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    assert activation_of(clip) == "GELU"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_a_transformers_folder_is_what_transformers_loads(
    activation: str, photo: Image.Image, tmp_path: Path, make_transformers_clip: Callable[..., Any],
    save_transformers_folder: Callable[..., Path], assert_same_features: Callable[..., None],
) -> None:  # fmt: skip
    act = {"hidden_act": activation}
    model = make_transformers_clip(vision=act, text=act)
    folder = save_transformers_folder(model, tmp_path / "clip", image_mean=[0.1, 0.2, 0.3])
    clip, preprocess, tokenizer = ClipSource(str(folder)).load()
    assert_same_features(clip, model)
    processor = CLIPProcessor.from_pretrained(folder)
    both = processor(text=TEXTS, images=photo, return_tensors="pt", padding="max_length")
    assert torch.equal(tokenizer(TEXTS), both["input_ids"])
    # Two resizers of 8-bit pixels may round apart; 0.02 is about a step of 1/255 after normalisation.
    assert (preprocess(photo) - both["pixel_values"][0]).abs().max() < 0.02
    assert clip.visual.image_mean == (0.1, 0.2, 0.3)


def _cache(cache: Path, folder: Path) -> None:
    """Puts a folder where the hub's client keeps what it has downloaded of `org/<name of the folder>`."""
    repository = cache / f"models--org--{folder.name}"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (absent := repository / ".no_exist" / ("0" * 40)).mkdir(parents=True)
    for name in {"config.json", "open_clip_config.json"} - {path.name for path in folder.iterdir()}:
        (absent / name).touch()


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_hub_ids_of_both_kinds(
    prefix: str, tmp_path: Path, make_transformers_clip: Callable[..., Any], assert_same_features: Callable[..., None],
    save_transformers_folder: Callable[..., Path],
) -> None:  # fmt: skip
    model = make_transformers_clip()
    _cache(tmp_path / "cache", save_transformers_folder(model, tmp_path / "theirs"))
    shutil.copytree(CLIP_FOLDER, folder := tmp_path / "ours")
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "org/ours"
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    _cache(tmp_path / "cache", folder)
    source = ClipSource(f"{prefix}org/theirs", cache_dir=tmp_path / "cache")
    clip, _, tokenizer = source.load()
    assert_same_features(clip, model)
    assert source.model_config()["quick_gelu"] is True
    ours = ClipSource(f"{prefix}org/ours", cache_dir=tmp_path / "cache")
    expected = ClipSource(str(CLIP_FOLDER)).load()
    loaded = ours.load()
    assert torch.equal(tokenizer(TEXTS), loaded.tokenizer(TEXTS))
    assert torch.equal(loaded.model.encode_text(loaded.tokenizer(TEXTS)), expected.model.encode_text(tokenizer(TEXTS)))
    assert ours.model_config()["embed_dim"] == 128


def test_squashed_images_and_old_files_of_transformers(
    photo: Image.Image, tmp_path: Path, make_transformers_clip: Callable[..., Any],
    save_transformers_folder: Callable[..., Path],
) -> None:  # fmt: skip
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "clip")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (folder / name).unlink(missing_ok=True)
    old = {"size": 32, "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3}
    squash = {**old, "size": {"height": 32, "width": 32}, "do_center_crop": False, "resample": 2}
    shapes = []
    for config in (old, squash):
        document = {**config, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(document))
        preprocess = ClipSource(str(folder)).load().preprocess
        shapes.append([type(step).__name__ for step in preprocess.transforms][:2])
        assert preprocess(photo).shape == (3, 32, 32)
    assert shapes == [["Resize", "CenterCrop"], ["Resize", "MaybeConvertMode"]]


@pytest.mark.parametrize(
    ("own", "tag", "built", "said"),
    [
        (None, True, "QuickGELU", "tiny is built with QuickGELU in place of GELU, with which its weights trained were"),
        (True, False, "GELU", "tiny is built with GELU in place of QuickGELU, with which its weights trained were"),
        (True, True, "QuickGELU", None),
        (None, False, "GELU", None),
    ],
)
def test_a_tag_brings_the_activation_it_was_trained_with(
    own: bool | None, tag: bool, built: str, said: str | None, architecture: Callable[..., str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, assert_same_features: Callable[..., None],
) -> None:  # fmt: skip
    name, file = architecture(**({} if own is None else {"quick_gelu": own})), tmp_path / "weights.safetensors"
    expected = _save_weights(name, file, quick_gelu=tag)
    entry = {"file": str(file), "quick_gelu": tag, "mean": (0.5,) * 3}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"trained": entry})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip, *_ = ClipSource(name, "trained").load()
    assert activation_of(clip) == built
    tokens = open_clip.tokenize(TEXTS)
    assert torch.equal(clip.encode_text(tokens), expected.encode_text(tokens))
    about = [str(warning.message) for warning in caught if "GELU" in str(warning.message)]
    assert [text.startswith(said) for text in about] == [True] if said else about == []
    asked = "quickgelu" if built == "GELU" else "gelu"
    with pytest.raises(
        ClipSourceError, match=f"activation: trained was trained with {built}, got {asked}; GELU and Qu"
    ):
        ClipSource(name, "trained", activation=asked).load()


def test_an_activation_that_is_nowhere_recorded_can_be_set(architecture: Callable[..., str], tmp_path: Path) -> None:
    name, file = architecture(), tmp_path / "weights.pt"
    _save_weights(name, file)
    with pytest.warns(UserWarning, match="tiny is built with QuickGELU in place of GELU, as asked"):
        clip, *_ = ClipSource(name, str(file), activation="quickgelu").load()
    assert activation_of(clip) == "QuickGELU"


def test_a_folder_is_not_loaded_under_the_other_activation(
    tmp_path: Path, make_transformers_clip: Callable[..., Any], save_transformers_folder: Callable[..., Path]
) -> None:
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "clip")
    with pytest.raises(ClipSourceError, match=r"activation: .*clip was trained with QuickGELU, got gelu; .* use auto"):
        ClipSource(str(folder), activation="gelu").load()


def test_the_model_config_rebuilds_the_model(
    tmp_path: Path, architecture: Callable[..., str], make_transformers_clip: Callable[..., Any],
    save_transformers_folder: Callable[..., Path],
) -> None:  # fmt: skip
    file = tmp_path / "weights.safetensors"
    _save_weights(architecture(), file)
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "clip")
    for source in (ClipSource("tiny", str(file)), ClipSource(str(CLIP_FOLDER)), ClipSource(str(folder))):
        clip = source.load().model
        rebuilt = open_clip.CLIP(**source.model_config())
        rebuilt.load_state_dict(clip.state_dict())
        assert activation_of(rebuilt) == activation_of(clip)


def test_json_gives_the_source_back_and_finds_folders_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ClipSource("ViT-B-32", "openai", activation="quickgelu", cache_dir=tmp_path)
    assert ClipSource.from_json(json.loads(json.dumps(source.to_json()))) == source
    shutil.copytree(CLIP_FOLDER, tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    document = ClipSource("clip").to_json()
    local = ClipSource("local-dir:clip").to_json()
    monkeypatch.chdir("/")
    assert ClipSource.from_json(document).load().tokenizer(TEXTS).shape == (2, 12)
    assert ClipSource.from_json(local).load().tokenizer(TEXTS).shape == (2, 12)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"name": "ViT-B-23"}, "name: 'ViT-B-23' is no open_clip architecture, .*; close: .*ViT-B-32"),
        ({"name": "qqqqqqqqqqqq"}, "open_clip.list_models() names the architectures"),
        ({"name": "ViT-B-32", "pretrained": "opnai"}, "'opnai' is neither a tag of ViT-B-32 nor a file; tags: openai,"),
        ({"name": "ViT-B/32"}, "pretrained: expected a tag or a checkpoint file, got None; tags: openai, "),
        (
            {"name": "ViT-B-32", "pretrained": "/no/weights.pt"},
            "'/no/weights.pt' is neither a tag of ViT-B-32 nor a fi",
        ),
        ({"name": "/no/folder"}, "name: there is no folder /no/folder"),
        ({"name": "local-dir:no-folder"}, "name: there is no folder no-folder"),
        ({"name": str(CLIP_FOLDER), "pretrained": "openai"}, "brings its own weights; expected None, got 'openai'"),
        ({"name": "hf-hub:org/model", "pretrained": "x"}, "hf-hub:org/model brings its own weights"),
        ({"name": str(CLIP_FOLDER.parent)}, "holds neither open_clip_config.json nor config.json"),
        (
            {"name": "org/model"},
            "name: org/model is no folder, nothing of it was fetched, and the hub does not give it",
        ),
        ({"name": "org/a..b"}, "name: org/a..b: could not be loaded: "),
    ],
)
def test_a_source_that_there_is_not(source: dict[str, Any], message: str) -> None:
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(ClipSourceError, match=pattern) as caught:
        ClipSource(**source).load()
    assert "\n" not in str(caught.value)


def test_an_unknown_activation() -> None:
    with pytest.raises(ClipSourceError, match=r"activation: expected one of \('auto', .*got 'relu'"):
        ClipSource("ViT-B-32", "openai", activation="relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"name": "ViT-B-32", "tag": "openai"}, "tag: expected one of activation, cache_dir, name, pretrained, trust_"),
        ({"pretrained": "openai"}, "name: expected the name of a CLIP model, got None"),
    ],
)
def test_json_that_is_no_source(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ClipSourceError, match=message):
        ClipSource.from_json(document)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def test_a_pickle_is_refused_and_not_run(
    architecture: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": {"logit_scale": torch.ones(())}, "args": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ClipSourceError, match=r"pretrained: .*evil.pt: expected tensors alone, got a pickle that wei"):
        ClipSource(architecture(), str(tmp_path / "evil.pt")).load()
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "weights.safetensors",
            b"version https://git-lfs.github.com/spec/v1\n",
            "no whole safetensors file",
        ),
        ("weights.pt", b"version https://git-lfs.github.com/spec/v1\n", "no checkpoint that torch.save wrote"),
        ("weights.pt", save({"weight": torch.ones(9)}), "safetensors need the suffix .safetensors"),
    ],
)
def test_files_that_are_not_what_their_name_says(
    file: str, content: bytes, message: str, architecture: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ClipSourceError, match=f"^pretrained: .*{file}: .*{message}") as caught:
        ClipSource(architecture(), str(tmp_path / file)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(architecture: Callable[..., str], tmp_path: Path) -> None:
    """As OpenAI's own files are."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(ClipSourceError, match=r"got a TorchScript archive, which is code; OpenAI's models load by the"):
        ClipSource(architecture(), str(tmp_path / "ViT-B-32.pt")).load()


def test_a_checkpoint_of_open_clips_training(
    architecture: Callable[..., str], tmp_path: Path, assert_same_features: Callable[..., None]
) -> None:
    """Of a model in half precision that several processes trained, with its optimizer."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(**open_clip.get_model_config(architecture())).eval()
    optimizer = torch.optim.AdamW(clip.parameters())
    clip.encode_image(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    clip.half().float()
    state = {f"module.{name}": tensor.half() for name, tensor in clip.state_dict().items()}
    document = {"epoch": 1, "name": "run", "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save({**document, "scaler": {"scale": 65536.0}}, tmp_path / "epoch_1.pt")
    loaded = ClipSource("tiny", str(tmp_path / "epoch_1.pt")).load().model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    tokens = open_clip.tokenize(TEXTS)
    assert torch.equal(loaded.encode_text(tokens), clip.encode_text(tokens))


def test_a_model_with_a_decoder_is_refused_before_it_is_loaded() -> None:
    with pytest.raises(ClipSourceError, match="name: expected a model of two towers, got CoCa in coca_ViT-B-32"):
        ClipSource("coca_ViT-B-32", "laion2b_s13b_b90k").load()


def test_a_file_in_the_models_place_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "epoch_1.pt").touch()
    with pytest.raises(ClipSourceError, match=r"name: .*epoch_1\.pt is a file; expected its architecture"):
        ClipSource(str(tmp_path / "epoch_1.pt")).load()
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(CLIP_FOLDER, tmp_path / "clip")
    assert ClipSource("~/clip").to_json()["name"] == str(tmp_path / "clip")


def test_weights_that_do_not_fit_are_counted_and_named(architecture: Callable[..., str], tmp_path: Path) -> None:
    name, file = architecture(), tmp_path / "weights.safetensors"
    state = _save_weights(name, file).state_dict()
    state["extra"] = state.pop("ln_final.weight")
    state["ln_final.bias"] = torch.zeros(9)
    save_file(state, file)
    message = "3 tensors do not fit the model: ln_final.weight (missing), extra (unexpected), ln_final.bias ([9], expe"
    with pytest.raises(ClipSourceError, match=re.escape(message)):
        ClipSource(name, str(file)).load()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file(suffix: str, architecture: Callable[..., str], tmp_path: Path) -> None:
    name, file = architecture(), tmp_path / f"weights{suffix}"
    _save_weights(name, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ClipSourceError, match=f"pretrained: .*weights{suffix}: ") as caught:
        ClipSource(name, str(file)).load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "could not be loaded: .*model.safetensors"),
        (lambda folder: [path.unlink() for path in folder.glob("*processor_config.json")], "image processor"),
        (
            lambda folder: [(folder / name).unlink(missing_ok=True) for name in TOKENIZER_FILES],
            "holds no tokenizer: expected tokenizer.js",
        ),
        (lambda folder: _edit(folder, model_type="siglip"), "model_type 'clip' in config.json, got 'siglip'"),
        (lambda folder: (folder / "config.json").write_text("{"), "could not be loaded: .*config.json"),
    ],
)
def test_a_transformers_folder_that_lacks_something(
    spoil: Callable[[Path], Any], message: str, tmp_path: Path, make_transformers_clip: Callable[..., Any],
    save_transformers_folder: Callable[..., Path],
) -> None:  # fmt: skip
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "clip")
    spoil(folder)
    with pytest.raises(ClipSourceError, match=f"^name: .*{message}") as caught:
        ClipSource(str(folder)).load()
    assert "\n" not in str(caught.value)


def test_a_transformers_folder_whose_parts_do_not_fit(
    tmp_path: Path, make_transformers_clip: Callable[..., Any], save_transformers_folder: Callable[..., Path]
) -> None:
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "crop", size={"shortest_edge": 40})
    with pytest.raises(ClipSourceError, match=r"image processor's size is not what .* 32 pixels .*expected 32, got 40"):
        ClipSource(str(folder)).load()
    model = make_transformers_clip(text={"eos_token_id": 5})
    with pytest.raises(ClipSourceError, match=r"its tokenizer has .* the end token .* eos_token_id 5"):
        ClipSource(str(save_transformers_folder(model, tmp_path / "end"))).load()
    deeper = make_transformers_clip(vision={"num_hidden_layers": 3})
    folder = save_transformers_folder(make_transformers_clip(), tmp_path / "deep")
    deeper.config.save_pretrained(folder)
    with pytest.raises(
        ClipSourceError, match=r"16 tensors do not fit the model: vision_model.encoder.layers.2.* \(miss"
    ):
        ClipSource(str(folder)).load()


def test_open_clip_folders_that_lack_something(tmp_path: Path) -> None:
    shutil.copytree(CLIP_FOLDER, folder := tmp_path / "clip")
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        ClipSourceError, match=r"name: local-dir:.*clip: could not be loaded: Required pretrained weights"
    ):
        ClipSource(str(folder)).load()
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(ClipSourceError, match="is no open_clip configuration: expected JSON with model_cfg"):
        ClipSource(str(folder)).load()


def test_a_folder_cannot_switch_remote_code_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CLIP_FOLDER, folder := tmp_path / "clip")
    document = json.loads((folder / "open_clip_config.json").read_text())
    document["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    asked = []

    def from_pretrained(place: Any, **options: Any) -> Any:
        asked.append(options["trust_remote_code"])
        return CLIPTokenizer.from_pretrained(place)

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    ClipSource(str(folder)).load()
    ClipSource(str(folder), trust_remote_code=True).load()
    assert asked == [False, True]


def test_another_class_of_model_is_refused(
    architecture: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", lambda *_, **__: (torch.nn.Linear(1, 1), np.asarray))
    _save_weights(architecture(), tmp_path / "weights.pt")
    with pytest.raises(ClipSourceError, match="open_clip's classes CLIP or CustomTextCLIP, got Linear in tiny"):
        ClipSource("tiny", str(tmp_path / "weights.pt")).load()


def _edit(folder: Path, **changes: Any) -> None:
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **changes}))
