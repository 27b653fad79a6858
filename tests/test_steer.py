"""Steering: the delta clamp changes what it says and nothing else, text grows as with no cache, and nothing is hidden."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text
from tiny_llama import context, make_project, save_tiny
from transformers import GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM

from greatctl import manifest, model
from greatctl.cli.views import render
from greatctl.errors import GreatctlError, InputError, ManifestError, UsageError
from greatctl.features.steering import Steering, difference_in_means, random_directions, rows_of, to_value, unit
from greatctl.model.generate import Growing, generate
from greatctl.model.interface import FrozenModel, Intervention
from greatctl.sae.folder import Origin, load, save
from greatctl.sae.topk import TopK, TopKConfig
from greatctl.stages import steer
from greatctl.stages.branches import Branch
from greatctl.stages.context import Context, Project
from greatctl.stages.steered import Steered, Way

HOOK = "blocks.1.hook_resid_post"
PROMPT = "The ship’s carpenter rose"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and `sae`, an SAE of its residual stream that was never trained."""
    path = tmp_path_factory.mktemp("steer")
    save_tiny(path / "model", max_position_embeddings=256)
    torch.manual_seed(1)
    coder = TopK(TopKConfig(d_in=32, d_sae=64, k=6))
    torch.nn.init.normal_(coder.b_enc, std=0.1)
    save(path / "sae", coder, 1.0, Origin(str(path / "model"), HOOK, 64))
    return path


@pytest.fixture(scope="module")
def llama(folder: Path) -> FrozenModel:
    return model.load(folder / "model", name="tiny", device="cpu")


@pytest.fixture
def project(folder: Path, tmp_path: Path) -> Project:
    return make_project(tmp_path, {})


def _firing(folder: Path, llama: FrozenModel) -> int:
    """A latent that is active somewhere in the prompt."""
    sae, x = load(folder / "sae"), llama.capture(_ids(llama), [HOOK])[HOOK][0, 1:]
    return int(sae.encode(x).amax(dim=0).argmax())


def _ids(llama: FrozenModel, text: str = PROMPT) -> torch.Tensor:
    return torch.tensor([model.encode(llama.tokenizer, text)])


def _push(amount: float, d: int = 32, site: str = HOOK) -> Any:
    steering = Steering(random_directions(1, d, 3)[0], amount)
    return lambda tokens: [Intervention(site, lambda value: steering(value, tokens != 0))]


def test_the_clamp_adds_what_the_decoder_makes_of_the_change_and_leaves_the_error(folder: Path) -> None:
    sae, x = load(folder / "sae"), 3 * torch.randn(2, 5, 32)
    acts = sae.encode(x.flatten(0, 1))
    latent = int(acts.amax(dim=0).argmax())
    for value in (0.0, 4.5):
        there = Steering(unit(rows_of(sae, [latent])[0]), to_value(sae, latent, value))
        moved = there(x, torch.ones(2, 5, dtype=torch.bool))
        clamped = acts.clone()
        clamped[:, latent] = value
        by_hand = x.flatten(0, 1) + sae.decode(clamped) - sae.decode(acts)
        assert torch.allclose(moved.flatten(0, 1), by_hand, atol=1e-5)
        silent = (acts[:, latent] == value).view(2, 5)
        assert torch.equal(moved[silent], x[silent])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_change_of_nothing_hands_back_the_very_tensor(folder: Path, dtype: torch.dtype) -> None:
    sae, x = load(folder / "sae"), torch.randn(2, 5, 32).to(dtype)
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    never = int((sae.encode(x.flatten(0, 1).float()).amax(dim=0) == 0).nonzero()[0])
    row = unit(rows_of(sae, [never])[0])
    assert Steering(row, 0.0)(x, everywhere) is x
    assert Steering(row, to_value(sae, never, 0.0))(x, everywhere) is x
    assert Steering(row, 5.0)(x, ~everywhere) is x
    moved = Steering(row, 5.0)(x, everywhere)
    assert moved.dtype == dtype and not torch.equal(moved, x)


def test_only_the_places_that_are_asked_for_move_and_sites_with_heads_are_served() -> None:
    value, where = torch.randn(2, 3, 4, 8), torch.tensor([[False, True, True], [False, False, True]])
    moved = Steering(random_directions(1, 32, 0)[0], 2.0)(value, where)
    assert torch.equal(moved[~where], value[~where])
    assert torch.allclose((moved - value)[where].flatten(1).norm(dim=1), torch.tensor(2.0))


def test_a_decoder_that_is_not_affine_is_refused() -> None:
    class Curved:
        W_dec = torch.randn(8, 4)

        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.W_dec.T

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return (latents @ self.W_dec) ** 2

    with pytest.raises(GreatctlError, match="one by one"):
        rows_of(Curved(), [1, 2])


def test_random_directions_are_of_norm_one_and_do_not_depend_on_how_many() -> None:
    assert torch.equal(random_directions(5, 32, 7)[:2], random_directions(2, 32, 7))
    assert torch.allclose(random_directions(5, 32, 7).norm(dim=1), torch.ones(5))


FAMILIES = {
    "llama": (LlamaForCausalLM, {}),
    "gpt2": (GPT2LMHeadModel, {"n_inner": 48}),
    "sliding": (MistralForCausalLM, {"sliding_window": 5}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_is_uncached_generation(family: str, tmp_path: Path) -> None:
    kind, settings = FAMILIES[family]
    save_tiny(tmp_path, model=kind, **settings)
    tiny = model.load(tmp_path, name=family, device="cpu")
    ids, steer_by = _ids(tiny), _push(3.0)
    with_cache, without = Growing(tiny, steer_by), Growing(tiny, steer_by, cached=False)
    for piece in (ids, torch.tensor([[70]]), torch.tensor([[80]]), torch.tensor([[90]])):
        a, b = with_cache.feed(piece), without.feed(piece)
        assert torch.allclose(a, b, atol=1e-4 * float(b.abs().max()))
    for changed in (None, steer_by):
        texts = [generate(tiny, ids[0].tolist(), 12, steer=changed, cached=cached) for cached in (True, False)]
        assert texts[0] == texts[1]


def test_the_cache_is_that_of_the_steered_run(llama: FrozenModel) -> None:
    """Steering the prompt alone moves what comes after it, through keys and values."""

    def prompt_only(tokens: torch.Tensor) -> Sequence[Intervention]:
        return _push(6.0)(tokens) if tokens.shape[1] > 1 else ()

    plain, steered = Growing(llama), Growing(llama, prompt_only)
    for growing in (plain, steered):
        growing.feed(_ids(llama))
    token = torch.tensor([[70]])
    assert (plain.feed(token) - steered.feed(token)).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_strength_0_writes_the_unsteered_text_and_the_same_bits(llama: FrozenModel, temperature: float) -> None:
    ids = _ids(llama)
    assert torch.equal(Growing(llama, _push(0.0)).feed(ids), Growing(llama).feed(ids))
    words = {"temperature": temperature, "seed": 5}
    plain = generate(llama, ids[0].tolist(), 10, **words)
    assert generate(llama, ids[0].tolist(), 10, steer=_push(0.0), **words) == plain
    assert generate(llama, ids[0].tolist(), 10, steer=_push(20.0), **words) != plain


def test_draws_follow_the_seed(llama: FrozenModel) -> None:
    texts = [generate(llama, [0, 40], 12, temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_half_precision_is_steered_too(folder: Path) -> None:
    half = model.load(folder / "model", name="tiny", device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert generate(half, [0, 40], 6, steer=_push(0.0)) == generate(half, [0, 40], 6)
    assert len(generate(half, [0, 40], 6, steer=_push(5.0))) <= 6


def test_the_difference_in_means_weighs_units_equally_and_leaves_held_out_ones_unseen() -> None:
    totals = torch.tensor([[4.0, 0.0], [8.0, 0.0], [0.0, 30.0], [2.0, 2.0], [900.0, 9.0]], dtype=torch.float64)
    counts = torch.tensor([2, 2, 10, 2, 1])
    roles = ["character"] * 3 + ["control", "character"]
    units, splits = ["a", "a", "b", "c", "d"], ["train"] * 4 + ["heldout-author"]
    found = difference_in_means(totals, counts, roles, units, splits)
    assert found is not None
    assert found.tolist() == [((2 + 4) / 2 + 0) / 2 - 1, (0 + 3) / 2 - 1]
    assert difference_in_means(totals, counts, ["character"] * 5, units, splits) is None


def _run(project: Project, folder: Path, latent: int, **settings: Any) -> Any:
    config = steer.Config(latent=latent, sae=str(folder / "sae"), **settings)
    return steer.run(context(project, "steer"), config)


def test_every_text_comes_with_its_distance_and_its_price(folder: Path, llama: FrozenModel, project: Project) -> None:
    latent = _firing(folder, llama)
    result = _run(project, folder, latent, prompt=[PROMPT, "He mended"], tokens=6, strength=1.5)
    summary = result.summary
    assert json.dumps(summary, allow_nan=False)
    assert (summary["prompt"], summary["strength"], summary["missing"]) == (PROMPT, 1.5, ["diff-means"])
    assert [t["kind"] for t in summary["texts"]] == ["none", "latent", "random", "prompt"]
    none, by_latent, random, _ = summary["texts"]
    assert none["kl"] == 0 and by_latent["kl"] > 0 and random["kl"] > 0
    assert by_latent["norms"] == random["norms"] > 0
    assert [row["prompt"] for row in summary["prompts"]] == [PROMPT, "He mended"]
    tokens = generate(llama, _ids(llama)[0].tolist(), 6)
    assert llama.tokenizer.decode(_ids(llama)[0].tolist() + tokens).endswith(none["text"])


def test_the_price_grows_with_the_strength_and_is_nothing_at_0(
    folder: Path, llama: FrozenModel, project: Project
) -> None:
    latent, found = _firing(folder, llama), []
    for strength in (0.0, 4.0, 16.0):
        rows = _run(project, folder, latent, prompt=[PROMPT], tokens=4, strength=strength, against=["none"])
        none, steered = rows.summary["texts"]
        found.append((steered["kl"], abs(steered["perplexity"] / none["perplexity"] - 1)))
        if not strength:
            assert steered["text"] == none["text"] and found[0] == (0.0, 0.0)
    assert found == sorted(found) and found[0][0] < found[1][0] < found[2][0]


@pytest.mark.parametrize("settings", [{"strength": -2.0}, {"clamp": 3.0}, {"clamp": 0.0}])
def test_the_activation_that_a_steered_run_goes_on_from_is_the_one_by_hand(
    folder: Path, llama: FrozenModel, project: Project, settings: dict
) -> None:
    """And the random direction moves every place exactly as far."""
    latent, sae, ids = _firing(folder, llama), load(folder / "sae"), _ids(llama)
    config = steer.Config(latent=latent, sae=str(folder / "sae"), prompt=[PROMPT], tokens=1, seed=7, **settings)
    job, neutral = steer._prepare(context(project, "steer"), config), Branch(llama, HOOK, ids)
    peak = float(next(neutral.acts(sae))[:, latent].max())
    ways = {way.kind: way for way in steer._ways(config, job, sae, peak, None, neutral)}
    steered = Steered(llama, HOOK, [])

    def reached(way: Way) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        assert way.steering is not None
        look = Intervention(HOOK, lambda value: (seen.append(value.clone()), value)[1])
        llama.run(ids, [*steered._steer(way.steering)(ids), look])
        return seen[0][0]

    x = llama.capture(ids, [HOOK])[HOOK][0]
    acts = sae.encode(x)
    changed = acts.clone()
    changed[:, latent] = acts[:, latent] - 2.0 * peak if "strength" in settings else settings["clamp"]
    by_hand = x + sae.decode(changed) - sae.decode(acts)
    by_hand[0] = x[0]  # the BOS token is left alone
    assert torch.allclose(reached(ways["latent"]), by_hand, atol=1e-5)
    assert not torch.equal(by_hand, x)
    lengths = [(reached(ways[kind]) - x).norm(dim=1) for kind in ("latent", "random")]
    assert torch.allclose(*lengths, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_pushed_out_of_all_numbers_writes_nothing(folder: Path, project: Project) -> None:
    half = model.load(folder / "model", name="tiny", device="cpu", dtype="float16")
    steered, ids = Steered(half, HOOK, []), _ids(half)[0].tolist()
    too_far = Way("latent", Steering(random_directions(1, 32, 0)[0], 1e7), 1e6)
    none, lost = steered.texts(ids, [Way("none"), too_far], 3, 1.0, 0)
    assert (lost["text"], lost["kl"]) == ("", None) and none["text"]


def test_ablating_changes_nothing_where_the_latent_is_silent(folder: Path, project: Project) -> None:
    sae, tiny = load(folder / "sae"), model.load(folder / "model", name="tiny", device="cpu")
    branch = Branch(tiny, HOOK, _ids(tiny))
    silent = int((next(branch.acts(sae)).amax(dim=0) == 0).nonzero()[0])
    rows = _run(project, folder, silent, prompt=[PROMPT], tokens=1, clamp=0.0, against=["none"]).summary["texts"]
    assert rows[0]["text"] == rows[1]["text"]


def test_hostile_text_is_shown_and_never_obeyed(folder: Path, llama: FrozenModel, project: Project) -> None:
    hostile = "[/bold] [link=file:///etc/passwd]x[/link] \x1b[31mred \u202eevil <|end_of_text|>"
    latent = _firing(folder, llama)
    result = _run(project, folder, latent, prompt=[hostile], tokens=8, temperature=3.0, plain="\x1b]8;;x\x07 said")
    sink = io.StringIO()
    Console(file=sink, width=80, force_terminal=True, highlight=False).print(render(result))
    shown = sink.getvalue()
    assert "\x1b[31mred" not in shown and "\u202e" not in shown and "\x1b]8;" not in shown
    assert "[link=file" in shown
    assert max(map(len, Text.from_ansi(shown).plain.splitlines())) <= 80


@pytest.mark.parametrize(
    ("settings", "origins", "error", "words"),
    [
        ({"latent": None}, {}, UsageError, "no latent"),
        ({"latent": 64}, {}, ManifestError, "out of range"),
        ({"latent": -1}, {}, ManifestError, "out of range"),
        ({"latent": 1, "prompt": ["  "]}, {}, UsageError, "empty"),
        ({"latent": 1, "clamp": 0.0, "strength": 1.0}, {"strength": "flag --strength"}, UsageError, "exclude"),
        ({"latent": 1, "against": ["none", "random"]}, {}, UsageError, "excludes"),
        ({"latent": 1, "sae": "nowhere"}, {}, InputError, "no SAE"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_loaded(
    settings: dict, origins: dict, error: type[GreatctlError], words: str, folder: Path, project: Project
) -> None:
    ctx = context(project, "steer", origins=origins)
    with pytest.raises(error, match=words) as caught:
        steer.plan(ctx, steer.Config(**{"sae": str(folder / "sae"), **settings}))
    assert caught.value.fix


def test_without_an_sae_the_way_out_is_named(project: Project) -> None:
    with pytest.raises(InputError) as caught:
        steer.plan(context(project), steer.Config(latent=3))
    assert caught.value.exit_code == 5 and "greatctl train" in caught.value.fix


def test_a_prompt_that_does_not_fit_is_named(folder: Path, project: Project) -> None:
    with pytest.raises(UsageError, match="leaves no room"):
        _run(project, folder, 1, prompt=["carpenter " * 200])


def test_a_latent_that_never_fires_can_be_held_but_not_multiplied(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    coder = TopK(TopKConfig(d_in=32, d_sae=64, k=6))
    with torch.no_grad():
        coder.b_enc[5] = -1e4
    save(tmp_path / "sae", coder, 1.0, Origin(str(folder / "model"), HOOK, 64))
    project = make_project(tmp_path / "project", {})
    with pytest.raises(InputError, match="never fired") as caught:
        _run(project, tmp_path, 5, prompt=[PROMPT], tokens=2)
    assert "--clamp" in caught.value.fix
    held = _run(project, tmp_path, 5, prompt=[PROMPT], tokens=2, clamp=8.0, against=["none"]).summary
    assert held["form"] == "clamp" and held["texts"][1]["kl"] > 0


def test_one_latent_is_steered_and_a_second_is_never_dropped_in_silence() -> None:
    assert steer.Config.model_validate({"latent": [5]}).latent == 5
    with pytest.raises(ValueError, match="one latent"):
        steer.Config.model_validate({"latent": [5, 6]})
    for wrong in ({"strength": 1e300}, {"strength": -1e7}, {"clamp": 1e300}, {"clamp": -1.0}, {"tokens": 0}):
        with pytest.raises(ValueError):
            steer.Config.model_validate(wrong)


def test_every_flag_is_a_setting() -> None:
    import typer

    from greatctl.cli.commands import steer_
    from greatctl.cli.options import COMMON

    app = typer.Typer()
    steer_.register(app)
    callback = app.registered_commands[0].callback
    assert callback is not None
    own = set(callback.__annotations__) - {"ctx"} - set(COMMON)
    assert own == set(steer.Config.model_fields) - {"seed"}
    assert all(field.description for field in steer.Config.model_fields.values())


def test_the_demo_is_steered_beside_its_difference_in_means(demo: Path) -> None:
    project = Project(demo, manifest.load(demo / "sources.toml"), demo / "data", demo / "results")
    ctx = Context(project, plugins=None, run=context(project).run, device="cpu", offline=True)  # type: ignore[arg-type]
    hypotheses = json.loads(next((demo / "results" / "features").glob("*/run.json")).read_bytes())["summary"]
    latent = hypotheses["hypotheses"][0]["latent"]
    summary = steer.run(ctx, steer.Config(latent=latent, prompt=["He was a"], tokens=3)).summary
    kinds = {text["kind"]: text for text in summary["texts"]}
    assert list(kinds) == ["none", "latent", "diff-means", "random", "prompt"]
    assert "feature tables" in str(summary["unit"])
    assert kinds["latent"]["norms"] == kinds["diff-means"]["norms"] == kinds["random"]["norms"]
