"""Causes: prompt pairs, metrics, and the sweep that patches one run's activations into another's."""

__all__ = ["DIRECTIONS", "SITES"]

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
DIRECTIONS = ("denoising", "noising")
