"""Policies: what one is, how a pretrained one is loaded, and how tokens are scored under it."""
