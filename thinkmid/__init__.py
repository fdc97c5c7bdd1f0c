"""thinkmid: a compact, fast trainer for thinking mid-training."""

__version__ = "0.1.0"


def load_model(folder, *, dtype="float32", device="cpu"):
    """Transformer from a Hugging Face model folder. See thinkmid.model.weights.load_model."""
    from thinkmid.model.weights import load_model as load

    return load(folder, dtype=dtype, device=device)
