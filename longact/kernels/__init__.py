"""The ops, one file each: the PyTorch reference, then the fast paths, then the dispatch between them.

Importing this package registers `torch.ops.longact.*`.
"""

from longact.kernels.channel_magnitude import channel_magnitude
from longact.kernels.masked_adamw import masked_adamw_
from longact.kernels.row_grad import row_grad
from longact.kernels.topk_rows import topk_rows

__all__ = ["channel_magnitude", "masked_adamw_", "row_grad", "topk_rows"]
