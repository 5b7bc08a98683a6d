"""Sampling episodes: engines, episodes, the collector that plays them, and trees of them."""
