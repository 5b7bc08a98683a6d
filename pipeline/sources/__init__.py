"""What results are made from: closures of imports, and fingerprints of what params.yaml only names."""
