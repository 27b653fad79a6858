"""The chain as a person meets it: the demo, its artifacts, what is stale and what is damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

Greatctl = Callable[..., "object"]


def _copy(demo: Path, target: Path) -> Path:
    shutil.copytree(demo, target / "project")
    return target / "project"


def _bytes(folder: Path) -> dict[str, bytes]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "run.json")
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_demo_ends_with_a_report_and_three_hedged_findings(demo: Path) -> None:
    document = json.loads((demo.parent / "demo.json").read_text())
    summary = document["summary"]
    assert document["ok"] and document["stage"] == "demo"
    assert set(summary) >= {"project", "report", "findings", "seconds"}
    assert len(summary["findings"]) == 3
    assert "subject" in " ".join(summary["findings"])
    html = Path(summary["report"]).read_text()
    assert 'http-equiv="Content-Security-Policy"' in html and "Latent" in html


def test_everything_is_up_to_date_after_the_demo_and_verifies(greatctl: Greatctl, demo: Path) -> None:
    rows = greatctl("-C", demo, "status", "--json", cwd=demo).document["summary"]["artifacts"]
    stale = [(r["path"], r["reason"]) for r in rows if r["state"] != "up-to-date"]
    assert stale == []
    assert {r["stage"] for r in rows} == {"fetch", "tokenize", "harvest", "train", "interpret", "patch", "report"}
    assert greatctl("-C", demo, "verify", "--json", cwd=demo).document["summary"]["damaged"] == []


def test_nothing_half_written_is_left_behind(demo: Path) -> None:
    stray = [p for p in demo.rglob("*") if ".partial" in p.name or p.name.startswith(".tmp") or p.name.endswith(".old")]
    assert stray == []


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["fetch"], {"sources", "text_bytes", "tokens_estimate", "activation_bytes_per_layer"}),
        (["tokenize"], {"n_windows", "n_tokens", "window", "tokenizer"}),
        (["harvest"], {"n_tokens", "d_model", "hook_point", "dtype", "shards", "tokens_per_second"}),
        (
            ["train"],
            {
                "name", "arch", "d_sae", "l0", "explained_variance", "dead_fraction", "ce_loss_recovered", "steps",
                "tokens_per_second",
            },
        ),
        (["interpret"], {"n_latents", "hypotheses"}),
        (["interpret", "--text", "He kept his head.", "--top-k", "5"], {"tokens", "top"}),
        (["patch"], {"n_pairs", "n_refused", "metric", "site", "n_layers", "n_positions", "clean", "corrupted", "peak"}),
        (["report"], {"path", "bytes"}),
    ],
)  # fmt: skip
def test_each_stage_prints_one_document_with_its_fixed_keys(
    greatctl: Greatctl, demo: Path, words: list[str], keys: set[str]
) -> None:
    out = greatctl("-C", demo, *words, "--json", cwd=demo)
    assert out.code == 0, out.out + out.err
    document = out.document
    assert document["ok"] is True and document["stage"] == words[0]
    assert set(document["summary"]) >= keys
    if "--text" in words:
        assert document["artifact"] is None
        assert {"token", "latent", "activation"} <= set(document["summary"]["top"][0])
        assert "".join(document["summary"]["tokens"]).strip() == "He kept his head."
    else:
        assert Path(document["artifact"]).is_absolute()


def test_one_edited_setting_makes_its_stage_and_the_later_ones_stale(
    greatctl: Greatctl, demo: Path, tmp_path: Path
) -> None:
    project = _copy(demo, tmp_path)
    manifest = project / "sources.toml"
    manifest.write_text(manifest.read_text().replace("k = 32", "k = 16"))
    rows = greatctl("-C", project, "status", "--json", cwd=project).document["summary"]["artifacts"]
    states = {r["stage"]: (r["state"], r["reason"]) for r in rows}
    assert states["tokenize"][0] == states["harvest"][0] == "up-to-date"
    assert states["train"] == ("stale", "config.k 32 -> 16")
    assert states["interpret"][0] == "stale" and states["interpret"][1].endswith("which is stale")
    assert states["report"][0] == "stale" and "made from" in states["report"][1]
    assert states["patch"][0] == "up-to-date"


def test_a_moved_project_stays_up_to_date(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    rows = greatctl("-C", project, "status", "--json", cwd=project).document["summary"]["artifacts"]
    assert [r for r in rows if r["state"] != "up-to-date"] == []


def test_one_flipped_bit_is_named_refused_and_mended(greatctl: Greatctl, demo: Path, tmp_path: Path) -> None:
    project = _copy(demo, tmp_path)
    shard = sorted(project.rglob("shard-*.safetensors"))[0]
    before = _bytes(shard.parent)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(bytes(data))
    verify = greatctl("-C", project, "verify", "--json", cwd=project)
    assert verify.code == 6 and shard.name in json.dumps(verify.error)
    train = greatctl("-C", project, "train", "--name", "again", "--json", cwd=project)
    assert train.code == 6 and shard.name in json.dumps(train.error)
    assert greatctl("-C", project, "harvest", "--json", cwd=project).code == 0
    assert _bytes(shard.parent) == before
    assert greatctl("-C", project, "verify", "--json", cwd=project).code == 0
