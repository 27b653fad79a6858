"""Fetching every kind of work over the loopback mirror: scans, ebooks, shared files, changes, imports, accounts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from greatctl import manifest
from greatctl.errors import IntegrityError
from greatctl.stages import fetch
from tests.test_fetch import AUNT, MANUAL, PATH, SMALL, Bench, Mirror, bench, leftovers, mirror, row, server  # noqa: F401
from tests.test_import import BOOK, epub

ITEMS = Path(__file__).with_name("mirror_items.toml")
FETCHED = ["farewell-scan", "wealth-scan", "confession", "troubled-world", "troubled-world-again"]
# ruff: noqa: F811  (fixtures of test_fetch)


@pytest.fixture
def items(bench: Bench) -> Bench:
    """A project with a work of every kind."""
    bench.manifest = manifest.load(ITEMS)
    return bench


def states(result: Any) -> dict[str, str]:
    return {r["id"]: r["status"] for r in result.summary["sources"]}


def test_every_kind_is_fetched_from_nothing_and_then_nothing_moves(items: Bench, mirror: Mirror) -> None:
    result = items.run(mirror=mirror.url)
    assert states(result) == {
        **dict.fromkeys(FETCHED, "fetched"),
        "lent-item": "manual", "dark-item": "manual", "unknown-item": "failed",
    }  # fmt: skip
    assert result.exit_code == 11 and leftovers(items.root) == []
    assert "is only lent out" in row(result, "lent-item")["why"] and "is dark" in row(result, "dark-item")["why"]
    assert "borrow it from the library" in row(result, "lent-item")["get"]
    assert row(result, "unknown-item")["code"] == "unknown-item"
    before = items.bytes()
    mirror.reset()
    again = items.run(source=FETCHED, mirror=mirror.url)
    assert (again.exit_code, again.up_to_date, mirror.log()) == (0, True, [])
    assert items.bytes() == before


def test_a_scan_is_held_against_size_md5_and_sha1_and_its_chain_is_canonical(items: Bench, mirror: Mirror) -> None:
    items.run(source=["farewell-scan"], mirror=mirror.url)
    meta = json.loads((items.folder("farewell-scan") / "metadata.json").read_text("utf-8"))
    assert meta["url_chain"][0].startswith("https://archive.org/download/sample-farewelladdress00wash/")
    assert "127.0.0.1" not in json.dumps(meta)
    for fault in ("changed", "truncate", "badlength:-10", "robot"):
        mirror.fault(f"/1/items/*={fault}")
        with pytest.raises(IntegrityError) as e:
            items.run(source=["wealth-scan"], mirror=mirror.url)
        assert "record describes" in e.value.message and e.value.exit_code == 6
        assert not items.folder("wealth-scan").exists()
    mirror.fault("/metadata/*=robot")
    with pytest.raises(IntegrityError):
        items.run(source=["wealth-scan"], mirror=mirror.url)
    mirror.reset()
    assert items.run(source=["wealth-scan"], mirror=mirror.url).exit_code == 0


def test_an_ebook_of_many_files_resumes_at_the_file_where_it_stopped(items: Bench, mirror: Mirror) -> None:
    mirror.fault("*/chapter-10.xhtml=404@1")
    with pytest.raises(Exception, match="404"):
        items.run(source=["confession"], mirror=mirror.url)
    mirror.reset()
    items.run(source=["confession"], mirror=mirror.url)
    asked = [r["path"].rsplit("/", 1)[-1] for r in mirror.log()]
    assert asked[:2] == ["content.opf", "chapter-10.xhtml"] and "chapter-9.xhtml" not in asked
    folder = items.folder("confession")
    assert len(list(folder.glob("original*"))) == 23 and leftovers(items.root) == []


def test_two_works_with_one_address_make_one_download(items: Bench, mirror: Mirror) -> None:
    items.run(source=["troubled-world", "troubled-world-again"], mirror=mirror.url)
    assert [r["path"] for r in mirror.log()] == [PATH[SMALL]]
    mirror.reset()
    items.run(source=["troubled-world", "troubled-world-again"], mirror=mirror.url, force=True)
    assert len(mirror.log()) == 1
    first, second = (items.folder(name) / "original.txt" for name in ("troubled-world", "troubled-world-again"))
    assert first.read_bytes() == second.read_bytes()


def test_an_update_asks_for_changes_only_and_what_did_not_change_is_not_sent(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    before = bench.bytes()
    seen = json.loads((bench.root / "sources.lock.json").read_text("utf-8"))["sources"]
    mirror.reset()
    result = bench.run(source=[SMALL, AUNT], mirror=mirror.url, update=True)
    assert result.up_to_date and bench.bytes() == before
    tags = [r["headers"]["If-None-Match"] for r in mirror.log()]
    assert tags == [seen[id]["files"]["original.txt"]["etag"] for id in (SMALL, AUNT)]
    (bench.folder(SMALL) / "original.txt").write_bytes(b"damaged")
    mirror.reset()
    bench.run(source=[SMALL], mirror=mirror.url, update=True)
    assert "If-None-Match" not in mirror.log()[0]["headers"] and bench.bytes() == before


def test_what_changed_at_a_source_is_told_in_bytes_hashes_and_lines(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    mirror.fault(f"{PATH[SMALL]}=changed")
    why = row(bench.run(source=[SMALL], mirror=mirror.url, force=True), SMALL)["why"]
    assert "1 lines came and 1 went" in why and "teh" in why and "sha256" in why and "bytes" in why


def test_an_import_records_where_it_is_from_and_under_which_rights_through_every_cleaning(bench: Bench) -> None:
    letters = bench.root / "My Letters.epub"
    letters.write_bytes(epub(BOOK))
    told = {"origin": "the company's site, 3 May", "rights": "for private study"}
    result = bench.run(source=[MANUAL], import_file=letters, **told)
    assert row(result, MANUAL)["status"] == "fetched" and not any("not said" in line for line in bench.said)
    meta = bench.folder(MANUAL) / "metadata.json"
    wanted = {"file": "My Letters.epub", **told}
    assert json.loads(meta.read_text("utf-8"))["import"] == wanted
    assert row(bench.run(source=[MANUAL]), MANUAL)["status"] == "up-to-date"
    (bench.folder(MANUAL) / "text.txt").write_text("spoilt")
    assert row(bench.run(source=[MANUAL]), MANUAL)["status"] == "fetched"
    assert json.loads(meta.read_text("utf-8"))["import"] == wanted
    bench.run(source=[MANUAL], import_file=letters)
    assert "--origin and --rights" in bench.said[-2] + bench.said[-1]
    assert json.loads(meta.read_text("utf-8"))["import"] == {"file": "My Letters.epub"}


def test_a_lent_item_can_be_brought_by_a_person_and_stays(items: Bench, mirror: Mirror) -> None:
    book = items.root / "book.epub"
    book.write_bytes(epub(BOOK))
    assert row(items.run(source=["lent-item"], import_file=book), "lent-item")["status"] == "fetched"
    result = items.run(source=["lent-item"], mirror=mirror.url, update=True)
    assert row(result, "lent-item")["status"] == "up-to-date" and mirror.log() == []


def test_an_import_that_is_no_text_leaves_the_earlier_one(bench: Bench) -> None:
    good, bad = bench.root / "good.txt", bench.root / "bad.epub"
    good.write_text("He rose early, and he wrote.\n")
    bad.write_bytes(epub(BOOK)[:-30])
    bench.run(source=[MANUAL], import_file=good)
    before = bench.bytes()
    with pytest.raises(IntegrityError):
        bench.run(source=[MANUAL], import_file=bad)
    assert bench.bytes() == before


def test_proxies_of_the_environment_are_told_of_and_not_used(
    bench: Bench, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert bench.run(source=[SMALL], mirror=mirror.url).exit_code == 0  # nobody listens at the proxy's address
    fetch._tell_beforehand(bench.context(), fetch.Config(contact="me@example.org"), downloads=True)
    assert "HTTPS_PROXY is set and not used" in bench.said[-1]


def test_the_audit_accounts_for_every_work_on_disk_without_a_connection(items: Bench, mirror: Mirror) -> None:
    items.run(mirror=mirror.url)
    mirror.reset()
    result = items.run(source=[*FETCHED, "lent-item"], audit=True, mirror=mirror.url)
    rows: Any = {r["id"]: r for r in result.summary["audit"]}  # type: ignore[attr-defined]
    assert set(rows) == set(FETCHED) and mirror.log() == [] and result.exit_code == 11
    for name, audited in rows.items():
        text = (items.folder(name) / "text.txt").stat().st_size
        size = sum(p.stat().st_size for p in items.folder(name).glob("original*"))
        assert (audited["bytes_in"], audited["kept"], audited["licence"]) == (size, text, 0), audited
    assert rows["troubled-world"]["removed_by_rule"]["footer"] > 10_000
    assert rows["farewell-scan"]["removed_by_rule"]["running-head"] > 100
    assert rows["troubled-world"]["unaccounted"] == rows["farewell-scan"]["unaccounted"] == 0
    (items.folder("wealth-scan") / "text.txt").write_text("not what the rules make of it\n")
    spoilt = items.run(source=["wealth-scan"], audit=True)
    assert row(spoilt, "wealth-scan")["status"] == "failed" and spoilt.exit_code == 11
    (items.folder("wealth-scan") / "text.txt").unlink()
    gone = row(items.run(source=["wealth-scan"], audit=True), "wealth-scan")
    assert (gone["status"], "text.txt is gone" in gone["why"]) == ("failed", True)


def test_the_estimate_tells_the_manifest_the_disk_and_the_missing_apart(items: Bench, mirror: Mirror) -> None:
    items.run(source=["confession"], mirror=mirror.url)
    summary: Any = items.run(estimate=True).summary
    totals = summary["totals"]
    text = (items.folder("confession") / "text.txt").stat().st_size
    assert (totals["on_disk"]["sources"], totals["on_disk"]["text_bytes"]) == (1, text)
    for key in ("sources", "text_bytes"):
        assert totals["on_disk"][key] + totals["missing"][key] == totals["manifest"][key]
    assert totals["on_disk"]["activation_bytes_per_layer"] == totals["on_disk"]["tokens"] * 2 * summary["d_model"]
    items.manifest = items.manifest.model_copy(update={"tables": {"model": {"name": "bundled"}}})
    assert items.run(estimate=True).summary["d_model"] != summary["d_model"] == 4096
    assert items.run(estimate=True, d_model=77).summary["d_model"] == 77
