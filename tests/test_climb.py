"""Runs that begin at different blocks go through the model in one walk, and come out as each would alone."""

from __future__ import annotations

import pytest
import torch
from tiny_llama import save_tiny
from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM

from greatctl.errors import StageError, UsageError
from greatctl.model import load
from greatctl.model.interface import FrozenModel, Intervention, Start


@pytest.fixture(scope="module", params=[LlamaForCausalLM, Qwen3ForCausalLM, GPT2LMHeadModel], ids=lambda c: c.__name__)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FrozenModel:
    path = tmp_path_factory.mktemp("climb") / "model"
    save_tiny(path, model=request.param)
    return load(path, name="tiny", dtype="float32")


def tokens() -> torch.Tensor:
    return torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(1))


def starts(model: FrozenModel, first: int) -> list[Start]:
    """Two runs from block 0, three from block 1 (edited there and one block on), one from block 2."""
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    values = {name: value[:, first:] for name, value in model.capture(tokens(), names).items()}

    def turned(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed[:, -3:] = -2 * value[:, -3:]
        return changed

    return [
        Start(0, values[names[0]][:2], [Intervention("blocks.0.hook_resid_mid", turned)]),
        Start(1, values[names[1]], [Intervention(f"blocks.{n}.attn.hook_z", turned) for n in (1, 2)]),
        Start(2, values[names[2]][2:], [Intervention("blocks.2.mlp.hook_post", turned)]),
    ]


ROWS = torch.tensor([0, 1, 0, 1, 2, 2])


@pytest.mark.parametrize("first", [0, 4])
def test_a_climb_is_each_run_alone(model: FrozenModel, first: int) -> None:
    past = model.past(tokens())
    more = [{"start": first, "past": past.rows(ROWS[a:b])} if first else {} for a, b in ((0, 2), (2, 5), (5, 6))]
    alone = [
        model.resume(s.layer, s.residual, s.interventions, **m) for s, m in zip(starts(model, first), more, strict=True)
    ]
    whole = {"start": first, "past": past.rows(ROWS)} if first else {}
    together = model.climb(starts(model, first), **whole)
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert (torch.cat(alone)[:2] - model.run(tokens())[:2, first:]).abs().max() > 1e-3
    last = model.climb(starts(model, first), positions=torch.full((6,), 8), **whole)
    torch.testing.assert_close(last, together[:, -1], rtol=1e-5, atol=1e-5)


def test_a_climb_that_cannot_be_is_refused(model: FrozenModel) -> None:
    good = starts(model, 0)
    for wrong in ([], good[::-1], [Start(3, good[0].residual)]):
        with pytest.raises(UsageError, match="begin"):
            model.climb(wrong)
    with pytest.raises(UsageError, match="cannot resume"):
        model.climb(good, start=2)
    late = [Start(1, good[1].residual, [Intervention("blocks.0.hook_resid_mid", lambda value: value)])]
    with pytest.raises(StageError, match="did not happen"):
        model.climb(late)
    narrow = [Start(1, good[1].residual, [Intervention("blocks.1.hook_resid_mid", lambda value: value[:, :2])])]
    with pytest.raises(StageError, match="shape"):
        model.climb(narrow)
