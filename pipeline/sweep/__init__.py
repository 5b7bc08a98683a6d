"""Searches over settings: the only package that imports Optuna."""
