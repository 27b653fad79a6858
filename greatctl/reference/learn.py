"""Train the reference model: an ordinary Hugging Face Llama, small, on one device, resumable to the byte.

The data is small (some eight million tokens), so the recipe is built against overfitting: dropout on what
each block adds to the residual stream, strong weight decay, and a learning rate that falls to zero.
Matrices inside the blocks are stepped by Muon (Jordan et al. 2024), embeddings and norms by AdamW. All
randomness is drawn from (seed, step), so a checkpoint needs no generator state.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from greatctl.reference.windows import IGNORED, Stream, batch, steps_per_epoch

Log = Callable[..., None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the texts and the device."""

    vocab_size: int = 4096
    d_model: int = 256
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int = 4
    d_mlp: int = 672
    context: int = 512
    batch_size: int = 96
    epochs: float = 28.0
    lr: float = 3e-3
    matrix_lr: float = 1.2e-2
    weight_decay: float = 0.3
    dropout: float = 0.1
    copy_fraction: float = 0.06
    warmup: int = 150
    eval_every: int = 318
    save_every: int = 500
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain values, for records and the card."""
        return asdict(self)

    def model(self, bos: int, eos: int) -> LlamaForCausalLM:
        """A freshly initialised model, the same for the same seed."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            max_position_embeddings=self.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
        model = LlamaForCausalLM(config).float()
        with torch.no_grad():  # GPT-2's scaling: the residual stream starts small however many blocks add to it
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(1 / math.sqrt(2 * self.n_layers))
        return model


def learn(
    recipe: Recipe,
    stream: Stream,
    evaluate: Callable[[nn.Module], float] | None,
    work: Path,
    device: str,
    log: Log,
) -> LlamaForCausalLM:
    """Train, or go on training from the checkpoint in `work`; returns the best model (float32, on the CPU).

    `evaluate` gives held-out bits per byte, lower is better; without it the last step counts as the best.
    """
    bos, eos = stream.bos, stream.bos + 1
    model: Any = recipe.model(bos, eos)
    model.to(device)
    _drop(model, recipe.dropout)
    optimizers = _optimizers(model, recipe)
    total = max(1, round(recipe.epochs * steps_per_epoch(stream, recipe.batch_size, recipe.context)))
    step, best = _restore(work / "checkpoint.safetensors", model, optimizers)
    log("start", step=step, steps=total, parameters=sum(p.numel() for p in model.parameters()), device=device)
    fast: Any = torch.compile(model) if device.startswith("cuda") else model
    began, sum_loss, n_loss = time.perf_counter(), torch.zeros((), device=device), 0
    while step < total:
        sum_loss += _step(fast, recipe, stream, step, total, optimizers, device)
        step, n_loss = step + 1, n_loss + 1
        last = step == total
        if last or step % recipe.eval_every == 0:
            score = evaluate(model) if evaluate else -float(step)
            if score < best:
                best = score
                save_file(_weights(model), work / "best.tmp")
                os.replace(work / "best.tmp", work / "best.safetensors")
            rate = n_loss * recipe.batch_size * recipe.context / (time.perf_counter() - began)
            log(
                "step", step=step, loss=round(float(sum_loss) / n_loss, 4),
                bits_per_byte=round(score, 4) if evaluate else None, tokens_per_second=round(rate),
            )  # fmt: skip
            began, sum_loss, n_loss = time.perf_counter(), torch.zeros((), device=device), 0
        if last or step % recipe.save_every == 0:
            _save(work / "checkpoint.safetensors", model, optimizers, step, best)
            log("checkpoint", step=step)
    finished = recipe.model(bos, eos)
    with safe_open(work / "best.safetensors", "pt") as file:
        finished.load_state_dict({name: file.get_tensor(name) for name in list(file.keys())}, strict=False)
    return finished.eval()


def _step(
    model: nn.Module,
    recipe: Recipe,
    stream: Stream,
    step: int,
    total: int,
    optimizers: list[Any],
    device: str,
) -> Tensor:
    """One optimiser step; returns the detached loss in nats per token."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    cool = (total - step) / total
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * warm * cool
    inputs, labels = batch(
        stream,
        step,
        batch_size=recipe.batch_size,
        context=recipe.context,
        copy_fraction=recipe.copy_fraction,
        vocab_size=recipe.vocab_size,
        seed=recipe.seed,
    )
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout
    model.train()
    mixed = torch.autocast("cuda", torch.bfloat16) if device.startswith("cuda") else nullcontext()
    with mixed:
        logits = model(input_ids=inputs.to(device), use_cache=False).logits
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.to(device).flatten(), ignore_index=IGNORED)
    loss.backward()
    nn.utils.clip_grad_norm_([p for o in optimizers for g in o.param_groups for p in g["params"]], 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def _drop(model: Any, rate: float) -> None:
    """Dropout on the embedding and on what attention and MLP add, which the Llama class itself does not
    offer.
    """

    def hook(module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return F.dropout(output, rate, module.training)

    places = [model.model.embed_tokens]
    for block in model.model.layers:
        places += [block.self_attn.o_proj, block.mlp.down_proj]
    for place in places if rate else ():
        place.register_forward_hook(hook)


def _optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[Any]:
    """Muon for the matrices inside the blocks, AdamW for the tied embedding and the norms (these
    undecayed).
    """
    matrices, norms, embedding = [], [], [model.model.embed_tokens.weight]
    for name, weight in model.named_parameters():
        if "embed_tokens" not in name:
            (matrices if weight.ndim == 2 else norms).append(weight)
    decay = recipe.weight_decay
    muon = torch.optim.Muon(matrices, lr=recipe.matrix_lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": embedding, "weight_decay": decay}, {"params": norms, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return [muon, adam]


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The parameters under their Hugging Face names, each once (the output layer is the embedding)."""
    return {name: weight.detach().cpu().contiguous() for name, weight in model.named_parameters()}


def _save(path: Path, model: nn.Module, optimizers: list[Any], step: int, best: float) -> None:
    """Weights and optimiser state in one safetensors file, swapped into place whole."""
    tensors = {f"model/{name}": weight for name, weight in _weights(model).items()}
    for number, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer/{number}/{parameter}/{key}"] = torch.as_tensor(value).cpu().contiguous()
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"progress": json.dumps({"step": step, "best": best})})
    os.replace(temporary, path)


def _restore(path: Path, model: nn.Module, optimizers: list[Any]) -> tuple[int, float]:
    """Load the checkpoint if there is one; returns the step reached and the best score so far."""
    if not path.exists():
        return 0, math.inf
    with safe_open(path, "pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(tensors[f"model/{name}"])
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        for name, tensor in tensors.items():
            if name.startswith(f"optimizer/{number}/"):
                _, _, parameter, key = name.split("/")
                content["state"].setdefault(int(parameter), {})[key] = tensor
        optimizer.load_state_dict(content)
    return int(progress["step"]), float(progress["best"])
