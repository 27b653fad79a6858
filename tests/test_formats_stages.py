"""Other programs' folders in the stages: a snippet is read with them, their latents are patched, and one is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_folders import coder_of, rows
from sae_folders_foreign import Written, dictionary, llama_scope, sparsify
from tiny_llama import make_project, save_tiny

from greatctl.errors import InputError
from greatctl.events import Event, Run
from greatctl.extend.manager import load_plugins
from greatctl.model.loading import load
from greatctl.model.tokenizer import encode
from greatctl.reference import model_dir
from greatctl.sae.folder import Origin, save
from greatctl.sae.folder import load as load_sae
from greatctl.stages import interpret, patch, train
from greatctl.stages.context import Context
from greatctl.stages.saes import find_sae
from greatctl.store.artifact import Identity, work
from greatctl.store.files import write_json
from greatctl.store.tables import read_rows

TEXT = "The captain rose early and wrote to his son."
SITE = "blocks.3.hook_resid_post"


def project(root: Path, stage: str, *, tokens_of: str | None = None, **more: Any) -> tuple[Context, list[Event]]:
    """A project, with tokens of a model where one is named; and the list of what is said."""
    said: list[Event] = []
    made = make_project(root, {"wood-b": "text"})
    if tokens_of:
        with work(made.tokens / "toy-12", Identity("tokenize", {"window": 12})) as w:
            write_json(w.path / "tokenizer.json", {"path_or_id": tokens_of})
            w.seal({})
    plugins = load_plugins(folder=None, enabled=False)
    return Context(made, plugins, run=Run(stage, said.append), device="cpu", offline=True, **more), said


def notices(said: list[Event]) -> str:
    return "\n".join(str(event) for event in said)


@pytest.fixture(scope="module")
def residual() -> torch.Tensor:
    """What the bundled model has at the site for TEXT, [tokens, d_model], without the first."""
    model = load(model_dir(), name="bundled", upto=4)
    return model.capture(torch.tensor([encode(model.tokenizer, TEXT)]), [SITE])[SITE][0, 1:].double()


def from_sparsify(root: Path) -> Written:
    return sparsify(root / "run", d=256, n=512, run={"model": "bundled"})


def from_llama_scope(root: Path) -> Written:
    return llama_scope(root / "scope", d=256, n=512, jump_relu_threshold=0.01)


@pytest.mark.parametrize("made", [from_sparsify, from_llama_scope])
def test_a_snippet_is_read_with_another_program_s_sae(tmp_path: Path, residual: torch.Tensor, made: Any) -> None:
    written = made(tmp_path)
    ctx, said = project(tmp_path / "p", "interpret", tokens_of="bundled")
    result = interpret.run(ctx, interpret.Config(text=TEXT, top_k=3, sae=str(written.folder)))
    latents, _ = written.formula(residual)
    expected = latents.topk(3, dim=1)
    rows = result.summary["top"]
    assert isinstance(rows, list) and len(rows) == 3 * len(residual) and result.summary["hook_point"] == SITE
    for row in rows:
        place = expected.indices[row["position"]].tolist().index(row["latent"])
        assert row["activation"] == pytest.approx(float(expected.values[row["position"], place]), rel=1e-3)
    named = made is from_sparsify  # by its run's config.json
    assert ("does not name its model" in notices(said)) is not named and (named or "bundled" in notices(said))


def test_an_sae_without_a_model_takes_the_project_s_unless_one_is_given(tmp_path: Path) -> None:
    folder = str(sparsify(tmp_path / "run").folder)
    ctx, said = project(tmp_path / "p", "patch", tokens_of="bundled")
    assert find_sae(ctx, folder).model == "bundled" and "that of the newest tokens" in notices(said)
    given, said = project(tmp_path / "q", "patch", tokens_of="bundled", origins={"model": "flag --model"})
    assert find_sae(given, folder).model is None and not said
    empty, said = project(tmp_path / "r", "patch")
    assert find_sae(empty, folder).model is None and not said
    named, said = project(tmp_path / "s", "patch", tokens_of="bundled")
    theirs = dictionary(tmp_path / "trainer_0", "BatchTopKSAE")
    found = find_sae(named, str(theirs.folder))
    assert (found.model, found.hook_point, found.d_sae, found.d_in) == (theirs.model, SITE, 40, 12) and not said


def test_its_bytes_are_its_key(tmp_path: Path) -> None:
    ctx, _ = project(tmp_path / "p", "patch")
    folder = sparsify(tmp_path / "run").folder
    key = find_sae(ctx, str(folder)).key
    (folder / "cfg.json").write_text((folder / "cfg.json").read_text().replace('"k": 4', '"k": 5'))
    assert find_sae(ctx, str(folder)).key != key


def test_latents_of_another_program_s_sae_are_patched(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", num_hidden_layers=2)
    written = llama_scope(tmp_path / "scope", d=32, n=64, hook="blocks.1.hook_resid_pre", jump_relu_threshold=0.01)
    pair = {"clean": "123456", "corrupted": "125456", "answer": "7", "wrong_answer": "9"}
    ctx, _ = project(tmp_path / "p", "patch", tokens_of=str(tmp_path / "model"))
    config = patch.Config(**pair, site="latents", sae=str(written.folder), top=3, min_gap=0.0)
    result = patch.run(ctx, config)
    assert result.artifact is not None and result.summary["hook_point"] == "blocks.1.hook_resid_pre"
    rows = read_rows(result.artifact / "cells.parquet")
    assert len({row["latent"] for row in rows if row["latent"] is not None}) == 3


def test_a_run_of_several_saes_is_asked_about_before_anything_is_loaded(tmp_path: Path) -> None:
    for hookpoint in ("layers.2", "layers.3"):
        sparsify(tmp_path / "run", hookpoint)
    ctx, _ = project(tmp_path / "p", "interpret")
    with pytest.raises(InputError) as caught:
        interpret.plan(ctx, interpret.Config(text=TEXT, sae=str(tmp_path / "run")))
    assert "layers.2, layers.3" in caught.value.why and str(tmp_path / "run" / "layers.2") in caught.value.fix


@pytest.mark.parametrize(("form", "file"), [("sparsify", "sae.safetensors"), ("dictionary_learning", "ae.pt")])
def test_a_finished_sae_is_exported_to_another_program(tmp_path: Path, form: Any, file: str) -> None:
    ctx, _ = project(tmp_path / "p", "train")
    with work(ctx.project.saes / "mine", Identity("train", {"name": "mine"})) as w:
        save(w.path, coder_of("topk"), 1.0, Origin("bundled", SITE, 17))
        w.seal({"name": "mine"})
    result = train.run(ctx, train.Config(name="mine", export=form))
    folder = Path(str(result.summary["export"]))
    x = rows()
    assert (folder / file).is_file() and folder.is_relative_to(ctx.project.saes / "mine" / "exports" / form)
    assert torch.allclose(load_sae(folder).encode(x), load_sae(ctx.project.saes / "mine").encode(x), atol=1e-5)
    assert find_sae(ctx, str(folder)).model == "bundled" and find_sae(ctx, str(folder)).hook_point == SITE


def test_an_export_that_is_not_quite_the_same_sae_says_so(tmp_path: Path) -> None:
    ctx, said = project(tmp_path / "p", "train")
    with work(ctx.project.saes / "mine", Identity("train", {"name": "mine"})) as w:
        save(w.path, coder_of("batchtopk"), 1.0, Origin("bundled", SITE, 17))
        w.seal({"name": "mine"})
    train.run(ctx, train.Config(name="mine", export="sparsify"))
    (caveat,) = [str(event) for event in said if "on average" in str(event)]
    assert "train: sparsify has no threshold" in caveat and "k = 4" in caveat


def test_a_transcoder_of_what_an_mlp_reads_is_read_with_transformer_lens(
    tmp_path: Path, residual: torch.Tensor
) -> None:
    hooks = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
    written = sparsify(
        tmp_path / "run", "layers.3.mlp", d=256, n=512, run={"model": "bundled"}, transcode=True, **hooks
    )
    ctx, _ = project(tmp_path / "p", "interpret")
    result = interpret.run(ctx, interpret.Config(text=TEXT, top_k=3, sae=str(written.folder)))
    model = load(model_dir(), name="bundled", engine="transformer-lens")
    site = hooks["hook_name"]
    read = model.capture(torch.tensor([encode(model.tokenizer, TEXT)]), [site])[site][0, 1:].double()
    latents, _ = written.formula(read)
    rows = result.summary["top"]
    assert isinstance(rows, list) and len(rows) == 3 * len(residual) and result.summary["hook_point"] == site
    for row in rows:
        assert row["activation"] == pytest.approx(float(latents[row["position"], row["latent"]]), rel=1e-3)
