"""The nucleus without a sort of the vocabulary, which takes as long as reading all weights."""

FEW = 1024  # tokens that nearly always hold the nucleus of a trained model


def nucleus_ids(probs, mass):
    """Return the ids (B, FEW), increasing, of the likeliest tokens of probs (B, V), if they hold
    the nucleus of every row for sure: the likeliest tokens that have a mass (B, 1) together. Else
    None.

    They do if those that are likelier than the least likely of them have that mass. So the nucleus
    ends before that one, and all tokens that are as likely as its last are here. On a GPU to ask
    this is to wait for the device, once a token.
    """
    if probs.shape[1] < 2 * FEW:
        return None
    few, ids = probs.topk(FEW, sorted=False)
    least = few.amin(-1, keepdim=True)
    sure = few.double().masked_fill(few == least, 0).sum(-1, keepdim=True)
    return ids.sort(-1).values if bool((sure >= mass).all()) else None
