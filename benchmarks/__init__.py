"""Measurements, none of them part of a test: ``make bench``."""
