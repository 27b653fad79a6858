"""Labels in the report's plan: a report made before them, or of other ones, is out of date."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from tiny_llama import context

from greatctl import manifest
from greatctl.extend.manager import load_plugins
from greatctl.report.page import coded
from greatctl.stages import report
from greatctl.stages.context import Context, Project
from greatctl.store.artifact import Artifact, Identity, work
from greatctl.store.tables import write_table


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    (tmp_path / "sources.toml").write_text('[model]\nname = "bundled"\n')
    project = Project(tmp_path, manifest.load(tmp_path / "sources.toml"), tmp_path / "data", tmp_path / "results")
    return replace(context(project, "report"), plugins=load_plugins(folder=None, enabled=False))


def _features(ctx: Context) -> Artifact:
    rows = [{"latent": n, "density": 0.1, "top_tokens": ["a", "b"]} for n in range(3)]
    with work(ctx.project.features / "tiny", Identity("interpret", {"sae": "tiny"}), fresh=True) as w:
        write_table(w.path / "latents.parquet", pa.Table.from_pylist(rows))
        return w.seal({})


def _labels(ctx: Context, features: str, name: str) -> None:
    row = {"latent": 1, "name": name, "description": "d", "source": "labeler", "labeler": "m", "shuffled_with": 2}
    row |= {"detection": 0.9, "detection_shuffled": 0.5, "n_detection": 20}
    identity = Identity("interpret --labeler", {"sae": "tiny", "name": name}, {"features": features})
    with work(ctx.project.results / "labels" / "tiny", identity, fresh=True) as w:
        write_table(w.path / "labels.parquet", pa.Table.from_pylist([row]))
        w.seal({"labeler": "m", "n_latents": 1, "n_named": 1})


def test_new_labels_make_the_report_anew_and_those_of_other_tables_are_not_in_it(ctx: Context) -> None:
    config, features = report.Config.model_validate({}), _features(ctx)
    first = report.run(ctx, config)
    page = Path(str(first.summary["path"]))
    assert "No labels were written for this run" in page.read_text()
    assert "<code>greatctl interpret --labeler URL --labeler-model NAME</code> asks" in page.read_text()
    _labels(ctx, "f" * 64, "of other tables")
    assert report.run(ctx, config).up_to_date
    _labels(ctx, features.fingerprint, "<i>kings</i>")
    assert not report.run(ctx, config).up_to_date and report.run(ctx, config).up_to_date
    for name in ("index.html", "report.md", "report.json"):
        text = (page.parent / name).read_text()
        assert "kings" in text and "of other tables" not in text and ("<i>kings" in text) == (name == "report.json")
    _labels(ctx, features.fingerprint, "queens")
    assert not report.run(ctx, config).up_to_date and "queens" in page.read_text() and "kings" not in page.read_text()


def test_code_in_a_paragraph_is_escaped_like_all_else() -> None:
    assert coded("a `b <i>` c <b>") == "a <code>b &lt;i&gt;</code> c &lt;b&gt;"
    assert coded("one ` alone <b>") == "one ` alone &lt;b&gt;"
    assert "\x1b" not in coded("`\x1b[31m`")
