"""The schema of params.yaml: what may be set, in which bounds, and errors that say what is allowed."""
