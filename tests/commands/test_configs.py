"""Configs from the command line and YAML files, and back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from torch.utils.data import DataLoader

from fastsds.commands.configs import ConfigError, UsageError, default_workers, parse, save_config


@dataclass(frozen=True)
class Model:
    name: str
    tag: str | None = None
    quick: bool = False


@dataclass(frozen=True)
class Train:
    out: Path = Path("runs/x")
    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.98)
    steps: int | None = None
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: expected above 0, got {self.lr}")


@dataclass(frozen=True)
class Run:
    """Runs."""

    model: Model
    data: Path | str
    train: Train = field(default_factory=Train)
    words: tuple[str, ...] = ("a", "b")


EXAMPLE = Run(
    Model("ViT-B-32", "openai", quick=True),
    Path("data"),
    Train(out=Path("x y"), lr=1e-7, betas=(0.5, 0.6), steps=-3, precision="bf16"),
    words=("1", "no", "", "ä: #"),
)


def write(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(*arguments: str) -> Run:
    return parse(Run, arguments, command="run")


def test_a_saved_config_comes_back_as_it_was(tmp_path: Path) -> None:
    save_config(tmp_path / "config.yaml", EXAMPLE, "run")
    assert run("--config", str(tmp_path / "config.yaml")) == EXAMPLE
    assert (tmp_path / "config.yaml").read_text(encoding="utf-8").startswith("# fastsds run --config config.yaml\n")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_the_command_line_overrides_the_file_wherever_it_stands(tmp_path: Path) -> None:
    save_config(tmp_path / "config.yaml", EXAMPLE, "run")
    file = f"--config={tmp_path / 'config.yaml'}"
    changed = run("--train.lr", "3", file, "--model.tag", "None", "--words", "--model.no-quick")
    model = dataclasses.replace(EXAMPLE.model, tag=None, quick=False)
    assert changed == dataclasses.replace(
        EXAMPLE, model=model, train=dataclasses.replace(EXAMPLE.train, lr=3.0), words=()
    )


def test_a_file_may_leave_out_what_the_command_line_gives(tmp_path: Path) -> None:
    file = write(tmp_path, "train: {lr: 5e-4, steps: 7}\nmodel:\n  tag: openai\n")
    read = run("--config", file, "--model.name", "x", "--data", "d")
    assert read == Run(Model("x", "openai"), Path("d"), Train(lr=5e-4, steps=7))


def test_what_neither_gives_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^expected --model\.name, got none"):
        run("--config", write(tmp_path, "data: d"))


def test_a_value_of_the_file_outside_its_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"lr: expected above 0, got -1\.0"):
        run("--config", write(tmp_path, "train: {lr: -1}"), "--model.name", "x", "--data", "d")


def test_an_empty_file_has_no_options(tmp_path: Path) -> None:
    assert run("--config", write(tmp_path, "# nothing\n"), "--model.name", "x", "--data", "d").model == Model("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: {name: x}", "{} has modle, which is no option; did you mean model?"),
        ("train: {learning_rate: 3}", "{} has train.learning_rate, which is no option; there are out, lr, betas, "),
        ("train: {step: 3}", "{} has train.step, which is no option; did you mean steps?"),
        ("train: {lr: fast}", "{}: train.lr: expected a number, got 'fast'"),
        ("train: {lr: true}", "{}: train.lr: expected a number, got True"),
        ("train: {steps: 1.5}", "{}: train.steps: expected a whole number or nothing, got 1.5"),
        ("train: {betas: [0.9]}", "{}: train.betas: expected a list of 2: a number, a number, got [0.9]"),
        ("train: {precision: fp8}", "{}: train.precision: expected one of no, bf16, got 'fp8'"),
        ("model: {name: 3}", "{}: model.name: expected text, got 3"),
        ("model: {quick: 1}", "{}: model.quick: expected true or false, got 1"),
        ("data: [x]", "{}: data: expected a path or text, got ['x']"),
        ("words: [a, 3]", "{}: words: expected a list of text, got ['a', 3]"),
        ("model: x", "expected options by name in model in {}, got 'x'"),
        ("[1]", "expected options by name in {}, got [1]"),
        ("a: [", "{} is not YAML: while parsing"),
    ],
)
def test_a_file_that_does_not_serve_is_told_by_option(text: str, message: str, tmp_path: Path) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        run("--config", file)
    assert str(error.value).startswith("config: " + message.format(file))


def test_a_file_that_is_missing_or_not_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"could not read .*none\.yaml: No such file"):
        run("--config", str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigError, match="expected a YAML file after --config, got none"):
        run("--data", "d", "--config")


def test_saved_yaml_is_plain(tmp_path: Path) -> None:
    """Readable by anything that reads YAML: no Python tags."""
    save_config(tmp_path / "config.yaml", EXAMPLE, "run")
    document: Any = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert document["model"] == {"name": "ViT-B-32", "tag": "openai", "quick": True}
    assert document["train"]["out"] == "x y"
    assert document["train"]["betas"] == [0.5, 0.6]


@pytest.mark.filterwarnings("error")
def test_the_default_number_of_workers_is_one_that_pytorch_does_not_warn_of() -> None:
    assert 1 <= default_workers() <= 4
    DataLoader(range(3), num_workers=default_workers())  # type: ignore[arg-type]


def test_a_file_of_another_command_is_told_as_such(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    save_config(file, Train(), "train")
    with pytest.raises(ConfigError, match=r"config\.yaml is of fastsds train, expected one of fastsds run$"):
        parse(Run, ["--config", str(file)], command="run")
