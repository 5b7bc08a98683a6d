"""A worked example: a token weight of one's own. Tokens at which the policy was unsure weigh more."""


def weight(batch, *, strength):
    """``1 + strength * H_t / mean H``, the mean over the tokens that the policy chose in this iteration."""
    mean = batch.entropy[batch.trainable].mean()
    return batch.trainable * (1 + strength * batch.entropy / mean.clamp_min(1e-6))
