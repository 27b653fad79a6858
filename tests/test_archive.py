"""Archive.org: records as they really are, lent and dark items, and the text of a scan."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from greatctl.corpus.archive import Archive
from greatctl.corpus.cuts import Cleaner
from greatctl.corpus.gutenberg import Gutenberg
from greatctl.corpus.manual import ByHand
from greatctl.corpus.pages import rejoined, without_pages
from greatctl.errors import IntegrityError, ManifestError
from greatctl.extend.testing import check_source, sample_entry

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror"
needs_mirror = pytest.mark.skipif(not MIRROR.is_dir(), reason="the folder of real texts (../shared/mirror) is not here")
TEXT = b"He rose early and he wrote it down.\n\nThen he slept.\n"


def record(**changes: Any) -> dict[str, Any]:
    """An item's record in the shape of the real ones: numbers are strings."""
    row = {
        "name": "item00_djvu.txt",
        "format": "DjVuTXT",
        "size": str(len(TEXT)),
        "md5": hashlib.md5(TEXT).hexdigest(),
        "sha1": hashlib.sha1(TEXT).hexdigest(),
        **changes.pop("row", {}),
    }
    meta = {"identifier": "item00", "collection": "americana", "mediatype": "texts", **changes.pop("metadata", {})}
    return {"metadata": meta, "files": [{"name": "item00_jp2.zip", "size": "9"}, row], **changes}


def located(answer: Any, **fields: Any) -> Any:
    data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return Archive().locate(sample_entry("archive", **{"ia": "item00", **fields}), lambda url: data)


def test_the_text_is_named_with_the_size_and_hashes_of_the_record() -> None:
    asked: list[str] = []

    def get(url: str) -> bytes:
        asked.append(url)
        return json.dumps(record()).encode()

    (resource,) = Archive().locate(sample_entry("archive", ia="item00"), get)
    assert asked == ["https://archive.org/metadata/item00"]
    assert resource.url == "https://archive.org/download/item00/item00_djvu.txt"
    assert (resource.size, resource.sha1) == (len(TEXT), hashlib.sha1(TEXT).hexdigest())
    assert resource.md5 == hashlib.md5(TEXT).hexdigest() and resource.filename == "original.txt"


def test_a_text_under_another_name_is_found_by_its_format_and_a_file_of_the_manifest_by_its_name() -> None:
    (resource,) = located(record(row={"name": "other one_djvu.txt"}))
    assert resource.url.endswith("/other%20one_djvu.txt")
    with pytest.raises(IntegrityError, match="item00") as e:
        located(record(), file="missing.txt")
    assert "its texts: item00_djvu.txt" in e.value.why


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ({}, "unknown-item"),
        (b"<!DOCTYPE html><html><body>Overloaded</body></html>", "not-a-record"),
        ([], "not-a-record"),
        ({"result": []}, "not-a-record"),
        (record(metadata={"identifier": "another"}), "not-a-record"),
        (record(files=[]), "no-text"),
        (record(row={"size": "many"}), "not-text"),
        (record(row={"size": "999999999999"}), "not-text"),
        (record(row={"md5": None, "sha1": None}), "not-text"),
        (record(row={"md5": "../../x"}), "not-text"),
    ],
)
def test_what_is_no_record_of_a_text_is_refused_with_a_code(answer: Any, code: str) -> None:
    with pytest.raises(IntegrityError) as e:
        located(answer)
    assert e.value.name == code and "item00" in e.value.message


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"is_dark": True, "metadata": {"identifier": "item00"}}, "taken away"),
        (record(row={"private": "true"}), "private"),
        (record(metadata={"access-restricted-item": "true"}), "private"),
        (record(metadata={"collection": ["books", "inlibrary"]}), "'inlibrary'"),
        (record(metadata={"collection": "printdisabled"}), "'printdisabled'"),
    ],
)
def test_lent_and_dark_items_are_a_persons_affair_with_the_reason(answer: Any, why: str) -> None:
    with pytest.raises(ByHand) as e:
        located(answer)
    assert why in e.value.why


def test_an_identifier_that_could_lead_elsewhere_is_a_manifest_error() -> None:
    for item in ("a/b", "a?b", "", "-a"):
        with pytest.raises(ManifestError):
            Archive().locate(sample_entry("archive", ia=item or None), lambda url: b"{}")


def test_archive_keeps_the_contract_of_sources() -> None:
    records = {"https://archive.org/metadata/item00": json.dumps(record()).encode()}
    check_source(Archive, sample_entry("archive", ia="item00"), {"original.txt": TEXT}, records=records)


PAGE = (
    "Digitized by the Internet Archive\nin 2008 with funding from\nA Library\n\n^1\n\n"
    "THE SHOP. 1\n\nThe carpenter put on his spec-\ntacles and read the letter of the well-known man\n\n"
    "twice before he said a word to any-\n\n2 THE SHOP.\n\n"
    "body in the shop, which was well-\nknown for its silence and its good tables.\n\n12\n\n"
    "THE SH0P. 3\n\nThey all were silent then,\n\n13\n\nTHE SHOP. 4\n\nand so was he.\n\n14\n"
)


def test_stamps_heads_and_page_numbers_go_and_words_and_paragraphs_are_mended() -> None:
    cleaner = Cleaner()
    text = rejoined(without_pages(PAGE, cleaner), cleaner)
    cut = Counter(piece.rule for piece in cleaner.removed)
    assert set(cut) == {"stamp", "noise", "running-head", "page-number", "hyphen"}
    assert "spectacles and read" in text and "anybody in the shop" in text
    assert text.count("well-known") == 2 and "SH" not in text and "Library" not in text
    assert re.sub(r"\s+", " ", text).endswith("They all were silent then, and so was he.")


def test_years_and_sums_at_line_ends_are_no_running_heads() -> None:
    table = "Wheat 12\nBarley 40\nOats 7\nWheat 3\nWheat 1\n\nIt was the year 1812\nand then came the year 1813.\n"
    assert without_pages(table, Cleaner()) == table


@needs_mirror
@pytest.mark.parametrize(("item", "pg"), [("sample-waytowealth00fran", 43855), ("sample-farewelladdress00wash", 11314)])
def test_the_words_of_a_scan_are_those_of_the_book_but_for_what_was_misread(item: str, pg: int) -> None:
    data = (MIRROR / f"archive/download/{item}/{item}_djvu.txt").read_bytes()
    text = Archive().read(sample_entry("archive", ia=item), {"original.txt": data}).text
    book = (MIRROR / f"gutenberg/cache/epub/{pg}/pg{pg}.txt").read_bytes()
    true = Gutenberg().read(sample_entry("gutenberg", pg=pg), {"original.txt": book}).text
    words: Callable[[str], Counter[str]] = lambda t: Counter(re.findall(r"[a-z]+", t.lower()))  # noqa: E731
    strange = words(text) - words(true)
    assert strange.total() <= 0.003 * words(text).total(), strange  # letters that the scan has wrong
    assert "Digitized" not in text and "- " not in text and "\n\n\n" not in text
    assert text.count("\n") <= 8  # prose is joined into paragraphs
