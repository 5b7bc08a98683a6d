"""The slots of a policy-gradient method, as pure functions of tensors over the flat ragged batch."""
