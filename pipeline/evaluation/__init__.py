"""Evaluation on held-out initial states, and the statistics of the comparison."""
