"""The ops, one file each: the PyTorch reference, the fast paths, then the dispatch.

Importing this package registers `torch.ops.longact.*`.
"""

from longact.kernels import channel_magnitude, masked_adamw, row_grad, topk_rows

__all__ = ["channel_magnitude", "masked_adamw", "row_grad", "topk_rows"]
