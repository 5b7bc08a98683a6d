"""How a policy begins: from scratch, or from a pretrained one, on demonstrations."""
