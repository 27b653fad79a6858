"""Causes: prompt pairs, metrics, and the sweep that patches one run's activations into another's."""

from .sites import CORRUPTIONS, DIRECTIONS, POSITIONS, SITES, STREAM_SITES

__all__ = ["CORRUPTIONS", "DIRECTIONS", "POSITIONS", "SITES", "STREAM_SITES"]
