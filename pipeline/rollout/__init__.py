"""Sampling episodes: the engine contract, the transformers engine, and the collector."""
