"""Concept files: what they select, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from greatctl import manifest
from greatctl.errors import ManifestError, UsageError
from greatctl.features.concepts import BUNDLED, concepts_named, read_concept, select
from greatctl.reference import texts

GOOD = """name = "patience"
description = "waiting well"
leave_out = ["Patience"]
pairs = "composure"

[positive]
character = ["darwin"]
source = ["seed-book"]

[control]
role = ["control"]

[hard_control]
character = ["tolstoy"]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "own.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_concept_names_its_sides_by_any_column(tmp_path: Path) -> None:
    concept = read_concept(written(tmp_path, GOOD))
    documents = [
        {"role": "character", "character": "darwin", "source_id": "origin"},
        {"role": "seed", "character": None, "source_id": "seed-book"},
        {"role": "control", "character": None, "source_id": "manual", "hard": False},
        {"role": "control", "character": None, "source_id": "praise", "hard": True},
        {"role": "character", "character": "tolstoy", "source_id": "diary"},
        {"role": "character", "character": "grant", "source_id": "memoirs"},
        {"role": "control", "character": "darwin", "source_id": "both"},
    ]
    assert select(concept, documents) == ["positive", "positive", "control", "hard", "hard", None, None]
    assert concept.leave_out == ("patience",) and concept.pairs == "composure"


def test_all_bundled_concepts_select_both_sides_of_the_manifest_and_of_the_sample_texts() -> None:
    entries = manifest.load(manifest.packaged_path()).entries
    real = [{"role": e.role, "character": e.character, "source_id": e.id, "hard": e.hard} for e in entries]
    bundled = [{"role": t.role, "character": t.id if t.role == "character" else None} for t in texts()]
    known = {e.character for e in entries}
    for concept in concepts_named(["all"]):
        assert select(concept, real).count("positive") >= 10 and "hard" in select(concept, real)
        assert select(concept, bundled).count("positive") >= 5 and select(concept, bundled).count("control") == 15
        for side in (concept.positive, concept.hard_control):
            assert set(side.by.get("character", ())) <= known, concept.name
        assert concept.pairs == concept.name
    assert [c.name for c in concepts_named(["all", "greatness"])] == list(BUNDLED)


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("leave_out", "leaveout", (3, 1), "unknown key 'leaveout'"),
        ('name = "patience"', "", (1, 1), "needs a name"),
        ('"waiting well"', "7", (2, 1), "description must be text"),
        ('["Patience"]', '"patience"', (3, 1), "list of texts"),
        ("character = [\"darwin\"]", "charakter = [\"darwin\"]", (7, 1), "unknown key 'charakter' in [positive]"),
        ('role = ["control"]', 'role = ["controls"]', (11, 1), "unknown role 'controls'"),
        ('role = ["control"]', "role = []", (10, 1), "names no documents"),
        ('pairs = "composure"', 'pairs = "compsure"', (4, 1), "no pairs 'compsure'"),
        ('["tolstoy"]', '["tolstoy"', (15, 1), "syntax error"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_line_and_column(
    tmp_path: Path, old: str, new: str, place: tuple[int, int], words: str
) -> None:
    assert old in GOOD
    path = written(tmp_path, GOOD.replace(old, new))
    with pytest.raises(ManifestError) as caught:
        read_concept(path)
    assert words in caught.value.message and caught.value.why and caught.value.fix
    where = str(caught.value.where).removeprefix(f"{path}:").split(":")
    assert int(where[0]) == place[0], caught.value.where
    assert int(where[1]) == place[1]


def test_unknown_names_missing_files_and_twins_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="greatnes") as caught:
        concepts_named(["greatnes"])
    assert "greatness" in caught.value.fix
    with pytest.raises(ManifestError):
        concepts_named([str(tmp_path / "none.toml")])
    twin = written(tmp_path, GOOD.replace("patience", "greatness"))
    with pytest.raises(UsageError, match="two concepts"):
        concepts_named(["greatness", str(twin)])


def test_a_digest_follows_what_a_concept_says_and_not_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    first, moved = read_concept(written(tmp_path, GOOD)), read_concept(written(tmp_path / "a", GOOD))
    other = read_concept(written(tmp_path, GOOD.replace("tolstoy", "pepys")))
    assert first.digest == moved.digest != other.digest
    pairs = tmp_path / "pairs.toml"
    pairs.write_text("x")
    own = GOOD.replace('pairs = "composure"', 'pairs = "pairs.toml"')
    before = read_concept(written(tmp_path, own)).digest
    pairs.write_text("y")
    assert read_concept(written(tmp_path, own)).digest != before
