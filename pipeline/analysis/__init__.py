"""What results say: comparisons, statistics and diagnostics, as numbers."""
