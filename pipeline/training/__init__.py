"""Training a policy with one method: collect, annotate, advantages, weights, update."""
