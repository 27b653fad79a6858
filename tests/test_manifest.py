"""sources.toml: what is accepted, what is refused, and where an error points."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli

from greatctl import manifest
from greatctl.entries import slug_problem, suggest_slug
from greatctl.errors import ManifestError, UsageError
from greatctl.toml_positions import Positions
from greatctl.urls import url_problem

MIRROR = Path(__file__).resolve().parents[2] / "shared" / "mirror" / "SOURCES.toml"

GOOD = '''# a comment with [brackets] and "quotes"
[[character]]
id = "darwin"
name = "Charles Darwin"

[[source]]
id = "origin"
kind = "gutenberg"
pg = 1228
title = """
id = "not a key"
[[source]]
"""
author = "Charles Darwin"
character = "darwin"

[[control]]
id = "wood"
kind = "manual"
where = "a library"
title = "Common Objects"
author = "J. G. Wood"
matches = ["origin", "darwin"]

[train]
k = 32
'''

Load = Callable[..., manifest.Manifest]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load GOOD with some text replaced (each must occur)."""

    def make(*changes: tuple[str, str], text: str | bytes = GOOD) -> manifest.Manifest:
        for old, new in changes:
            assert isinstance(text, str) and old in text
            text = text.replace(old, new, 1)
        path = tmp_path / "sources.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return manifest.load(path)

    return make


def refused(load: Load, *changes: tuple[str, str], text: str | bytes = GOOD) -> ManifestError:
    with pytest.raises(ManifestError) as caught:
        load(*changes, text=text)
    error = caught.value
    assert error.exit_code == 3 and error.message and error.why
    assert (error.message + error.why + error.fix).isprintable()
    return error


def place(error: ManifestError) -> tuple[int, int]:
    assert error.where is not None
    _, line, column = error.where.rsplit(":", 2)
    return int(line), int(column)


def test_a_good_manifest_is_typed_and_keeps_its_order(load: Load) -> None:
    m = load()
    assert [e.id for e in m.entries] == ["origin", "wood"]
    assert [e.unit for e in m.entries] == ["darwin", "wood"]
    assert [e.role for e in m.entries] == ["character", "control"]
    assert m.entry("origin").url == "https://www.gutenberg.org/cache/epub/1228/pg1228.txt"
    assert m.tables["train"] == {"k": 32} and m.tables["fetch"] == {}
    assert m.where("train", "k").endswith("sources.toml:26:1")


def test_the_digest_ignores_comments_line_ends_and_bom_but_not_values(load: Load) -> None:
    plain = load().digest
    assert load(text="\ufeff" + GOOD.replace("\n", "\r\n") + "# more\r\n").digest == plain
    assert load(("1228", "1229")).digest != plain


def test_a_seed_forms_its_own_unit_and_is_selected_by_it(load: Load) -> None:
    seed = '[[seed]]\nid = "book"\nkind = "gutenberg"\npg = 1\ntitle = "T"\nauthor = "A"\n'
    seed += 'character = "carnegie"\n'
    m = load(text=GOOD + seed)
    assert [e.id for e in m.select(characters=["carnegie"])] == ["book"]
    assert [e.id for e in m.select(characters=["darwin"], controls=["wood"])] == ["origin", "wood"]
    assert [e.id for e in m.select(sources=["wood"])] == ["wood"]
    assert len(m.select()) == 3


@pytest.mark.parametrize("kwargs", [{"characters": ["darwn"]}, {"controls": ["wod"]}, {"sources": ["orign"]}])
def test_an_unknown_selection_names_the_nearest(load: Load, kwargs: dict[str, list[str]]) -> None:
    with pytest.raises(UsageError, match="not in the manifest") as caught:
        load().select(**kwargs)
    assert any(name in caught.value.fix for name in ("darwin", "wood", "origin"))


def test_a_syntax_error_shows_line_and_column(load: Load) -> None:
    error = refused(load, ("pg = 1228", "pg = = 1228"))
    assert place(error) == (9, 6)
    assert "pg = = 1228" in error.message


def test_an_unknown_key_names_the_nearest_before_the_missing_one(load: Load) -> None:
    error = refused(load, ("title = ", "titel = "))
    assert place(error) == (10, 1)
    assert "'titel'" in error.message and "'title'" in error.fix


def test_unknown_tables_and_keys_of_model_are_refused(load: Load) -> None:
    error = refused(load, ("[train]", "[trian]"))
    assert "'train'" in error.fix and place(error) == (25, 1)
    assert "'name'" in refused(load, text='[model]\nnme = "x"\n').fix
    assert place(refused(load, text="[project]\ndata_dir = 3\n")) == (2, 1)


@pytest.mark.parametrize("second", ["darwin", "Darwin", "DARWIN"])
def test_equal_ids_name_both_lines(load: Load, second: str) -> None:
    error = refused(load, text=GOOD + f'[[character]]\nname = "x"\nid = "{second}"\n')
    assert "lines 3 and 29" in error.why and place(error) == (29, 1)


def test_a_control_may_not_share_the_id_of_a_character(load: Load) -> None:
    assert "used twice" in refused(load, ('id = "wood"', 'id = "darwin"')).message


@pytest.mark.parametrize(
    "id",
    [
        "../../etc", "a/b", "a\\\\b", "con", "nul", "com1", "lpt9", ".", "..", "", "x" * 65, "x" * 300,
        "a\\u0000b", "a\\u202eb", "ａｂｃ", "a b", "-rf", "a-", "Upper", "a\\n", "é",
    ],
)  # fmt: skip
def test_ids_that_are_no_plain_slugs_are_refused(load: Load, id: str) -> None:
    error = refused(load, ('id = "origin"', f'id = "{id}"'))
    assert place(error) == (7, 1)
    suggestion = re.search(r'"(.*)"', error.fix)
    assert suggestion and slug_problem(suggestion[1]) is None


def test_suggestions_are_valid_slugs() -> None:
    assert suggest_slug("Élan Vital!") == "elan-vital"
    assert suggest_slug("con") == "work-con" and suggest_slug("漢字") == "work"
    assert slug_problem(suggest_slug("x" * 300)) is None


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "ftp://example.org/x", "gopher://example.org", "data:text/plain,x",
        "example.org/x", "http://127.0.0.1/x", "http://169.254.169.254/latest", "http://10.1.2.3",
        "http://192.168.0.1:80/", "http://[::1]/", "http://2130706433/", "http://0x7f000001/",
        "http://0177.0.0.1/", "http://127.1/", "http://0/", "http://[::ffff:10.0.0.1]/",
        "http://[64:ff9b::7f00:1]/", "http://localhost/", "http://LOCALHOST./", "http://a.localhost",
        "http://router/", "http://x.internal/", "http://user:pw@example.org/", "http://exa mple.org",
        "http://example.org\\@127.0.0.1/", "http://１２７.0.0.1/", "http://", "http:///x",
        "http://example.org:99999/", "http://1.2.3.4.5/", "http://100.64.0.1/", "http://224.0.0.1/",
        "http://[::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_web_addresses_are_refused(load: Load, url: str) -> None:
    error = refused(load, ("pg = 1228", f"pg = 1228\nurl = '{url}'"))
    assert place(error) == (10, 1)


@pytest.mark.parametrize(
    "url", ["https://www.gutenberg.org/x.txt", "http://1.1.1.1/", "https://xn--bcher-kva.example:8443/a?b=c"]
)
def test_public_web_addresses_are_accepted(url: str) -> None:
    assert url_problem(url) is None


def test_addresses_in_plugin_options_keep_the_same_rules(load: Load) -> None:
    options = '[source.options]\nfeed = "{}"\n\n[[control]]'
    assert load(("[[control]]", options.format("https://example.org/a"))).entry("origin").extra["feed"]
    error = refused(load, ("[[control]]", options.format("http://127.0.0.1/a")))
    assert place(error) == (17, 1) and "options" in error.message


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("pg = 1228\n", "", 6, "pg"),
        ('where = "a library"\n', "", 17, "where"),
        ('author = "Charles Darwin"\n', "", 6, "author"),
        ('character = "darwin"\n', "", 6, "character"),
        ("pg = 1228", 'pg = "1228"', 9, "integer"),
        ("pg = 1228", "pg = 0", 9, "greater"),
        ('matches = ["origin", "darwin"]', 'matches = "origin"', 23, "list"),
        ("pg = 1228", "pg = 1228\nsplit = 'test'", 10, "heldout-work"),
        ("pg = 1228", "pg = 1228\ntranslated = 1", 10, "boolean"),
        ("pg = 1228", "pg = 1228\nmirror_path = '/../etc'", 10, "server"),
        ("[[control]]\n", "[[control]]\ncharacter = 'darwin'\n", 18, "character"),
    ],
)
def test_missing_keys_and_wrong_values_point_at_their_line(
    load: Load, old: str, new: str, line: int, says: str
) -> None:
    error = refused(load, (old, new))
    assert place(error)[0] == line
    assert says in error.message + error.why


def test_unknown_references_name_the_nearest(load: Load) -> None:
    error = refused(load, ('character = "darwin"', 'character = "darwn"'))
    assert place(error) == (15, 1) and "'darwin'" in error.fix
    error = refused(load, ('["origin"', '["orign"'))
    assert place(error) == (23, 1) and "'origin'" in error.fix


@pytest.mark.parametrize("text", ["[source]\nid = 1\n", "source = 3\n", "source = [1]\n", "[[train]]\nk = 1\n"])
def test_tables_of_the_wrong_shape_are_refused(load: Load, text: str) -> None:
    assert place(refused(load, text=text))[0] == 1


@pytest.mark.parametrize("text", [b"# caf\xe9\n", GOOD.encode("utf-16"), b"a = \x00\n", b"x = " + b"[" * 100_000])
def test_bytes_that_are_no_utf8_toml_are_refused(load: Load, text: bytes) -> None:
    assert "sources.toml" in str(refused(load, text=text).where)


def test_a_latin1_byte_is_located(load: Load) -> None:
    assert place(refused(load, text=GOOD.encode() + b"# caf\xe9\n")) == (27, 6)


def test_a_missing_manifest_a_folder_and_a_huge_file_are_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (5 * 2**20 + 1))
    for path, words in (
        (tmp_path / "none.toml", "no none.toml"),
        (tmp_path, "folder"),
        (huge, "larger than 5 MB"),
    ):
        with pytest.raises(ManifestError, match=words):
            manifest.load(path)


def test_an_unreadable_manifest_is_refused(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = load().path
    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(ManifestError, match="cannot be read"):
        manifest.load(path)


def test_positions_follow_strings_arrays_and_dotted_or_quoted_keys() -> None:
    text = 'a = [ # ]\n  "]\\"",\n  1,\n]\n' + "b.c = '''\nd = 1'''\n" + '  "e f" = {x = 1}\n'
    text += "[[t.u]]\nv = 1\n[t.u.w]\nz = 1\n[[t.u]]\nv = 2\n"
    tomli.loads(text)
    at = Positions(text).at
    assert [at(p) for p in (("a",), ("b", "c"), ("d",), ("e f",), ("t",))] == [
        (1, 1), (5, 1), (1, 1), (7, 3), (8, 1),
    ]  # fmt: skip
    assert at(("t", "u", 0, "v")) == (9, 1) and at(("t", "u", 0, "w", "z")) == (11, 1)
    assert at(("t", "u", 1)) == (12, 1) and at(("t", "u", 1, "v")) == (13, 1)


def test_every_key_of_the_shipped_file_is_located_on_its_own_line() -> None:
    text = manifest.packaged_path().read_text(encoding="utf-8")
    lines, at = text.split("\n"), Positions(text).at
    data = tomli.loads(text)
    for table in ("seed", "character", "source", "control"):
        for number, row in enumerate(data[table]):
            for key in row:
                assert lines[at((table, number, key))[0] - 1].startswith(f"{key} = ")
            assert lines[at((table, number, "id"))[0] - 1] == f'id = "{row["id"]}"'


# The shipped file.


@pytest.fixture(scope="module")
def shipped() -> manifest.Manifest:
    return manifest.load(manifest.packaged_path())


def test_the_shipped_manifest_has_the_fixed_shape(shipped: manifest.Manifest) -> None:
    ids = [
        "churchill",
        "jefferson",
        "washington",
        "tolstoy",
        "voltaire",
        "darwin",
        "gandhi",
        "emerson",
        "pepys",
    ]
    ids += ["eleanor-roosevelt", "buffett", "grant", "franklin", "oprah-winfrey", "naval-ravikant"]
    assert [c.id for c in shipped.characters] == ids
    assert all(c.born and c.why for c in shipped.characters)
    assert Counter(e.character for e in shipped.entries if e.role == "character") == dict.fromkeys(ids, 3)
    seeds = [(e.id, e.unit) for e in shipped.entries if e.role == "seed"]
    assert seeds == [("carnegie-autobiography", "carnegie")]
    controls = [e for e in shipped.entries if e.role == "control"]
    assert len(controls) == 20 and sum(e.hard for e in controls) == 2
    assert all(e.matches for e in controls)
    assert shipped.model_name == "meta-llama/Meta-Llama-3-8B"


def test_every_shipped_entry_says_what_statistics_need(shipped: manifest.Manifest) -> None:
    for e in shipped.entries:
        assert e.why and e.genre and e.topic and e.rights and re.fullmatch("1[789]c|2[01]c", e.era), e.id
        assert e.bytes is None and e.sha256 is None
        assert e.kind != "gutenberg" or (e.own_bytes and e.tokens_llama3 and e.mirror_path)
    translated = {e.unit for e in shipped.entries if e.translated}
    assert {"tolstoy", "voltaire", "aksakov-russian-gentleman", "orleans-memoirs"} <= translated


def test_the_shipped_split_holds_out_whole_authors_and_single_works(shipped: manifest.Manifest) -> None:
    by_unit: dict[str, Counter[str]] = {}
    for e in shipped.entries:
        by_unit.setdefault(e.unit, Counter())[e.split] += 1
    people = [by_unit[c.id] for c in shipped.characters]
    assert people.count(Counter({"heldout-author": 3})) == 5
    assert people.count(Counter({"train": 2, "heldout-work": 1})) == 10
    assert sum(e.split == "heldout-author" for e in shipped.entries if e.role == "control") == 7
    assert {e.author for e in shipped.entries if e.split == "heldout-author"}.isdisjoint(
        e.author for e in shipped.entries if e.split != "heldout-author"
    )


def _phrases(rows: list[dict[str, object]], length: int = 8) -> set[tuple[str, ...]]:
    """Runs of words in the prose keys."""
    found: set[tuple[str, ...]] = set()
    for row in rows:
        for key in (
            "why",
            "what",
            "confound",
            "contamination",
            "rights_note",
            "where",
            "edition",
            "verified_how",
        ):
            words = re.findall(r"[a-z0-9]+", re.sub(r"https?://\S+", " ", str(row.get(key, "")).lower()))
            found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


@pytest.mark.skipif(not MIRROR.is_file(), reason="the sheet of facts is not beside this checkout")
def test_the_shipped_facts_agree_with_the_sheet_and_its_sentences_do_not() -> None:
    theirs = tomli.loads(MIRROR.read_text(encoding="utf-8"))
    ours = tomli.loads(manifest.packaged_path().read_text(encoding="utf-8"))
    facts = ("id", "pg", "ia", "file", "title", "rights", "url", "mirror_path", "own_bytes", "tokens_llama3",
             "text_from", "text_from_nth", "text_to", "text_to_nth", "bytes_estimate")  # fmt: skip
    for table in ("seed", "source", "control"):
        known = {row["id"]: row for row in ours[table]}
        assert set(known) == {row["id"] for row in theirs[table]}
        for row in theirs[table]:
            mine = known[row["id"]]
            for key in facts:
                if key == "rights" and row["id"] == "buffett-fcic-interview-2010":
                    continue  # a sentence there; ours is a word
                assert mine.get(key) == row.get(key), (row["id"], key)
            assert mine.get("first_published", "") == row.get("first_published", "")
    rows = [[row for table in ("seed", "source", "control") for row in data[table]] for data in (ours, theirs)]
    assert not _phrases(rows[0]) & _phrases(rows[1])
