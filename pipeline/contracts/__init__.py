"""Suites that a user's own code is checked with before it is trained on."""
