"""What the hub is asked, and how often; nothing here reaches it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError

from fastsds import ClipSource, TeacherSource
from fastsds.clip import ClipSourceError
from fastsds.clip.locate import Location, locate
from fastsds.hub import NotOnHubError, is_fetched, require_on_hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a hub that cannot be reached."""
    urls: list[str] = []

    def unreachable(url: str) -> None:
        urls.append(url)
        raise ConnectionError("no route\nto host")

    def retrying(*_: object, **__: object) -> None:
        raise AssertionError("asks again and again")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", retrying)
    monkeypatch.setattr("diffusers.configuration_utils.hf_hub_download", retrying)
    return urls


def _fetch(cache: Path, identifier: str, filename: str) -> None:
    """Leaves what a download leaves."""
    snapshot = cache / f"models--{identifier.replace('/', '--')}" / "snapshots" / ("0" * 40)
    (snapshot.parents[1] / "refs").mkdir(parents=True)
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / filename).touch()


def test_what_was_fetched(tmp_path: Path) -> None:
    _fetch(tmp_path, "org/model", "config.json")
    assert is_fetched("org/model", "config.json", tmp_path)
    assert not is_fetched("org/model", "other.json", tmp_path)
    assert not is_fetched("org/other", "config.json", tmp_path)


def test_an_unreachable_hub_is_asked_once(asked: list[str]) -> None:
    with pytest.raises(NotOnHubError, match=r"^no route to host$"):
        require_on_hub("org/model", "config.json")
    assert [url.split("/resolve/")[0].rsplit("/", 2)[-2:] for url in asked] == [["org", "model"]]


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (lambda: ClipSource("org/none").load(), ClipSourceError, "name: org/none is no folder, nothing of it was"),
        (lambda: TeacherSource("org/none").load(), OSError, "source: org/none is no folder, and as a hub id it could"),
    ],
)
def test_an_id_that_there_is_not_fails_at_once(
    asked: list[str], load: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}.*no route to host$"):
        load()
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("filename", "kind", "place"),
    [("open_clip_config.json", "open_clip", "hf-hub:org/model"), ("config.json", "transformers", "org/model")],
)
def test_fetched_models_are_found_without_the_hub(
    asked: list[str], tmp_path: Path, filename: str, kind: str, place: str
) -> None:
    _fetch(tmp_path, "org/model", filename)
    assert locate("org/model", None, tmp_path) == Location(kind, place)  # type: ignore[arg-type]


@pytest.mark.parametrize(("absent", "kind"), [(True, "transformers"), (False, "open_clip")])
def test_the_hub_says_which_kind_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, absent: bool, kind: str
) -> None:
    def answer(url: str) -> None:
        assert url.endswith("/org/model/resolve/main/open_clip_config.json")
        if absent:
            raise EntryNotFoundError("404")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", answer)
    assert locate("org/model", None, tmp_path).kind == kind
