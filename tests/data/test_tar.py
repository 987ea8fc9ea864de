from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from fastsds.data.tar import tar_members

NAMES = [
    "0.txt",
    "folder/1.jpg",
    "f" * 90 + "/" + "g" * 60 + ".png",  # too long for the name's field
    "h" * 240 + ".json",  # and for ustar's prefix
    "größe/ø.webp",
    "two\nlines é.txt",
    "last",
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_pythons_tarfile_finds_them(tmp_path: Path, form: int) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as file:
        for size, name in zip((0, 1, 511, 512, 513, 514, 5000), NAMES, strict=True):
            if form == tarfile.USTAR_FORMAT and len(name) > 200:
                continue
            folder = tarfile.TarInfo("folder of " + name[:5])
            folder.type = tarfile.DIRTYPE
            file.addfile(folder)
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, 1700000000.5
            if form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "of two lines\n9 path=x", "size": str(size)}
            file.addfile(member, io.BytesIO(bytes([size % 251]) * size))
    with tarfile.open(path) as file:
        expected = [(member.name, member.offset_data, member.size) for member in file if member.isfile()]
    with path.open("rb") as opened:
        assert [tuple(member) for member in tar_members(opened, path)] == expected
    assert len(expected) >= 5
