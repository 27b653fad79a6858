"""One latent as a page: what the tables say of it, and how a terminal of eighty columns shows it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import torch
from rich.console import Console
from test_feature_pass import DOCUMENTS, OWNER, SPECIAL, WINDOW, WINDOWS, L, W, directions, encode, shards

from greatctl.cli.views.heat import passage, passage_line, sparkline
from greatctl.cli.views.latent import render_latent
from greatctl.features.best import AFTER, BEFORE
from greatctl.features.examples import Decoder
from greatctl.features.page import latent_page
from greatctl.features.tables import FeatureTables, scan
from greatctl.features.write import Corpus, write_stretches, write_tables, write_units
from greatctl.report.view import Latent
from greatctl.store.tables import read_rows, write_table

EVIL = "\x1b[31mred[/bold]\u202e"


class Words:
    """A tokenizer whose every id is a word; 7 is a hostile one."""

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(f" {EVIL}" if i == 7 else f" w{i}" for i in ids)


@pytest.fixture(scope="module")
def tables() -> FeatureTables:
    return scan(
        shards(), encode, L, OWNER, n_documents=DOCUMENTS, special_ids=[SPECIAL], top_k=3, directions=directions()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tables: FeatureTables) -> Path:
    """All tables of the pass, with a verdict."""
    root = tmp_path_factory.mktemp("features")
    ids = torch.cat([s["token"] for s in shards()]).view(WINDOWS, WINDOW)
    ends = torch.arange(WINDOW).expand(WINDOWS, WINDOW)
    documents = [
        {
            "source_id": f"work-{i}",
            "work": f"Work {i}",
            "author": f"Author {i // 2} {EVIL}",
            "role": "control",
            "year": 1850,
        }
        for i in range(DOCUMENTS)
    ]
    corpus = Corpus(ids, ends, torch.full((WINDOWS,), WINDOW), documents, OWNER)
    decoder = Decoder(Words(), [SPECIAL])
    write_tables(root, tables, corpus, decoder, None, directions=W)
    write_units(root, tables, documents, "author", range(L))
    write_stretches(root, tables, documents, range(L))
    verdict = {
        "concept": "greatness",
        "latent": 3,
        "verdict": "not-supported",
        "reason": f"because {EVIL}",
        "q_value": 0.5,
    }
    write_table(root / "contrasts.parquet", pa.Table.from_pylist([{**verdict, "effect": float("nan")}]))
    return root


def shown(page: Any, headline: str | None = None, width: int = 80, **options: Any) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, **options).print(render_latent(page, headline))
    return stream.getvalue()


def test_a_page_is_json_and_has_every_part(folder: Path, tables: FeatureTables) -> None:
    page: Any = latent_page(folder, 3)
    assert json.loads(json.dumps(page, allow_nan=False))["latent"] == 3
    assert page["contrast"]["verdict"] == "not-supported" and page["contrast"]["effect"] is None
    assert len(page["examples"]) == 3 and page["deciles"] and page["near"] and len(page["neighbours"]) == 5
    assert [row["decile"] for row in page["deciles"]] == sorted((r["decile"] for r in page["deciles"]), reverse=True)
    assert 0 <= page["token_share"] <= 1 and page["logit_kurtosis"] is None and page["top_logits"] == []
    for row in page["examples"] + page["deciles"]:
        assert row["heat"][row["marked"]] == row["activation"] > 0
        assert "".join(row["pieces"][: row["marked"]]) == row["before"]
        assert len(row["pieces"]) == len(row["heat"]) <= BEFORE + 1 + AFTER
    assert all(row["activation"] == 0 and not any(row["heat"]) and row["cosine"] > 0 for row in page["near"])
    other: Any = latent_page(folder, 4)
    assert other["contrast"] is None and other["contrasts"] == []


def test_intervals_are_over_works_or_over_stretches_of_the_only_one(folder: Path) -> None:
    units = {row["unit"].split()[1]: row for row in read_rows(folder / "units.parquet") if row["latent"] == 3}
    assert units["0"]["interval"] == "works" and units["1"]["interval"] == "stretches"
    assert all(row["low"] < row["mean"] < row["high"] for row in units.values())


def test_stretches_are_the_means_along_a_work(folder: Path, tables: FeatureTables) -> None:
    rows = [row for row in read_rows(folder / "stretches.parquet") if row["latent"] == 3]
    assert [row["source_id"] for row in rows] == [f"work-{i}" for i in range(DOCUMENTS)]
    expected = tables.stretch_total[1, :10, 3].double() / tables.stretch_tokens[1, :10]
    assert (
        rows[1]["mean"] == pytest.approx(expected.tolist(), rel=1e-6) and len(rows[1]["mean"]) == WINDOWS // DOCUMENTS
    )


def test_stretches_of_frequent_latents_alone_are_written_where_there_are_too_many(
    folder: Path, tables: FeatureTables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greatctl.features.write._STRETCH_NUMBERS", 5 * tables.stretch_tokens.numel())
    write_stretches(tmp_path, tables, [{"source_id": str(i)} for i in range(DOCUMENTS)], range(L))
    kept = {row["latent"] for row in read_rows(tmp_path / "stretches.parquet")}
    assert kept == set(tables.fired.argsort(descending=True, stable=True)[:5].tolist())


def test_the_page_fits_eighty_columns_and_says_everything(folder: Path) -> None:
    text = shown(latent_page(folder, 3), "not-supported: its difference is that of shuffled labels")
    assert max(map(len, text.splitlines())) <= 80
    for words in (
        "latent 3: fires on", "not-supported: its difference", "Strongest passages", "Across its range", "Near misses",
        "writes alike", "fires with", "explained by", "the token alone", "Mean activation", "95 % t intervals",
        "Along the works", "work-0", "●",
    ):  # fmt: skip
        assert words in text, words
    assert "«" in text and "10/10" in text


def test_foreign_text_stays_text(folder: Path) -> None:
    pages: list[Any] = [latent_page(folder, latent) for latent in range(L)]
    assert any(EVIL in "".join(row["pieces"]) for page in pages for row in page["examples"])
    for page in pages:
        text = shown(page, f"because {EVIL}")
        assert "\x1b" not in text and "\u202e" not in text and "[/bold]" in text
        coloured = shown(page, force_terminal=True, color_system="truecolor")
        assert "\x1b[31m" not in coloured and "\u202e" not in coloured


def test_a_card_of_the_report_has_the_deciles_and_the_near_misses(folder: Path, tmp_path: Path) -> None:
    from greatctl.report.features import cards

    for name in ("latents", "examples", "units"):
        (tmp_path / f"{name}.parquet").write_bytes((folder / f"{name}.parquet").read_bytes())
    numbers = {"effect": 0.1, "auroc": 0.5, "q_value": 1.0, "icc": 0.2}
    judged = {
        **numbers,
        "concept": "g",
        "latent": 3,
        "verdict": "not-supported",
        "reason": "no",
        "missing": ["difference of means"],
    }
    write_table(tmp_path / "hypotheses.parquet", pa.Table.from_pylist([judged]))
    (card,) = cards(
        cast(Any, SimpleNamespace(path=tmp_path, summary={"n_alive": L}, fingerprint="0" * 64)), None, [3], {}
    )
    assert isinstance(card, Latent) and len(card.examples) == 3
    (deciles, across), (near, silent) = card.more
    assert "each tenth" in deciles and len(across) > 5 and "Near misses" in near and len(silent) == 3
    assert all(0 < example.activation <= 1 and not any(example.strengths) for example in silent)


def test_a_latent_that_never_fires_has_a_page_too(folder: Path) -> None:
    page: Any = latent_page(folder, 3)
    nothing = {"fired": 0, "density": 0.0, "max": 0.0, "histogram": [0] * 40, "token_share": None, "contrast": None}
    lists = ("examples", "deciles", "near", "units", "along", "top_tokens", "cofiring", "contrasts")
    empty: dict[str, Any] = {name: [] for name in lists}
    assert "it never fires" in shown({**page, **nothing, **empty})


def test_a_sparkline_is_high_where_the_values_are() -> None:
    assert sparkline([0, 0.001, 4, 8]) == " ▁▄█" and sparkline([1, 2], 4) == "▂▄" and sparkline([]) == ""


def test_a_passage_marks_its_token_and_its_heat() -> None:
    text = passage(["He", " rose", "\n"], [0.0, 2.0, 1.0], 1)
    assert text.plain == "He «rose»↵"
    hot = {text.plain[s.start : s.end] for s in text.spans if getattr(s.style, "bgcolor", None)}
    assert "«rose»" in hot and "He" not in hot


def test_a_line_is_cut_around_its_token() -> None:
    pieces = [f" word{i}" for i in range(30)]
    line = passage_line(pieces, [0.0] * 30, 20, 40)
    assert "«word20»" in line.plain and line.cell_len == 40
    assert passage_line([" 漢字漢字漢字"], [1.0], 0, 8).cell_len == 8


def test_logits_tell_a_latent_that_writes_one_token_from_one_that_writes_nothing_in_particular() -> None:
    from greatctl.features.logits import latent_logits

    model: Any = SimpleNamespace(n_layers=1, d_vocab=5000, resume=lambda layer, x: x)
    g = torch.Generator().manual_seed(0)
    noise, word = torch.randn(5000, generator=g), torch.zeros(5000)
    word[9] = 5
    found = latent_logits(model, torch.stack([noise, word, -word]), k=2)
    assert abs(float(found.kurtosis[0])) < 0.3 and float(found.kurtosis[1]) > 100
    assert abs(float(found.skew[0])) < 0.2 and float(found.skew[1]) > 10 and float(found.skew[2]) < -10
