"""thinkmid: a compact, fast trainer for thinking mid-training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thinkmid.model.transformer import Transformer

__version__ = "0.1.0"


def load_model(folder: str | Path, *, dtype: str = "float32", device: str = "cpu") -> Transformer:
    """The model in a Hugging Face folder, in eval mode. See thinkmid.model.weights.load_model."""
    from thinkmid.model.weights import load_model as load

    return load(folder, dtype=dtype, device=device)
