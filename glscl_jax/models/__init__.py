"""Flax Linen modules: layers, encoders, fusion and heads."""
