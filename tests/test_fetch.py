"""The fetch stage against a real server with faults, and what is on disk after each of them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from greatctl import manifest
from greatctl.corpus import raw
from greatctl.errors import (
    InputError,
    IntegrityError,
    InterruptedRun,
    LockedError,
    ManifestError,
    NetworkError,
    PluginError,
    UsageError,
)
from greatctl.events import Event, Run, StopRequest
from greatctl.extend.contracts import Document, Resource
from greatctl.extend.manager import Plugins, load_plugins
from greatctl.stages import fetch
from greatctl.stages.context import Context, Project, Result
from greatctl.store import artifact
from greatctl.store.artifact import load
from greatctl.store.lock import hold

ROOT = Path(__file__).resolve().parents[1]
SERVE = ROOT.parent / "shared" / "mirror" / "serve.py"
SMALL = "eroosevelt-this-troubled-world"  # 65 kB
AUNT = "aunt-sammy"
MANUAL = "buffett-berkshire-letters"
BOOKS = SERVE.parent / "gutenberg"
PATH = {SMALL: "/cache/epub/65731/pg65731.txt", AUNT: "/cache/epub/65379/pg65379.txt"}


def original(path: str) -> tuple[int, str]:
    """Size and sha256 of a file of the mirror."""
    data = (BOOKS / path.lstrip("/")).read_bytes()
    return len(data), hashlib.sha256(data).hexdigest()


class Mirror:
    """The test server: its address, its faults, its log."""

    def __init__(self, url: str) -> None:
        self.url = url

    def _post(self, path: str, body: str = "") -> None:
        urllib.request.urlopen(urllib.request.Request(self.url + path, data=body.encode(), method="POST")).close()

    def reset(self) -> None:
        self._post("/__reset")

    def fault(self, *specs: str) -> None:
        self._post("/__faults", "\n".join(specs))

    def log(self) -> list[dict[str, Any]]:
        with urllib.request.urlopen(self.url + "/__log") as answer:
            return json.load(answer)


@pytest.fixture(scope="module")
def server() -> Iterator[Mirror]:
    if not SERVE.is_file():
        pytest.skip("the test server (../shared/mirror/serve.py) is not here")
    process = subprocess.Popen([sys.executable, str(SERVE)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield Mirror(process.stdout.readline().strip())
    process.terminate()
    process.wait()


@pytest.fixture
def mirror(server: Mirror) -> Mirror:
    server.reset()
    return server


@functools.cache
def packaged() -> manifest.Manifest:
    """The manifest that greatctl carries."""
    return manifest.load(manifest.packaged_path())


@functools.cache
def built_ins() -> Plugins:
    """No plugin but greatctl's own items."""
    return load_plugins(folder=None, enabled=False)


class Bench:
    """A project folder and a way to run the stage in it; `said` gathers its notices."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = packaged()
        self.plugins: Any = built_ins()
        self.said: list[str] = []
        self.events: list[Event] = []
        self.stop = StopRequest()

    def hear(self, event: Event) -> None:
        self.events.append(event)
        if event.kind == "notice":
            self.said.append(event.message)

    def context(self, **options: Any) -> Context:
        project = Project(self.root, self.manifest, self.root / "data", self.root / "results")
        return Context(project, self.plugins, Run("fetch", self.hear, self.stop), **options)

    def run(
        self,
        *,
        origins: dict[str, object] | None = None,
        force: bool = False,
        offline: bool = False,
        **settings: Any,
    ) -> Result:
        return fetch.run(self.context(origins=origins or {}, force=force, offline=offline), fetch.Config(**settings))

    def folder(self, source: str) -> Path:
        return self.root / "data" / "raw" / source

    def bytes(self) -> dict[str, str]:
        """Every file but run.json, locks excluded: path -> sha256."""
        files = (p for p in sorted(self.root.rglob("*")) if p.is_file() and not p.name.endswith(".lock"))
        return {
            p.relative_to(self.root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in files
            if p.name != "run.json"
        }


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    slept: list[float] = []
    monkeypatch.setattr(fetch, "_patient", lambda run: slept.append)  # waits are noted, not waited
    monkeypatch.setattr(artifact, "versions", dict)  # looking up what is installed takes longer than a small fetch
    bench = Bench(tmp_path)
    bench.slept = slept  # type: ignore[attr-defined]
    return bench


def row(result: Result, source: str) -> dict[str, Any]:
    rows: Any = result.summary["sources"]
    return next(r for r in rows if r["id"] == source)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if re.search(r"\.part|\.partial|\.tmp|\.downloads|\.old", p.name)]


def test_a_source_is_fetched_into_a_sealed_folder_with_its_history(bench: Bench, mirror: Mirror) -> None:
    result = bench.run(source=[SMALL], mirror=mirror.url)
    assert (result.exit_code, result.artifact) == (0, bench.root / "data" / "raw")
    assert set(result.summary) == {"sources", "text_bytes", "tokens_estimate", "activation_bytes_per_layer"}
    size, digest = original(PATH[SMALL])
    assert row(result, SMALL) == {
        "id": SMALL, "character": "eleanor-roosevelt", "role": "character", "status": "fetched",
        "bytes": size, "sha256": digest,
    }  # fmt: skip
    folder = bench.folder(SMALL)
    assert {p.name for p in folder.iterdir()} == {
        "original.txt", "text.txt", "removed.txt", "metadata.json", "artifact.json", "run.json",
    }  # fmt: skip
    assert load(folder).damaged(deep=True) == []
    text = (folder / "text.txt").read_text("utf-8")
    assert "Gutenberg" not in text and len(text) > 40_000
    assert "=== header" in (folder / "removed.txt").read_text("utf-8")
    metadata = json.loads((folder / "metadata.json").read_text("utf-8"))
    assert metadata["url_chain"] == [
        "https://www.gutenberg.org" + PATH[SMALL],
        "https://gutenberg.pglaf.org" + PATH[SMALL],
    ]
    assert metadata["rights"] == "public-domain-us" and metadata["text"]["bytes"] == result.summary["text_bytes"]
    for name in ("metadata.json", "artifact.json"):
        assert not re.search(r"127\.0\.0\.1|20\d\d-\d\d-\d\dT", (folder / name).read_text("utf-8"))
    assert json.loads((folder / "run.json").read_text("utf-8"))["noted"]["mirror"] == mirror.url
    assert leftovers(bench.root) == []


def test_a_second_run_makes_no_connection_and_changes_no_byte(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    before = bench.bytes()
    mirror.reset()
    result = bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    assert result.up_to_date and [r["status"] for r in result.summary["sources"]] == ["up-to-date"] * 2  # type: ignore[attr-defined]
    assert mirror.log() == [] and bench.bytes() == before
    assert bench.run(source=[SMALL], offline=True).exit_code == 0


def test_requests_name_greatctl_the_contact_and_identity_encoding(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL], mirror=mirror.url, contact="me@example.org")
    (request,) = mirror.log()
    assert re.fullmatch(r"greatctl/[\d.]+ \(\+me@example\.org\)", request["headers"]["User-Agent"])
    assert request["headers"]["Accept-Encoding"] == "identity"
    with pytest.raises(ValidationError):
        fetch.Config(contact="me\r\nX-Evil: 1")


def test_a_cut_download_resumes_within_the_run(bench: Bench, mirror: Mirror) -> None:
    mirror.fault(f"{PATH[SMALL]}=cut:20000@1")
    result = bench.run(source=[SMALL], mirror=mirror.url)
    assert row(result, SMALL)["sha256"] == original(PATH[SMALL])[1]
    assert [r["headers"].get("Range") for r in mirror.log()] == [None, "bytes=20000-"]


@pytest.mark.parametrize(
    ("fault", "requests", "slept"),
    [("429:7@2", 3, [7.0, 7.0]), ("503@1", 2, [1.0]), ("badlength:+100@1", 2, [1.0]), ("norange@1", 1, [])],
)
def test_passing_faults_end_well(bench: Bench, mirror: Mirror, fault: str, requests: int, slept: list[float]) -> None:
    mirror.fault(f"{PATH[SMALL]}={fault}")
    assert bench.run(source=[SMALL], mirror=mirror.url).exit_code == 0
    assert len(mirror.log()) >= requests
    assert bench.slept[: len(slept)] == slept  # type: ignore[attr-defined]
    assert row(bench.run(source=[SMALL]), SMALL)["sha256"] == original(PATH[SMALL])[1]


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("robot", "HTML"),
        ("truncate", "END marker"),
        ("404", "404"),
        ("redirect:loop", "circle"),
        ("403", "403"),
    ],
)
def test_lasting_faults_fail_their_source_alone_and_leave_nothing_half_written(
    bench: Bench, mirror: Mirror, fault: str, why: str
) -> None:
    mirror.fault(f"{PATH[SMALL]}={fault}")
    result = bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    assert result.exit_code == 11
    assert row(result, AUNT)["status"] == "fetched"
    assert row(result, SMALL)["status"] == "failed" and why in row(result, SMALL)["why"]
    assert row(result, SMALL)["bytes"] is None and not bench.folder(SMALL).exists()
    mirror.reset()
    assert bench.run(source=[SMALL, AUNT], mirror=mirror.url).exit_code == 0
    assert leftovers(bench.root) == []


def test_a_redirect_to_a_metadata_service_or_another_local_port_is_refused(bench: Bench, mirror: Mirror) -> None:
    for target in ("http://169.254.169.254/latest", "http://127.0.0.1:1/x", "https://www.gutenberg.org/x"):
        mirror.fault(f"{PATH[SMALL]}=redirect:{target}")
        with pytest.raises(NetworkError) as e:
            bench.run(source=[SMALL], mirror=mirror.url)
        assert e.value.exit_code == 7 and target in e.value.why


def test_nothing_obtained_because_of_the_network_is_exit_7_even_beside_manual_sources(
    bench: Bench, mirror: Mirror
) -> None:
    with pytest.raises(NetworkError, match="nothing could be fetched") as e:
        bench.run(source=[SMALL, MANUAL], offline=True, mirror=mirror.url)
    assert "offline" in e.value.why and mirror.log() == []


def test_a_download_that_a_run_left_behind_is_resumed_by_the_next(bench: Bench, mirror: Mirror) -> None:
    mirror.fault(f"{PATH[SMALL]}=cut:30000@1", f"{PATH[SMALL]}=404@1")
    with pytest.raises(NetworkError):
        bench.run(source=[SMALL], mirror=mirror.url)
    mirror.reset()
    bench.run(source=[SMALL], mirror=mirror.url)
    assert mirror.log()[0]["headers"]["Range"] == "bytes=30000-"
    assert leftovers(bench.root) == []


def test_a_stop_request_during_a_download_keeps_what_came(bench: Bench, mirror: Mirror) -> None:
    seen: list[int] = []

    def hear(event: Event) -> None:
        if event.kind == "progress" and event.data.get("unit") == "B" and not seen:
            seen.append(int(str(event.data["done"])))
            bench.stop.request(signal.SIGINT)

    bench.hear = hear  # type: ignore[method-assign]
    with pytest.raises(InterruptedRun):
        bench.run(source=[SMALL], mirror=mirror.url)
    bench.stop = StopRequest()
    mirror.reset()
    bench.run(source=[SMALL], mirror=mirror.url)
    asked = mirror.log()
    assert not asked or asked[0]["headers"]["Range"] == f"bytes={seen[0]}-"


def test_killed_in_the_middle_the_rerun_ends_with_the_bytes_of_an_undisturbed_run(
    bench: Bench, mirror: Mirror, tmp_path_factory: pytest.TempPathFactory
) -> None:
    mirror.fault("*=slow:40000@1")
    program = (
        "import sys, tests.test_fetch as t; from pathlib import Path\n"
        "t.Bench(Path(sys.argv[1])).run(source=[t.SMALL, t.AUNT], mirror=sys.argv[2])"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(bench.root), mirror.url], cwd=ROOT)
    part = bench.root / "data/raw/.downloads" / SMALL / "original.txt.part"
    deadline = time.monotonic() + 20
    while not (part.exists() and part.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = part.stat().st_size
    assert 0 < kept < original(PATH[SMALL])[0] and not bench.folder(SMALL).exists()
    mirror.reset()
    bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    assert mirror.log()[0]["headers"]["Range"] == f"bytes={kept}-"
    other = Bench(tmp_path_factory.mktemp("undisturbed"))
    other.run(source=[SMALL, AUNT], mirror=mirror.url)
    assert bench.bytes() == other.bytes()


def test_a_changed_file_is_reported_and_held_back_until_update(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    before = bench.bytes()
    mirror.fault(f"{PATH[SMALL]}=changed")
    result = bench.run(source=[SMALL], mirror=mirror.url, force=True)
    assert (row(result, SMALL)["status"], result.exit_code) == ("changed", 0)
    assert "--update --source " + SMALL in row(result, SMALL)["why"]
    assert row(result, SMALL)["sha256"] == original(PATH[SMALL])[1] and bench.bytes() == before
    result = bench.run(source=[SMALL], mirror=mirror.url, update=True)
    assert row(result, SMALL)["status"] == "fetched"
    assert " teh " in (bench.folder(SMALL) / "original.txt").read_text("utf-8")
    mirror.reset()
    assert row(bench.run(source=[SMALL], mirror=mirror.url), SMALL)["status"] == "up-to-date"


def test_a_corrupt_file_never_replaces_a_good_one_not_even_with_update(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL, AUNT], mirror=mirror.url)
    before = bench.bytes()
    mirror.fault(f"{PATH[SMALL]}=robot")
    result = bench.run(source=[SMALL, AUNT], mirror=mirror.url, update=True)
    told = row(result, SMALL)
    assert (told["status"], told["code"], told["exit_code"], result.exit_code) == ("failed", "not-text", 6, 11)
    assert told["sha256"] == original(PATH[SMALL])[1] and bench.bytes() == before
    with pytest.raises(IntegrityError) as e:  # where nothing else was obtained, that is what the run ends with
        bench.run(source=[SMALL], mirror=mirror.url, update=True)
    assert e.value.exit_code == 6 and bench.bytes() == before


def test_a_changed_file_with_no_old_one_on_disk_counts_as_missing(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    bench.folder(SMALL).rename(bench.root / "elsewhere")
    mirror.fault(f"{PATH[SMALL]}=changed")
    result = bench.run(source=[SMALL], mirror=mirror.url)
    assert (row(result, SMALL)["status"], result.exit_code) == ("changed", 11)
    assert not bench.folder(SMALL).exists()


def test_a_changed_span_cleans_the_file_on_disk_again_without_a_connection(bench: Bench, mirror: Mirror) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    old = (bench.folder(SMALL) / "text.txt").read_text("utf-8")
    mirror.reset()
    shorter = bench.manifest.entry(SMALL).model_copy(update={"text_from": None, "text_to": None})
    entries = [shorter if e.id == SMALL else e for e in bench.manifest.entries]
    bench.manifest = bench.manifest.model_copy(update={"entries": entries})
    result = bench.run(source=[SMALL], offline=True)
    assert row(result, SMALL)["status"] == "fetched" and mirror.log() == []
    assert len((bench.folder(SMALL) / "text.txt").read_text("utf-8")) > len(old)


@pytest.mark.parametrize(("name", "requests"), [("text.txt", 0), ("original.txt", 1)])
def test_a_damaged_file_is_redone_and_only_a_damaged_original_is_asked_for(
    bench: Bench, mirror: Mirror, name: str, requests: int
) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    before = bench.bytes()
    mirror.reset()
    path = bench.folder(SMALL) / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert row(bench.run(source=[SMALL], mirror=mirror.url), SMALL)["status"] == "fetched"
    assert len(mirror.log()) == requests and bench.bytes() == before


def test_the_lock_file_holds_first_seen_hashes_and_a_broken_one_is_an_integrity_error(
    bench: Bench, mirror: Mirror
) -> None:
    bench.run(source=[SMALL], mirror=mirror.url)
    path = bench.root / raw.LEDGER
    seen = json.loads(path.read_text("utf-8"))["sources"][SMALL]["files"]["original.txt"]
    assert (seen["bytes"], seen["sha256"]) == original(PATH[SMALL]) and seen["etag"]
    path.write_text("{}")
    with pytest.raises(IntegrityError, match="cannot be read"):
        bench.run(source=[SMALL], mirror=mirror.url)


def test_a_manual_source_says_what_to_get_and_the_command_and_import_brings_it_in(bench: Bench) -> None:
    result = bench.run(source=[MANUAL])
    assert result.exit_code == 11 and row(result, MANUAL)["status"] == "manual"
    why = row(result, MANUAL)["why"]
    assert "berkshirehathaway.com" in why and f"greatctl fetch --import FILE --source {MANUAL}" in why
    letter = bench.root / "letter.html"
    letter.write_text("<p>To the shareholders:</p><p>We did not do well, and it was my doing.</p>")
    result = bench.run(source=[MANUAL], import_file=letter)
    assert (row(result, MANUAL)["status"], result.exit_code) == ("fetched", 0)
    folder = bench.folder(MANUAL)
    assert (folder / "original.html").read_bytes() == letter.read_bytes()
    assert (folder / "text.txt").read_text("utf-8").endswith("it was my doing.\n")
    assert row(bench.run(source=[MANUAL]), MANUAL)["status"] == "up-to-date"
    letter.write_text("<p>A second edition.</p>")
    assert row(bench.run(source=[MANUAL], import_file=letter), MANUAL)["status"] == "fetched"
    assert (folder / "text.txt").read_text("utf-8") == "A second edition.\n"


def test_an_import_needs_one_source_an_existing_file_and_a_readable_kind(bench: Bench) -> None:
    letter = bench.root / "letter.docx"
    letter.write_bytes(b"PK\3\4")
    for sources in ([], [MANUAL, SMALL]):
        with pytest.raises(UsageError, match="--import"):
            bench.run(source=sources, import_file=letter)
    with pytest.raises(InputError, match="is not a file"):
        bench.run(source=[MANUAL], import_file=bench.root / "none.txt")
    with pytest.raises(InputError, match=r"\.docx files cannot be imported"):
        bench.run(source=[MANUAL], import_file=letter)
    assert not bench.folder(MANUAL).exists()


def test_unknown_ids_and_mirrors_are_usage_errors_before_anything_happens(bench: Bench) -> None:
    with pytest.raises(UsageError) as e:
        bench.run(character=["darwn"])
    assert "darwin" in e.value.fix
    with pytest.raises(UsageError, match="mirror"):
        bench.run(source=[SMALL], mirror="ftp://x")
    assert list(bench.root.iterdir()) == []


def test_only_a_person_may_name_a_private_mirror(bench: Bench, mirror: Mirror) -> None:
    for origin in ("sources.toml [fetch]", {"value": mirror.url, "origin": "sources.toml [fetch]"}):
        with pytest.raises(ManifestError, match=r"not allowed in sources\.toml"):
            bench.run(source=[SMALL], mirror=mirror.url, origins={"mirror": origin})
    assert mirror.log() == []


def test_a_kind_without_a_source_fails_with_a_word_why(bench: Bench, mirror: Mirror) -> None:
    odd = bench.manifest.entry(AUNT).model_copy(update={"kind": "papyrus"})
    entries = [odd if e.id == AUNT else e for e in bench.manifest.entries]
    bench.manifest = bench.manifest.model_copy(update={"entries": entries})
    result = bench.run(source=[AUNT, SMALL], mirror=mirror.url)
    assert result.exit_code == 11 and "papyrus" in row(result, AUNT)["why"]
    assert row(result, SMALL)["status"] == "fetched"


class Broken:
    """A plugin's source in several states of disrepair."""

    kind = "gutenberg"
    hosts = frozenset({"gutenberg.pglaf.org"})
    filename = "original.txt"
    reply: Callable[[], object] = staticmethod(lambda: Document("A text.\n"))

    def locate(self, entry: Any, get: Any) -> list[Resource]:
        return [Resource("https://gutenberg.pglaf.org" + PATH[SMALL], self.filename)]

    def read(self, entry: Any, files: Any) -> object:
        return self.reply()


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"filename": "../../x"}, "'../../x' is not allowed"),
        ({"filename": "text.txt"}, "'text.txt' is not allowed"),
        ({"reply": staticmethod(lambda: "words")}, "returned str"),
        ({"reply": staticmethod(lambda: 1 / 0)}, "ZeroDivisionError"),
    ],
)
def test_a_plugin_that_breaks_its_contract_is_named_and_nothing_is_written(
    bench: Bench, mirror: Mirror, state: dict[str, Any], why: str
) -> None:
    source = type("Source", (Broken,), state)
    bench.plugins = SimpleNamespace(registry=SimpleNamespace(get=lambda k, n: source, digest=lambda k, n: "d1"))
    with pytest.raises(PluginError) as e:
        bench.run(source=[SMALL], mirror=mirror.url)
    assert why in e.value.why and not bench.folder(SMALL).exists()
    assert not (bench.root / "x").exists()


def test_a_plugins_digest_is_part_of_what_was_asked_for(bench: Bench, mirror: Mirror) -> None:
    for digest in ("d1", "d2"):
        registry = SimpleNamespace(get=lambda k, n: Broken, digest=lambda k, n, d=digest: d)
        bench.plugins = SimpleNamespace(registry=registry)
        assert row(bench.run(source=[SMALL], mirror=mirror.url), SMALL)["status"] == "fetched"
    assert load(bench.folder(SMALL)).record["plugins"] == {"sources/gutenberg": "d2"}


def test_two_fetches_at_once_the_second_is_refused(bench: Bench) -> None:
    with hold(bench.root / "data" / "raw"), pytest.raises(LockedError):
        bench.run(source=[MANUAL])


def test_the_estimate_counts_without_downloading_and_sets_the_fifty_gigabytes_right(
    bench: Bench, mirror: Mirror
) -> None:
    result = bench.run(estimate=True, mirror=mirror.url)
    tokens = result.summary["tokens_estimate"]
    assert isinstance(tokens, int) and 6e6 < tokens < 10e6
    assert result.summary["activation_bytes_per_layer"] == tokens * 4096 * 2
    assert "one layer" in bench.said[-1] and "not text" in bench.said[-1]
    assert mirror.log() == [] and list(bench.root.iterdir()) == []
    bench.run(source=[SMALL], mirror=mirror.url)
    estimate = row(bench.run(source=[SMALL], estimate=True), SMALL)
    size = (bench.folder(SMALL) / "text.txt").stat().st_size
    assert (estimate["status"], estimate["state"], estimate["text_bytes"]) == ("up-to-date", "on-disk", size)
    rows: Any = result.summary["sources"]
    assert {(r["status"], r["state"]) for r in rows} == {(None, "missing"), ("manual", "missing")}


def test_the_plan_lists_addresses_and_bytes_and_touches_nothing(bench: Bench, mirror: Mirror) -> None:
    plan = fetch.plan(bench.context(), fetch.Config(source=[SMALL, MANUAL], mirror=mirror.url))
    rows: Any = plan.facts["sources"]
    assert rows[0] == {
        "id": SMALL, "kind": "gutenberg", "url": "https://gutenberg.pglaf.org" + PATH[SMALL],
        "bytes": rows[0]["bytes"], "state": "missing",
    }  # fmt: skip
    assert abs(rows[0]["bytes"] / original(PATH[SMALL])[0] - 1) < 0.1
    assert rows[1]["state"] == "by hand" and (plan.facts["missing"], plan.facts["by_hand"]) == (1, 1)
    assert mirror.log() == [] and list(bench.root.iterdir()) == []


@pytest.mark.slow
def test_the_whole_manifest_ends_with_54_books_11_manual_rows_and_exit_11(bench: Bench, mirror: Mirror) -> None:
    result = bench.run(mirror=mirror.url)
    rows: Any = result.summary["sources"]
    states = {r["id"]: r["status"] for r in rows}
    books = [e for e in bench.manifest.entries if e.kind == "gutenberg"]
    assert len(books) == 54 and all(states[e.id] == "fetched" for e in books)
    assert sum(s == "manual" for s in states.values()) == 11 and result.exit_code == 11
    assert all(row(result, e.id)["sha256"] == original(f"/cache/epub/{e.pg}/pg{e.pg}.txt")[1] for e in books)
    assert leftovers(bench.root) == []
    before = bench.bytes()
    mirror.reset()
    again = bench.run(mirror=mirror.url)
    assert [r["path"] for r in mirror.log()] == ["/metadata/writingsofgeorge04wash"]  # the one item that is not there
    assert bench.bytes() == before and again.exit_code == 11
