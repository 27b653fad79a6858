"""Other programs' folders: each is opened by its formula, and what is not known is refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_folders import ARCHITECTURES, BOTH, ORIGIN, coder_of, rows
from sae_folders_foreign import (
    D,
    F,
    Written,
    dictionary,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    llamascopium,
    sparsify,
)
from safetensors.torch import load_file, save_file

from greatctl.errors import InputError, IntegrityError, UsageError
from greatctl.sae.coder import Coder
from greatctl.sae.folder import Origin, describe, export, load, save
from greatctl.sae.foreign_names import hook_of, module_of, submodule_of

MLP = {"hook_point_in": "blocks.3.ln2.hook_normalized", "hook_point_out": "blocks.3.hook_mlp_out"}
CLASSES = ("AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")
CLASSES += ("JumpReluAutoEncoder", "GatedAutoEncoder")
LAYOUTS: dict[str, Callable[[Path], Written]] = {
    "sparsify": lambda at: sparsify(at),
    "sparsify, size by factor": lambda at: sparsify(at, num_latents=0),
    "sparsify skip": lambda at: sparsify(at, skip_connection=True),
    "sparsify transcode": lambda at: sparsify(at, "layers.3.mlp", transcode=True),
    "sparsify skip transcode": lambda at: sparsify(at, "layers.3.mlp", transcode=True, skip_connection=True),
    **{name: lambda at, name=name: dictionary(at / "trainer_0", name) for name in CLASSES},
    "Llama Scope": lambda at: llama_scope(at / "sae"),
    "Llama Scope transcoder": lambda at: llama_scope(at / "sae", **MLP),
    "llamascopium": lambda at: llamascopium(at / "sae"),
    "llamascopium plain norm": lambda at: llamascopium(at / "sae", sparsity_include_decoder_norm=False),
    "llamascopium folded": lambda at: llamascopium(at / "sae", norm_activation="inference", use_decoder_bias=False),
    "llamascopium relu glu": lambda at: llamascopium(at / "sae", act_fn="relu", use_glu_encoder=True),
    "llamascopium topk": lambda at: llamascopium(at / "sae", act_fn="topk", sae_type="matryoshka_sae"),
    "llamascopium transcoder": lambda at: llamascopium(at / "sae", **MLP),
    "llamascopium relu transcoder": lambda at: llamascopium(at / "sae", act_fn="relu", **MLP),
    "llamascopium topk transcoder": lambda at: llamascopium(at / "sae", act_fn="topk", **MLP),
    "Gemma Scope": lambda at: gemma_scope(at / "layer_20" / "width_16k"),
    "Gemma Scope, factor 1": lambda at: gemma_scope(at / "sae", factor=1.0),
    "Gemma Scope 2": lambda at: gemma_scope_2(at / "sae"),
    "Gemma Scope 2 skip": lambda at: gemma_scope_2(
        at / "sae",
        hf_hook_point_in="model.layers.3.pre_feedforward_layernorm.output",
        hf_hook_point_out="model.layers.3.post_feedforward_layernorm.output",
        affine_connection=True,
    ),
}


# ---------------------------------------------------------------- read


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_foreign_folder_computes_its_formula(tmp_path: Path, name: str) -> None:
    written = LAYOUTS[name](tmp_path)
    sae, x = load(written.folder), rows()
    latents, outputs = written.formula(x.double())
    assert torch.allclose(sae.encode(x).double(), latents, atol=1e-5)
    assert torch.allclose(sae.reconstruct(x).double(), outputs, atol=2e-5)
    assert 0.02 < float((latents > 0).double().mean()) < 0.9
    assert (sae.arch, sae.d_in, sae.d_sae, sae.d_out) == (written.arch, D, latents.shape[1], D)
    cfg, files = describe(written.folder)
    assert (cfg["d_in"], cfg["d_sae"]) == (D, sae.d_sae) and all((written.folder / file).is_file() for file in files)
    if written.hook_point:
        assert (sae.hook_point, sae.target_hook_point) == (written.hook_point, written.target)
        assert cfg["metadata"]["model_name"] == written.model


def test_a_width_that_is_not_the_sae_s_is_refused_by_name(tmp_path: Path) -> None:
    sae = load(sparsify(tmp_path).folder)
    for read in (sae.encode, sae.reconstruct):
        with pytest.raises(InputError, match="reads 12 numbers, and was given 13"):
            read(torch.zeros(2, 13))


def test_places_are_named_as_transformer_lens_names_them(tmp_path: Path) -> None:
    run = {"model": "EleutherAI/pythia-70m"}
    for hookpoint, more, hook, target in (
        ("layers.3", {}, "blocks.3.hook_resid_post", None),
        ("gpt_neox.layers.3.attention", {}, "blocks.3.hook_attn_out", None),
        ("h.3.mlp", {}, "blocks.3.hook_mlp_out", None),
        ("layers.3.mlp", {"transcode": True}, "blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ("layers.3", {"transcode": True}, "blocks.3.hook_resid_pre", "blocks.3.hook_resid_post"),
        ("blocks.3.hook_resid_mid", {}, "blocks.3.hook_resid_mid", None),
        ("somewhere", {}, None, None),
    ):
        root = tmp_path / f"{hookpoint}-{len(more)}"
        sae = load(sparsify(root, hookpoint, run=run, **more).folder)
        assert (sae.hook_point, sae.target_hook_point) == (hook, target)
        assert sae.cfg["metadata"]["model_name"] == run["model"]
    trainers = (("mlp_out_layer_2", "blocks.2.hook_mlp_out"), ("model.layers.5", "blocks.5.hook_resid_post"))
    for number, (submodule, hook) in enumerate((*trainers, (None, "blocks.3.hook_resid_post"), ("odd", None))):
        made = dictionary(tmp_path / f"trainer_{number}", "BatchTopKSAE", submodule_name=submodule)
        assert load(made.folder).hook_point == hook
    gemma = gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71")
    sae = load(gemma.folder)
    assert (sae.hook_point, sae.cfg["metadata"]["model_name"]) == ("blocks.20.hook_resid_post", "google/gemma-2-2b")
    second = load(gemma_scope_2(tmp_path / "second").folder)
    assert (second.hook_point, second.cfg["metadata"]["model_name"]) == (
        "blocks.3.hook_resid_post",
        "google/gemma-3-1b-pt",
    )
    scope = load(llama_scope(tmp_path / "Llama3_1-8B-Base-L3R-8x").folder)
    assert scope.cfg["metadata"]["model_name"] == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    "kind", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out", "hook_attn_out"]
)
def test_a_place_comes_back_from_other_programs_words(kind: str) -> None:
    name = f"blocks.4.{kind}"
    same = {name, "blocks.3.hook_resid_post"} if kind == "hook_resid_pre" else {name}  # one tensor, two names
    assert hook_of(module_of(name)) in same
    assert submodule_of(name)[0] == 4 and hook_of(submodule_of(name)[1]) == name


def test_a_transcoder_s_module_is_named_by_both_its_places() -> None:
    assert module_of("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out") == "layers.3.mlp"
    assert module_of("blocks.3.hook_resid_pre", "blocks.3.hook_resid_post") == "layers.3"
    assert module_of("blocks.3.hook_resid_mid", "blocks.3.hook_mlp_out") == "blocks.3.hook_resid_mid"
    assert hook_of(module_of("blocks.0.hook_resid_pre")) == "blocks.0.hook_resid_pre"


# ---------------------------------------------------------------- refused


def test_a_run_of_several_saes_names_them(tmp_path: Path) -> None:
    for hookpoint in ("layers.10", "layers.2"):
        sparsify(tmp_path / "run", hookpoint)
    for trainer in (0, 1):
        dictionary(tmp_path / "sweep" / "resid_post_layer_3" / f"trainer_{trainer}", "BatchTopKSAE")
    for folder, names in (
        ("run", "layers.2, layers.10"),
        ("sweep", "resid_post_layer_3/trainer_0, resid_post_layer_3/trainer_1"),
    ):
        for reading in (load, describe):
            with pytest.raises(InputError, match="holds some") as caught:
                reading(tmp_path / folder)
            assert names in caught.value.why and caught.value.fix.endswith(names.partition(",")[0])


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    inside = "model.layers.3.self_attn.o_proj.input"
    made = {
        "groupmax": sparsify(tmp_path / "a", activation="groupmax"),
        "IdentityDict": dictionary(tmp_path / "b", "BatchTopKSAE", dict_class="IdentityDict"),
        "batchtopk": llamascopium(tmp_path / "c", act_fn="jumprelu"),
        "token-wise": llamascopium(tmp_path / "d", norm_activation="token-wise"),
        "crosscoder": llamascopium(tmp_path / "e", sae_type="crosscoder"),
        "gated_scope": gemma_scope_2(tmp_path / "f", architecture="gated_scope"),
        "attention heads": gemma_scope_2(tmp_path / "g", hf_hook_point_in=inside),
        "embeddings": gemma_scope(tmp_path / "gemma-scope-2b-pt-res" / "embedding" / "width_4k" / "average_l0_6"),
    }
    path = made["batchtopk"].folder / "config.json"
    path.write_text(path.read_text().replace('"jumprelu"', '"batchtopk"'))
    for words, written in made.items():
        with pytest.raises(InputError, match=words) as caught:
            load(written.folder)
        assert caught.value.why and caught.value.fix and caught.value.exit_code == 5, words


def test_rows_that_are_not_unit_are_refused_where_the_threshold_depends_on_them(tmp_path: Path) -> None:
    written = llama_scope(tmp_path / "sae")
    path = written.folder / "checkpoints" / "final.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "decoder.weight": tensors["decoder.weight"] * 2}, path)
    with pytest.raises(InputError, match="not of norm 1"):
        load(written.folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["sae.safetensors"], "sparsify, but cfg.json is missing"),
        (["ae.pt"], "dictionary_learning, but config.json is missing"),
        (["hyperparams.json"], "Llama Scope, but checkpoints/final.safetensors is missing"),
        (["sae_weights.safetensors"], "Llama Scope 2, but cfg.json or config.json is missing"),
        (["params.safetensors"], "Gemma Scope 2, but config.json is missing"),
        (["sae_weights.dcp"], "distributed checkpoint"),
        (["layer3.sae.pt"], "Qwen-Scope"),
        (["sae.pth"], "Goodfire"),
        ([], "no cfg.json with sae_weights.safetensors"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_by_its_layout(tmp_path: Path, files: list[str], words: str) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert words in caught.value.why


def test_tensors_that_are_not_the_layout_s_are_damage(tmp_path: Path) -> None:
    def broken(written: Written, file: str, **change: torch.Tensor | None) -> Path:
        path = written.folder / file
        tensors = {**load_file(path), **change}
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        return written.folder

    def edited(written: Written, file: str, old: str, new: str) -> Path:
        path = written.folder / file
        path.write_text(path.read_text().replace(old, new))
        return written.folder

    norm = "dataset_average_activation_norm.blocks.3.hook_resid_post"
    for folder, words in (
        (broken(sparsify(tmp_path / "a"), "sae.safetensors", b_dec=None), "b_dec is missing"),
        (broken(sparsify(tmp_path / "b"), "sae.safetensors", W_skip=torch.zeros(D, D)), "W_skip is not in this layout"),
        (broken(sparsify(tmp_path / "c"), "sae.safetensors", W_dec=torch.zeros(F, D + 1)), "W_dec is"),
        (broken(sparsify(tmp_path / "d"), "sae.safetensors", b_dec=torch.full((D,), torch.nan)), "NaN"),
        (broken(llamascopium(tmp_path / "e"), "sae_weights.safetensors", **{norm: None}), "no positive number"),
        (edited(sparsify(tmp_path / "f"), "cfg.json", '"d_in": 12', '"d_in": "12"'), "d_in"),
        (edited(sparsify(tmp_path / "g"), "cfg.json", '"k": 4', '"k": 41'), "above d_sae"),
        (edited(llama_scope(tmp_path / "h"), "hyperparams.json", "8.81", "0"), "no positive number"),
        (edited(dictionary(tmp_path / "i", "BatchTopKSAE"), "config.json", '"k": 4', '"k": 5'), "k is"),
        (edited(dictionary(tmp_path / "j", "BatchTopKSAE"), "config.json", '"trainer"', '"t"'), "missing: trainer"),
        (gemma_scope(tmp_path / "k", factor=2.0).folder, "scaling_factor"),
    ):
        with pytest.raises(IntegrityError) as caught:
            load(folder)
        assert words in caught.value.why, words


def test_nothing_foreign_is_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple:
            return (canary.write_text, ("unpickled",))

    theirs = dictionary(tmp_path / "trainer_0", "BatchTopKSAE").folder
    scope = gemma_scope(tmp_path / "scope").folder
    arrays = dict(np.load(scope / "params.npz"))
    np.savez(scope / "params.npz", **arrays, bomb=np.array([Bomb()], dtype=object))
    with pytest.raises(IntegrityError):
        load(scope)
    for bomb in (pickle.dumps(Bomb(), protocol=2), b"", b"PK\x03\x04torn"):
        (theirs / "ae.pt").write_bytes(bomb)
        with pytest.raises(IntegrityError, match="damaged"):
            load(theirs)
    torch.save([1, 2], theirs / "ae.pt")
    with pytest.raises(IntegrityError) as caught:
        load(theirs)
    assert "no dictionary of tensors" in caught.value.why and not canary.exists()


# ---------------------------------------------------------------- written

TO_SPARSIFY = ("topk", "batchtopk", "matryoshka", "transcoder", "skip-transcoder")
TO_DICTIONARY = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu", "gated")


def finished(folder: Path, name: str) -> Path:
    """A saved SAE whose sites have one width."""
    coder = coder_of(name)
    if coder.reads_target:
        coder = _square(coder)
    save(folder, coder, 3.7, BOTH if coder.reads_target else ORIGIN, target_scale=0.3)
    return folder


def _square(coder: Coder) -> Coder:
    torch.manual_seed(4)
    made = type(coder)(coder.config.model_copy(update={"d_out": D}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    made.after_step()
    made.calibrate(rows(500, seed=1))
    return made


@pytest.mark.parametrize("name", TO_DICTIONARY)
def test_dictionary_learning_s_layout_keeps_latents_and_outputs(tmp_path: Path, name: str) -> None:
    ours = load(finished(tmp_path / "ours", name))
    back, x = load(export(tmp_path / "ours", "dictionary_learning")), rows() / 3.7
    assert torch.allclose(back.encode(x), ours.encode(x), atol=1e-5)
    assert torch.allclose(back.reconstruct(x), ours.reconstruct(x), atol=1e-5)
    assert (back.hook_point, back.cfg["metadata"]["model_name"]) == (ORIGIN.hook_point, ORIGIN.model_name)
    assert back.arch == {"relu": "standard"}.get(name, name)


@pytest.mark.parametrize("name", TO_SPARSIFY)
def test_sparsify_s_layout_keeps_k_latents_a_token_and_says_where_that_differs(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    ours = load(finished(tmp_path / "ours", name))
    back, x = load(export(tmp_path / "ours", "sparsify", say=said.append)), rows() / 3.7
    weights = load_file(tmp_path / "ours" / "sae_weights.safetensors")
    p = (x if ours.target_hook_point else x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    order = p.argsort(dim=1, descending=True)[:, :4]
    winners = torch.zeros_like(p).scatter(1, order, p.gather(1, order).clamp_min(0))
    assert torch.allclose(back.encode(x), winners, atol=1e-5) and torch.allclose(back.W_dec, ours.W_dec)
    skip = x @ weights["W_skip"].T if "W_skip" in weights else 0
    assert torch.allclose(back.reconstruct(x), winners @ weights["W_dec"] + weights["b_dec"] + skip, atol=1e-5)
    assert (back.hook_point, back.target_hook_point) == (ours.hook_point, ours.target_hook_point)
    assert back.cfg["metadata"]["model_name"] == ORIGIN.model_name
    if name == "topk":
        assert torch.allclose(back.encode(x), ours.encode(x), atol=1e-5) and not said
    else:
        assert len(said) == 1 and "exactly k = 4" in said[0] and name in said[0]


@pytest.mark.parametrize("form", ["sparsify", "dictionary_learning"])
def test_an_architecture_that_the_other_program_has_not_is_refused_with_what_it_has(tmp_path: Path, form: str) -> None:
    has = {"sparsify": TO_SPARSIFY, "dictionary_learning": TO_DICTIONARY}[form]
    for name in sorted(ARCHITECTURES.keys() - set(has)):
        with pytest.raises(UsageError, match=f"{name} cannot be exported to {form}") as caught:
            export(finished(tmp_path / name, name), form)
        assert all(other in caught.value.why for other in has) and "--export saelens" in caught.value.fix


def test_a_plugin_s_architecture_is_exported_as_a_state_dict_alone(tmp_path: Path) -> None:
    folder = finished(tmp_path, "topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**cfg, "architecture": "soft"}))
    for form in ("saelens", "sparsify", "dictionary_learning"):
        with pytest.raises(UsageError, match=f"soft cannot be exported to {form}") as caught:
            export(folder, form)
        assert "--export pth" in caught.value.fix
    assert export(folder, "pth").is_file()


def test_a_transcoder_of_two_widths_has_no_place_in_sparsify(tmp_path: Path) -> None:
    save(tmp_path, coder_of("transcoder"), 1.0, BOTH)
    with pytest.raises(UsageError, match="no place in sparsify") as caught:
        export(tmp_path, "sparsify")
    assert "reads 12 and writes 9" in caught.value.why


def test_sparsify_s_folder_is_called_after_its_module(tmp_path: Path) -> None:
    save(tmp_path, coder_of("topk"), 1.0, Origin("toy", "blocks.1.hook_resid_post", 17))
    place = export(tmp_path, "sparsify")
    assert place == tmp_path / "exports" / "sparsify" / "layers.1"
    cfg = json.loads((place / "cfg.json").read_text())
    assert (cfg["activation"], cfg["num_latents"], cfg["k"], cfg["d_in"]) == ("topk", 40, 4, 12)
