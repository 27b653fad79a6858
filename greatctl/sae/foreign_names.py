"""Names of places in a model, from other programs' words to TransformerLens's and back.

sparsify names a module (`layers.15`: what decoder layer 15 writes, `layers.15.mlp`), dictionary_learning a submodule
(`resid_post_layer_15`), Gemma Scope 2 a Hugging Face module and its side (`model.layers.15.output`). TransformerLens's
own names are understood everywhere, so that a place that the other program has no word for survives a round trip.
"""

from __future__ import annotations

import re

__all__ = ["hook_of", "module_of", "submodule_of"]

_OWN = re.compile(r"blocks\.\d+\.\w[\w.]*")
_SUBMODULE = re.compile(r"(\w+?)_layer_(\d+)")
_MODULE = re.compile(r"(?:\w+\.)*?(?:layers|h)\.(\d+)(?:\.(.+))?")
_OUTPUTS = {
    "": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "post_feedforward_layernorm": "hook_mlp_out",
    "pre_feedforward_layernorm": "mlp.hook_in",
    **dict.fromkeys(("self_attn", "attention", "attn", "self_attn.o_proj"), "hook_attn_out"),
}
_INPUTS = {
    "": "hook_resid_pre",
    "mlp": "mlp.hook_in",
    "mlp.down_proj": "mlp.hook_post",
    "self_attn.o_proj": "attn.hook_z",
}
_SUBMODULES = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
}


def hook_of(name: str, *, side: str = "output") -> str | None:
    """The TransformerLens name of another program's place; None where there is none.

    Args:
        side: whether a module's `input` or `output` is meant, where the name does not end with it.
    """
    if _OWN.fullmatch(name):
        return name
    if name in ("embed_tokens", "embed_in", "wte") and side == "output":
        return "blocks.0.hook_resid_pre"
    submodule = _SUBMODULE.fullmatch(name)
    if submodule:
        kind = _SUBMODULES.get(submodule[1])
        return f"blocks.{submodule[2]}.{kind}" if kind else None
    for said in ("input", "output"):
        if name.endswith("." + said):
            name, side = name.removesuffix("." + said), said
    module = _MODULE.fullmatch(name)
    kind = (_INPUTS if side == "input" else _OUTPUTS).get(module[2] or "") if module else None
    return f"blocks.{module[1]}.{kind}" if module and kind else None


def module_of(hook_point: str, target: str | None = None) -> str:
    """sparsify's name: the module that writes `hook_point`; for a transcoder the one that reads it and writes
    `target`. Where there is none, `hook_point` itself.
    """
    layer, _, kind = hook_point.removeprefix("blocks.").partition(".")
    if target is not None:
        for module in ("", "mlp"):
            if hook_point == f"blocks.{layer}.{_INPUTS[module]}" and target == f"blocks.{layer}.{_OUTPUTS[module]}":
                return f"layers.{layer}.{module}".rstrip(".")
        return hook_point
    if kind == "hook_resid_pre":  # what the layer before wrote
        return f"layers.{int(layer) - 1}" if int(layer) else "embed_tokens"
    module = {"hook_resid_post": "", "hook_mlp_out": ".mlp", "hook_attn_out": ".self_attn"}.get(kind)
    return hook_point if module is None else f"layers.{layer}{module}"


def submodule_of(hook_point: str) -> tuple[int, str]:
    """dictionary_learning's layer and submodule_name; a place without such a name keeps its own."""
    layer, _, kind = hook_point.removeprefix("blocks.").partition(".")
    kinds = {hook: name for name, hook in reversed(_SUBMODULES.items())}
    return int(layer), f"{kinds[kind]}_layer_{layer}" if kind in kinds else hook_point
