"""Policies: load a pretrained one, or make a small one from scratch; score tokens under either."""
