from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from fastsds.data import DataError, collate_captions
from fastsds.data.webdataset import expand_shards


def _write(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1700000000.25  # webdataset writes such times, in pax headers
            shard.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path, pictures: Any) -> Path:
    """Two shards as img2dataset writes them (jpg, txt, json); the second has captions in json alone."""
    first = {}
    for number, kind in enumerate(("png", "webp", "jpeg")):
        suffix = {"png": "png", "webp": "webp", "jpeg": "jpg"}[kind]
        first[f"00000{number}.{suffix}"] = pictures.encoded(number, kind)
        first[f"00000{number}.json"] = json.dumps({"caption": "not this", "width": 24}).encode()
        first[f"00000{number}.txt"] = f"picture {number}".encode()
    second = {}
    for number in (3, 4):
        second[f"part.a/00000{number}.PNG"] = pictures.encoded(number)
        second[f"part.a/00000{number}.json"] = json.dumps({"caption": f"picture {number}", "url": "x"}).encode()
    _write(tmp_path / "shards" / "000.tar", first)
    _write(tmp_path / "shards" / "001.tar", second)
    return tmp_path / "shards"


@pytest.mark.parametrize("pattern", ["", "/{000..001}.tar", "/*.tar", "/00{0,1}.tar", "/{000,001}.tar"])
def test_pairs_come_in_the_order_of_the_shards(
    shards: Path, load: Any, colours: Any, pictures: Any, pattern: str
) -> None:
    rows = colours(load(f"{shards}{pattern}"))
    assert [caption for _, caption in rows] == [f"picture {number}" for number in range(5)]
    for number, (colour, _) in enumerate(rows):
        assert max(abs(a - b) for a, b in zip(colour, pictures.colour(number), strict=True)) <= 4  # JPEG, WebP


def test_braces_multiply_and_keep_their_zeros(tmp_path: Path) -> None:
    names = ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]
    for name in names:
        (tmp_path / f"{name}.tar").touch()
    assert [path.stem for path in expand_shards(f"{tmp_path}/{{a,b}}-{{08..10}}.tar")] == names


def test_samples_without_image_or_caption_are_left_out(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    members = {
        "0.png": pictures.encoded(0),
        "1.txt": b"alone",
        "2.seg.png": pictures.encoded(1),
        "2.txt": b"two",
        "2.png": pictures.encoded(2),
        "3.png": pictures.encoded(3),
        "3.json": b'{"caption": null}',
    }
    assert colours(load(_write(tmp_path / "a.tar", members))) == [(pictures.colour(2), "two")]


def test_a_sample_may_have_several_captions(tmp_path: Path, load: Any, colours: Any, pictures: Any) -> None:
    members = {
        "./0.png": pictures.encoded(0),
        "./0.json": json.dumps({"captions": ["first ", None, "", "second"]}).encode(),
        "./1.png": pictures.encoded(1),
        "./1.json": json.dumps({"captions": "only"}).encode(),
        "./2.png": pictures.encoded(2),
        "./2.json": json.dumps({"captions": []}).encode(),
    }
    path = _write(tmp_path / "a.tar", members)
    expected = [(pictures.colour(0), "first"), (pictures.colour(0), "second"), (pictures.colour(1), "only")]
    assert colours(load(path, caption_column="captions", captions_per_image="all")) == expected
    assert len(load(path, caption_column="captions")) == 2


def test_workers_read_the_same_as_one_process(shards: Path, load: Any) -> None:
    dataset = load(shards)
    batches = [
        [(batch["images"].tolist(), batch["captions"]) for batch in loader]
        for loader in (
            DataLoader(dataset, 2, collate_fn=collate_captions),
            DataLoader(dataset, 2, collate_fn=collate_captions, num_workers=2),
        )
    ]
    assert batches[0] == batches[1] and len(batches[0]) == 3


def test_missing_shards_are_named(shards: Path, load: Any) -> None:
    with pytest.raises(DataError, match=r"path: expected shards \(\*\.tar\) at .*002\.tar, got none"):
        load(f"{shards}/{{000..002}}.tar")
    with pytest.raises(DataError, match=r"path: expected shards \(\*\.tar\) at .*b\*\.tar, got none"):
        load(f"{shards}/b*.tar")
    with pytest.raises(DataError, match=r"path: expected shards \(\*\.tar\) at s3://bucket/000\.tar, got none"):
        load("s3://bucket/000.tar")


def test_a_wrong_key_of_the_caption_leaves_no_pairs(shards: Path, load: Any) -> None:
    with pytest.raises(
        DataError, match=r"path: expected images with captions \(\.txt, or 'text' in \.json\) in .*001\.tar, got none"
    ):
        load(shards / "001.tar", caption_column="text")


def test_truncated_image_is_named(tmp_path: Path, load: Any, pictures: Any) -> None:
    path = _write(tmp_path / "a.tar", {"0.png": pictures.encoded(0)[:-30], "0.txt": b"zero"})
    with pytest.raises(DataError, match=r"image: .*a\.tar:0\.png cannot be read \(.*\); replace it"):
        load(path)[0]


@pytest.mark.parametrize("kept", [0, 300, 512, 700, 1024, 2047, 2048, 2300])  # bytes
def test_truncated_shards_are_named(tmp_path: Path, load: Any, pictures: Any, kept: int) -> None:
    path = _write(tmp_path / "a.tar", {"0.png": pictures.encoded(0), "0.txt": b"zero"}, tarfile.USTAR_FORMAT)
    content = path.read_bytes()
    assert content.count(b"ustar") == 2 and not any(content[4 * 512 :])  # two headers, two blocks of data, zeros
    path.write_bytes(content[:kept])
    with pytest.raises(DataError, match=rf"path: .*a\.tar is truncated: it ends at byte {kept} of more; fetch or"):
        load(path)


def test_files_that_are_no_shards_are_named(tmp_path: Path, load: Any, pictures: Any) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as shard:
        shard.addfile(tarfile.TarInfo("0.txt"))
    with pytest.raises(DataError, match=r"path: .*a\.tar is compressed, .*: gunzip it first"):
        load(path)
    path = path.rename(tmp_path / "a.tar.gz")
    with pytest.raises(DataError, match=r"path: .*a\.tar\.gz is compressed, .*: gunzip it first"):
        load(path)
    path = tmp_path / "a.tar"
    path.write_bytes(b"of another kind" + bytes(600))
    with pytest.raises(DataError, match=r"path: .*a\.tar is no uncompressed tar file: no header at byte 0"):
        load(path)
    _write(path, {"0.png": pictures.encoded(0), "0.json": b'{"caption": "x"'})
    with pytest.raises(DataError, match=r"path: .*a\.tar:0\.json cannot be read as a caption: "):
        load(path)
    _write(path, {"0.png": pictures.encoded(0), "0.txt": "é".encode("latin-1")})
    with pytest.raises(DataError, match=r"path: .*a\.tar:0\.txt cannot be read as a caption: .*utf-8"):
        load(path)


def test_empty_shards_and_folders_are_named(tmp_path: Path, load: Any) -> None:
    with pytest.raises(DataError, match=r"path: expected images with captions .* in .*a\.tar, got none"):
        load(_write(tmp_path / "a.tar", {}))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"path: expected shards \(\*\.tar\) at .*none, got none"):
        load(tmp_path / "none", format="webdataset")
