"""EPUB: a zip of XHTML, opened without trusting it.

Nothing is ever unpacked to a disk; texts are read in memory. Even so an archive is refused whole when one of its
names would leave a folder, is a link or a device, or comes twice, and when it would swell beyond what a book can be:
such a file is not a book, whatever else is in it.
"""

from __future__ import annotations

import io
import posixpath
import stat
import zipfile
import zlib
from collections.abc import Sequence

from ..errors import IntegrityError
from .opf import Package, package, xml_root

__all__ = ["epub_texts"]

_MOST_FILES, _MOST_BYTES, _MOST_TEXT = 10_000, 1 << 30, 64 << 20
_CONTAINER = "META-INF/container.xml"
_KINDS = (stat.S_IFREG, stat.S_IFDIR, 0)


def epub_texts(data: bytes) -> tuple[Package, Sequence[bytes]]:
    """The package of an EPUB and its texts in reading order.

    Raises:
        IntegrityError: no EPUB, unsafe, protected, or damaged.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check(archive)
            root = xml_root(_member(archive, _CONTAINER))
            place = next((e.get("full-path") or "" for e in root.iter() if e.tag.endswith("}rootfile")), "")
            book = package(_member(archive, place))
            names = [posixpath.normpath(posixpath.join(posixpath.dirname(place), n)) for n in book.documents]
            _check_open(archive, names)
            texts, total = [], 0
            for name in names:
                texts.append(_member(archive, name))
                total += len(texts[-1])
                if total > _MOST_TEXT:
                    raise _unsafe(f"its texts are larger than {_MOST_TEXT:,} bytes")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise IntegrityError("the EPUB cannot be opened", why=str(error), code="truncated") from error
    return book, texts


def _check(archive: zipfile.ZipFile) -> None:
    """Refuse an archive with a name that is not an inner path of its own, or one that would swell."""
    rows = archive.infolist()
    if len(rows) > _MOST_FILES or sum(row.file_size for row in rows) > _MOST_BYTES:
        raise _unsafe(f"{len(rows):,} files of {sum(row.file_size for row in rows):,} bytes")
    seen: set[str] = set()
    for row in rows:
        name = row.orig_filename
        parts = name.replace("\\", "/").rstrip("/").split("/")
        if "\0" in name or ":" in parts[0] or any(part in ("", ".", "..") for part in parts):
            raise _unsafe(f"the name {name!r} leads out of it")
        if stat.S_IFMT(row.external_attr >> 16) not in _KINDS:
            raise _unsafe(f"{name!r} is a link or a device")
        if name.casefold() in seen:
            raise _unsafe(f"{name!r} is in it twice")
        seen.add(name.casefold())


def _check_open(archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    """Refuse a book whose texts are encrypted; obfuscated fonts are of no concern."""
    if "META-INF/encryption.xml" not in archive.namelist():
        return
    root = xml_root(_member(archive, "META-INF/encryption.xml"))
    locked = {e.get("URI") for e in root.iter() if e.tag.endswith("}CipherReference")}
    if locked & set(names):
        raise IntegrityError(
            "the EPUB is protected (DRM)",
            why="its texts are encrypted",
            fix="import a copy without protection, if you may have one",
            code="protected",
        )


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """One file, never more than it said it would be, nor more than a text may be."""
    try:
        row = archive.getinfo(name)
    except KeyError:
        raise IntegrityError(f"the EPUB holds no {name!r}", why="its own index names it", code="truncated") from None
    if row.file_size > _MOST_TEXT:
        raise _unsafe(f"{name!r} is {row.file_size:,} bytes large")
    with archive.open(row) as stream:
        data = stream.read(row.file_size + 1)
    if len(data) != row.file_size:
        raise _unsafe(f"{name!r} is not as large as it says")
    return data


def _unsafe(why: str) -> IntegrityError:
    return IntegrityError(
        "the archive is not safe to open", why=why, fix="get the file from another place", code="unsafe-archive"
    )
