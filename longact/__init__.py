"""Saliency-guided sparse updates for long-context LLM training (LongAct, arXiv 2604.14922).

handle = longact.apply(model, keep_ratio=0.3)
optimizer = longact.FusedMaskedAdam(model.parameters(), lr=1e-6)  # was torch.optim.AdamW
"""

from importlib.metadata import version as _version

from longact import kernels, nn
from longact.apply import LongAct, apply
from longact.backends import backends
from longact.delta import load_delta, merge_delta
from longact.optim import FusedMaskedAdam
from longact.selection import LongActWarning, get_rows, set_rows

__version__ = _version("longact")

__all__ = [
    "FusedMaskedAdam",
    "LongAct",
    "LongActWarning",
    "apply",
    "backends",
    "get_rows",
    "kernels",
    "load_delta",
    "merge_delta",
    "nn",
    "set_rows",
]
