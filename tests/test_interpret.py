"""The stage `interpret`: from activations to sealed tables, a snippet and a page, on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import context, save_tiny
from token_folder import build

from greatctl import manifest
from greatctl.errors import InputError, IntegrityError, InterruptedRun, ManifestError, UsageError
from greatctl.events import Run
from greatctl.extend.manager import load_plugins
from greatctl.extend.registry import Item
from greatctl.features.baselines import BASELINES, COMPANIONS, FROZEN, SEEDS, UNTRAINED
from greatctl.model.loading import load, revision_of
from greatctl.sae.folder import Origin, save
from greatctl.sae.topk import TopK
from greatctl.stages import controls, interpret
from greatctl.stages.context import Context, Project
from greatctl.stages.interpret import Config
from greatctl.store.artifact import Identity, work
from greatctl.store.files import write_json
from greatctl.store.shards import ShardWriter
from greatctl.store.tables import read_rows, write_table

SITE = "blocks.1.hook_resid_post"
D_SAE, K, WINDOW = 64, 8, 12
WORDS = ("The ship’s carpenter rose early. ", "He mended the café door — and wrote to his son. ", "Courage! ")


def make_world(root: Path, roles: Mapping[str, str], *, one_author: bool = False) -> Context:
    """A project with tokens, activations and an SAE, made by hand; `roles` is unit -> role."""
    save_tiny(root / "model")
    (root / "sources.toml").write_text(f'[model]\nname = "{root / "model"}"\n')
    project = Project(root, manifest.load(root / "sources.toml"), root / "data", root / "results")
    model = load(root / "model", name=str(root / "model"), upto=2)
    tokens = _tokens(project, model, roles, one_author)
    activations = _activations(project, model, tokens)
    _sae(project, "tiny", str(root / "model"), activations.fingerprint)
    return context(project, "interpret")


def _tokens(project: Project, model, roles: Mapping[str, str], one_author: bool):
    documents = [
        {
            "source_id": f"{unit}-{i}",
            "unit": unit,
            "character": unit if role == "character" else None,
            "author": "one hand" if one_author else f"Author of {unit}",
            "work": f"{unit} {i}",
            "role": role,
            "era": ("19c", "20c")[n % 2],
            "genre": "memoir",
            "topic": ("war", "home")[i % 2],
            "translated": False,
            "split": "heldout-author" if n % 4 == 0 else "train",
            "year": 1900,
        }
        for n, (unit, role) in enumerate(roles.items())
        for i in range(2)
    ]
    texts = [(WORDS[n % 3] + WORDS[(n // 2) % 3]) * 3 for n in range(len(documents))]

    def encode(batch):
        import numpy as np

        found = model.tokenizer(list(batch), add_special_tokens=False, return_offsets_mapping=True)
        ends = [np.array([end for _, end in offsets], dtype=np.int32) for offsets in found["offset_mapping"]]
        return [(np.array(ids, dtype=np.int32), e) for ids, e in zip(found["input_ids"], ends, strict=True)]

    facts = {"name": "tiny", "path_or_id": model.name, "bos_id": 0, "pad_id": 1, "special_ids": [0, 1]}
    with work(project.tokens / "tiny-12", Identity("tokenize", {"window": WINDOW})) as w:
        build(
            w.path,
            documents,
            texts,
            encode,
            window=WINDOW,
            tokenizer={**facts, "vocab_size": 320, "sha256": "x"},
        )
        return w.seal({})


def _activations(project: Project, model, tokens):
    from greatctl.corpus.windows import TokenStore

    store = TokenStore(tokens.path)
    identity = Identity("harvest", {"hook_point": SITE}, inputs={"tokens": tokens.fingerprint})
    with work(project.activations / "tiny" / SITE, identity) as w:
        writer = ShardWriter(w.path)
        for number, start in enumerate(range(0, len(store.length), 16)):
            ids, length = store.input_ids[start : start + 16].long(), store.length[start : start + 16]
            real = torch.arange(WINDOW)[None] < length[:, None]
            window, position = real.nonzero(as_tuple=True)
            shard = {
                "acts": model.capture(ids, [SITE])[SITE][real],
                "window": (window + start).int(),
                "position": position.int(),
                "token": ids[real].int(),
            }
            writer.write(number, shard, len(window))
        rows = sum(e.rows for e in writer.finish())
        meta = {
            "model": model.name,
            "model_revision": revision_of(model.name),
            "hook_point": SITE,
            "d_model": 32,
            "dtype": "float32",
            "rows": rows,
            "special_ids": [0, 1],
            "tokens": tokens.fingerprint,
            "tokens_name": tokens.path.name,
        }
        write_json(w.path / "meta.json", meta)
        return w.seal({}, hashes=writer.hashes())


def _sae(project: Project, name: str, model: str, activations: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    coder = TopK(TopK.Config(d_in=32, d_sae=D_SAE, k=K))
    identity = Identity("train", {"name": name, "seed": seed}, inputs={"activations": activations})
    with work(project.saes / name, identity) as w:
        save(w.path, coder, 1.0, Origin(model, SITE, WINDOW))
        write_json(w.path / "training.json", {"arch": "topk", "hook_point": SITE, "model": model})
        return w.seal({}).path


SIX = {f"great-{i}": "character" for i in range(6)} | {f"plain-{i}": "control" for i in range(7)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Context:
    return make_world(tmp_path_factory.mktemp("world"), SIX)


@pytest.fixture(scope="module")
def tables(world: Context):
    return interpret.run(world, Config())


def rows_of(result, name: str) -> list[dict]:
    return read_rows(result.artifact / f"{name}.parquet")


def test_the_summary_has_the_fixed_keys(tables) -> None:
    summary = tables.summary
    assert summary["n_latents"] == D_SAE and 0 < summary["n_alive"] <= D_SAE
    assert {"concept", "latent", "effect", "q_value", "verdict"} <= set(summary["hypotheses"][0])
    assert summary["n_characters"] == 6 and summary["n_controls"] == 7 and "may be missed" in summary["power"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    (concept,) = summary["concepts"]
    assert concept["concept"] == "greatness" and concept["missing"] == list(COMPANIONS)


def test_companions_of_this_sae_are_measured_and_those_of_another_are_missing(tmp_path: Path) -> None:
    world = make_world(tmp_path, SIX)
    folder = world.project.results / "controls" / "tiny"
    trained = json.loads((world.project.saes / "tiny" / "artifact.json").read_text())["fingerprint"]
    for sae, owed in ((trained[::-1], list(COMPANIONS)), (trained, [])):
        with work(folder, Identity(controls.STAGE, {"sae": "tiny"}, inputs={"sae": sae}), fresh=True) as w:
            _companions(w.path, str(tmp_path / "model"))
            w.seal({})
        made = interpret.run(world, Config(causal=0))
        assert not made.up_to_date and made.summary["concepts"][0]["missing"] == owed
        assert all(row["missing"] == owed for row in rows_of(made, "hypotheses"))
        assert interpret.run(world, Config(causal=0)).up_to_date
    measured = {row["baseline"]: row for row in rows_of(made, "baselines")}
    assert all(0 <= measured[name]["bar"] <= 1 for name in COMPANIONS)
    assert measured[FROZEN]["what"].startswith("latent ") and measured[UNTRAINED]["n"] == D_SAE
    assert measured[SEEDS]["auroc"] is not None
    stable = [row for row in rows_of(made, "evidence") if row["name"] == "seed stability"]
    assert {row["state"] for row in stable} == {"passed"} and stable[0]["value"] == pytest.approx(0.9)
    assert not (made.artifact / "untrained-model").exists() and not (made.artifact / "pass").exists()
    (folder / "comparison.json").unlink()
    assert interpret.run(world, Config(causal=0)).summary["concepts"][0]["missing"] == list(COMPANIONS)


def _companions(folder: Path, model: str) -> None:
    """What `train --controls` leaves, with other weights for each."""
    for seed, name in enumerate(controls.CONTROLS, start=10):
        torch.manual_seed(seed)
        save(folder / name, TopK(TopK.Config(d_in=32, d_sae=D_SAE, k=K)), 1.0, Origin(model, SITE, WINDOW))
    write_json(folder / "comparison.json", [{"control": "this SAE", "seed": 0}])
    cosines = {f"seed_{i}_cosine": [0.9] * D_SAE for i in (1, 2)}
    write_table(folder / "latents.parquet", {"latent": list(range(D_SAE)), **cosines})


def test_a_second_run_is_up_to_date_and_a_forced_one_gives_the_same_bytes(world: Context, tables) -> None:
    before = {p.name: p.read_bytes() for p in tables.artifact.glob("*.parquet")}
    assert interpret.run(world, Config()).up_to_date
    again = interpret.run(replace(world, force=True), Config())
    assert not again.up_to_date
    assert {p.name: p.read_bytes() for p in again.artifact.glob("*.parquet")} == before
    tables_of_evidence = {f"{n}.parquet" for n in ("contrasts", "hypotheses", "evidence", "baselines", "causal")}
    assert tables_of_evidence | {"latents.parquet", "examples.parquet", "units.parquet"} <= set(before)


def test_every_table_says_what_it_should(tables) -> None:
    latents, examples, units = (rows_of(tables, n) for n in ("latents", "examples", "units"))
    assert [row["latent"] for row in latents] == list(range(D_SAE))
    assert sum(row["density"] for row in latents) == pytest.approx(K, abs=0.5)  # relu may zero a few
    assert all(sum(row["histogram"]) == row["fired"] for row in latents)
    assert all(len(row["top_logit_tokens"]) == 10 == len(row["bottom_logits"]) for row in latents)
    one = examples[0]
    assert one["rank"] == 0 and one["work"].split()[0] == one["unit"] and one["role"] in ("character", "control")
    assert all(len(row["pieces"]) == len(row["heat"]) for row in examples)
    top = [row for row in examples if row["kind"] == "top"]
    assert all(max(row["heat"]) == pytest.approx(row["activation"]) for row in top)
    assert all(row["before"] + row["token"] + row["after"] in "".join(row["pieces"]) for row in examples)
    assert {(row["unit"], row["n_documents"]) for row in units} == {(f"Author of {u}", 2) for u in SIX}


def test_hypotheses_are_written_with_what_is_missing(tables) -> None:
    contrasts, hypotheses = rows_of(tables, "contrasts"), rows_of(tables, "hypotheses")
    assert len(contrasts) == tables.summary["n_alive"]
    assert len(hypotheses) == min(64, len(contrasts))
    assert all(row["missing"] == list(COMPANIONS) and row["reason"] for row in hypotheses)
    sizes = [abs(row["effect"]) for row in hypotheses if row["verdict"] != "supported"]
    assert sizes == sorted(sizes, reverse=True)


def test_every_candidate_stands_beside_its_baselines_and_all_fourteen_checks(tables) -> None:
    hypotheses, evidence, measured = (rows_of(tables, n) for n in ("hypotheses", "evidence", "baselines"))
    assert [row["baseline"] for row in measured] == list(BASELINES)
    assert all((row["bar"] is None) == (row["missing"] is not None) for row in measured)
    bars = {row["baseline"]: row["bar"] for row in measured if row["bar"] is not None}
    for row in hypotheses:
        assert row["value"] == bars[row["baseline"]] == max(bars.values())
        assert row["margin"] == pytest.approx(row["heldout_auroc"] - row["value"])
        assert row["beats"] == (row["margin"] > 0) and row["margin_low"] <= row["margin_high"]
        checks = [c for c in evidence if c["latent"] == row["latent"]]
        assert [c["check"] for c in checks] == list(range(1, 15)) and all(c["reason"] for c in checks)
        assert row["passed"] + row["failed"] + sum(c["state"] == "missing" for c in checks) == 14
    assert {row["verdict"] for row in hypotheses} & {"supported"} == set(), "six texts of the same words"


PAIR = """[[pair]]
id = "p{n}"
clean = "x q {n} z"
corrupted = "x q {n} k"
answer = "a"
wrong_answer = "b"
heldout = {held}
"""


def test_a_concept_of_ones_own_has_hypotheses_and_interventions_of_its_own(
    world: Context, tables, tmp_path: Path
) -> None:
    own = tmp_path / "even.toml"
    own.write_text(
        'name = "even"\npairs = "pairs.toml"\n[positive]\ncharacter = ["great-0", "great-2", "great-4"]\n'
        '[control]\ncharacter = ["great-1", "great-3", "great-5"]\nrole = ["control"]\n'
    )
    (tmp_path / "pairs.toml").write_text("".join(PAIR.format(n=n, held=str(n > 2).lower()) for n in range(8)))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "saes").symlink_to(world.project.saes)
    ctx = replace(world, project=replace(world.project, results=tmp_path / "results"))
    made = interpret.run(ctx, Config(concept=["greatness", str(own)], causal=2))
    assert [c["concept"] for c in made.summary["concepts"]] == ["greatness", "even"]
    assert (made.summary["concepts"][1]["n_characters"], made.summary["concepts"][1]["n_controls"]) == (3, 10)
    rows = rows_of(made, "hypotheses")
    before = {row["latent"]: row["effect"] for row in rows_of(tables, "hypotheses")}
    assert {row["latent"]: row["effect"] for row in rows if row["concept"] == "greatness"} == before
    trials = rows_of(made, "causal")
    tried = {row["latent"] for row in trials if row["kind"] == "steer"}
    moved = {row["latent"] for row in rows if row["concept"] == "even" and row["causal_effect"] is not None}
    assert tried == moved and len(tried) == 2 and {row["concept"] for row in trials} == {"even"}
    assert {"random", "difference of means"} <= {row["kind"] for row in trials}
    assert {row["pair"] for row in trials} == {f"p{n}" for n in range(3, 8)}, "only pairs that nobody looked at"
    own.write_text(own.read_text().replace("great-4", "great-0"))
    assert interpret.plan(ctx, Config(concept=["greatness", str(own)], causal=2)).identity != (
        interpret.plan(ctx, Config(concept=["greatness"], causal=2)).identity
    )


def test_a_snippet_is_read_token_by_token_and_leaves_nothing_behind(world: Context) -> None:
    text = "The café — Courage!"
    result = interpret.run(world, Config(text=text, top_k=3))
    tokens, top = result.summary["tokens"], result.summary["top"]
    assert result.artifact is None and "".join(tokens) == text
    assert all(set(row) == {"token", "position", "latent", "activation"} for row in top)
    assert all(row["token"] == tokens[row["position"]] and row["activation"] > 0 for row in top)
    positions = [row["position"] for row in top]
    assert positions == sorted(positions) and max(positions.count(p) for p in positions) == 3
    assert result.view["strip"]["tokens"] == tokens and len(result.view["strip"]["strength"]) == len(tokens)


def test_a_snippet_agrees_with_model_and_sae_by_hand(world: Context) -> None:
    from greatctl.model.tokenizer import encode
    from greatctl.sae.folder import load as load_sae

    model = load(world.project.root / "model", name="m")
    ids = encode(model.tokenizer, "He rose.")
    acts = model.capture(torch.tensor([ids]), [SITE])[SITE][0]
    latents = load_sae(world.project.saes / "tiny").encode(acts)[1:]
    row = interpret.run(world, Config(text="He rose.", top_k=1)).summary["top"][-1]
    assert row["latent"] == int(latents[-1].argmax())
    assert row["activation"] == pytest.approx(float(latents[-1].max()), rel=1e-5)


def test_one_latent_is_a_page(world: Context, tables) -> None:
    latent = tables.summary["hypotheses"][0]["latent"]
    result = interpret.run(world, Config(latent=latent))
    assert result.up_to_date and result.summary["latent"] == latent
    assert {"density", "max", "units", "top_logits", "examples", "contrast"} <= set(result.summary)
    assert result.summary["examples"][0]["rank"] == 0 and len(result.summary["units"]) == len(SIX)
    json.dumps(result.summary, allow_nan=False)
    assert (result.summary["n_latents"], result.summary["hypotheses"]) == (D_SAE, tables.summary["hypotheses"])
    assert (
        result.view["page"]["latent"] == latent
        and tables.summary["hypotheses"][0]["verdict"] in result.view["headline"]
    )


@pytest.mark.parametrize("latent", [-1, D_SAE])
def test_a_latent_out_of_range_is_refused_with_the_bounds(world: Context, latent: int) -> None:
    with pytest.raises(ManifestError, match="out of range") as caught:
        interpret.plan(world, Config(latent=latent))
    assert f"0 to {D_SAE - 1}" in caught.value.why


def test_words_that_make_no_sense_are_refused(world: Context) -> None:
    for config in (Config(text="  "), Config(concept=["greatnes"]), Config(text="a", latent=1)):
        with pytest.raises(UsageError):
            interpret.plan(world, config)
    with pytest.raises(UsageError, match="tokens"):
        interpret.run(world, Config(text="word " * 80))
    with pytest.raises(InputError) as caught:
        interpret.plan(world, Config(sae="tinny"))
    assert "tiny" in caught.value.fix


def test_without_anything_made_the_next_command_is_named(tmp_path: Path) -> None:
    (tmp_path / "sources.toml").write_text('[model]\nname = "bundled"\n')
    project = Project(tmp_path, manifest.load(tmp_path / "sources.toml"), tmp_path / "data", tmp_path / "results")
    with pytest.raises(InputError) as caught:
        interpret.plan(context(project), Config())
    assert "greatctl train" in caught.value.fix
    _sae(project, "lonely", "bundled", "gone")
    with pytest.raises(InputError) as caught:
        interpret.plan(context(project), Config())
    assert f"greatctl harvest --hook-point {SITE}" in caught.value.fix


def test_a_flipped_bit_in_the_sae_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "sources.toml").write_text('[model]\nname = "bundled"\n')
    project = Project(tmp_path, manifest.load(tmp_path / "sources.toml"), tmp_path / "data", tmp_path / "results")
    weights = _sae(project, "bad", "bundled", "gone") / "sae_weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError):
        interpret.plan(context(project), Config())


def test_an_sae_folder_from_elsewhere_is_read_by_its_path(world: Context, tmp_path: Path) -> None:
    torch.manual_seed(5)
    folder = tmp_path / "foreign"
    save(
        folder,
        TopK(TopK.Config(d_in=32, d_sae=16, k=2)),
        1.0,
        Origin(str(world.project.root / "model"), SITE, WINDOW),
    )
    result = interpret.run(world, Config(text="He rose.", sae=str(folder)))
    assert max(row["latent"] for row in result.summary["top"]) < 16
    plan = interpret.plan(world, Config(sae=str(folder)))
    assert plan.final == world.project.features / "foreign" and plan.facts["d_sae"] == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"d_sae": None},
        {"d_sae": "many"},
        {"d_in": 0},
        {"metadata": {"hook_name": 4}},
        {"metadata": ["odd"], "d_in": []},
    ],
)
def test_an_odd_cfg_from_elsewhere_is_refused(world: Context, tmp_path: Path, changes: dict) -> None:
    folder = tmp_path / "odd"
    save(folder, TopK(TopK.Config(d_in=32, d_sae=16, k=2)), 1.0, Origin("bundled", SITE, WINDOW))
    cfg = json.loads((folder / "cfg.json").read_text())
    write_json(folder / "cfg.json", {k: v for k, v in {**cfg, **changes}.items() if v is not None})
    with pytest.raises(InputError, match="not that of an SAE") as caught:
        interpret.plan(world, Config(sae=str(folder)))
    assert caught.value.exit_code == 5


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    ctx = make_world(tmp_path, {"great-0": "character"})
    training = {"arch": "topk", "hook_point": SITE, "model": str(tmp_path / "model")}
    write_json(tmp_path / "sae" / "training.json", {**training, "model_revision": revision_of(str(tmp_path / "model"))})
    for name in ("cfg.json", "sae_weights.safetensors"):
        (tmp_path / "sae" / name).write_bytes((ctx.project.saes / "tiny" / name).read_bytes())
    text = Config(text="He rose.", sae=str(tmp_path / "sae"))
    assert interpret.run(ctx, text).summary["top"]
    save_tiny(tmp_path / "model", seed=1)
    for config in (text, Config()):
        with pytest.raises(InputError, match="is not the model that was harvested"):
            interpret.run(ctx, config)
    write_json(tmp_path / "sae" / "training.json", {**training, "model_revision": "another"})
    with pytest.raises(InputError, match="no activations that sae can read"):
        interpret.plan(ctx, Config(sae=str(tmp_path / "sae")))


def test_the_plugin_that_reads_an_sae_is_part_of_what_the_features_are(world: Context, tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    save(folder, TopK(TopK.Config(d_in=32, d_sae=16, k=2)), 1.0, Origin("bundled", SITE, WINDOW))
    cfg = json.loads((folder / "cfg.json").read_text())
    write_json(folder / "cfg.json", {**cfg, "architecture": "odd"})
    plugins = load_plugins(folder=None, enabled=False)
    template = Item("", "", "", "odd", digest="d1")
    plugins.registry.registrar("architectures", template)("odd", "odd:Odd")
    ctx = replace(world, plugins=plugins)
    identity = interpret.plan(ctx, Config(sae=str(folder))).identity
    assert identity is not None and identity.plugins == {"architectures/odd": "d1"}
    identity = interpret.plan(ctx, Config()).identity
    assert identity is not None and identity.plugins == {}


def test_two_characters_and_two_controls_are_underpowered_not_an_error(tmp_path: Path) -> None:
    few = {"great-0": "character", "great-1": "seed", "plain-0": "control", "plain-1": "control"}
    result = interpret.run(make_world(tmp_path, few), Config())
    assert {row["verdict"] for row in result.summary["hypotheses"]} == {"underpowered"}
    assert "nothing can be told" in result.summary["power"]


def test_without_controls_the_tables_are_made_all_the_same(tmp_path: Path) -> None:
    result = interpret.run(make_world(tmp_path, {"great-0": "character"}), Config())
    assert {row["verdict"] for row in result.summary["hypotheses"]} == {"underpowered"}
    assert rows_of(result, "examples")


def test_subjects_take_the_authors_place_where_one_hand_wrote_everything(tmp_path: Path) -> None:
    ctx = make_world(tmp_path, SIX, one_author=True)
    by_author = interpret.run(ctx, Config())
    assert {row["verdict"] for row in by_author.summary["hypotheses"]} == {"underpowered"}
    by_subject = interpret.run(ctx, Config(unit="subject"))
    assert "6 subjects of characters" in by_subject.summary["power"]
    assert by_subject.summary["unit"] == "subject" and by_subject.summary["n_characters"] == 6
    assert {row["unit"] for row in rows_of(by_subject, "units")} == set(SIX)


def test_a_stop_is_obeyed_and_leaves_no_half_artifact(world: Context) -> None:
    ctx = replace(world, force=True, run=Run("interpret"))
    ctx.run.stop.request(2)
    before = (world.project.features / "tiny" / "artifact.json").read_bytes()
    with pytest.raises(InterruptedRun):
        interpret.run(ctx, Config(seed=1))
    assert (world.project.features / "tiny" / "artifact.json").read_bytes() == before
