"""Evaluation on held-out initial states."""
