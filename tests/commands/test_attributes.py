"""`fastsds attributes` beside the labeller, which tests/data has: its record of what was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastsds import cli
from fastsds.data import attributes
from fastsds.data.attributes import AttributesConfig


def _stopped(config: AttributesConfig) -> None:
    """A labeller that is killed after its first answer, or before it."""
    if config.model != "none":
        config.out.write_text('{"path": "a", "attribute": "red"}\n', encoding="utf-8")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "b/b", "--question", "What is it?"], "question: {out} holds answers of 'Which {{classname}}?', g"),
        (
            ["--model", "c/c", "--question", "Which {classname}?"],
            "model: {out} holds answers of 'b/b', got 'c/c'; name",
        ),
    ],
)
def test_answers_to_different_questions_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(attributes, "run_attributes", _stopped)
    out = tmp_path / "attributes.jsonl"
    words = ["attributes", "--images", str(tmp_path), "--out", str(out)]
    asked = ["--model", "b/b", "--question", "Which {classname}?"]
    assert cli.main([*words, "--model", "none"]) == 130  # it came to nothing, and leaves nothing
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, *asked]) == 130
    assert cli.main([*words, *asked, "--batch-size", "2"]) == 130  # goes on
    capsys.readouterr()
    assert cli.main([*words, *options]) == 1
    assert message.format(out=out) in capsys.readouterr().err
