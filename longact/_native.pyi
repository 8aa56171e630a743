"""Types of the native module (csrc/bindings.cpp). Addresses are `Tensor.data_ptr()`, 0 for none."""

from collections.abc import Sequence

openmp: bool
cuda: str | None  # what the CUDA kernels were built for

def instruction_sets() -> list[str]: ...
def channel_magnitude(
    metric: int,
    dtype: int,
    y: int,
    stride: int,
    mask: int,
    tokens: int,
    channels: int,
    total: int,
    counted: int,
    threads: int,
    isa: str = "",
) -> None: ...
def gather_columns(
    element_size: int,
    source: int,
    stride: int,
    tokens: int,
    channels: int,
    columns: int,
    num_columns: int,
    to: int,
    threads: int,
) -> None: ...
def cuda_unusable(device: int) -> str: ...  # only where cuda is not None

# lr, lr_tensor, beta1, beta2, eps, weight_decay, maximize, zero_grad, stochastic, seed
_Group = tuple[float, int, float, float, float, float, bool, bool, bool, int]

class AdamWTable:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def clear(self, index: int) -> None: ...
    def set(
        self,
        index: int,
        param: int,
        master: int,
        exp_avg: int,
        exp_avg_sq: int,
        max_exp_avg_sq: int,
        step: int,
        ages: int,
        rows: int,
        num_selected_tensor: int,
        num_selected: int,
        num_rows: int,
        row_len: int,
        param_dtype: int,
        grad_dtype: int,
        moment_dtype: int,
        group: int,
        key: int,
        compact: bool,
    ) -> None: ...
    def update(
        self,
        grads: Sequence[int],
        groups: Sequence[_Group],
        grad_scale: float,
        threads: int,
        isa: str = "",
    ) -> None: ...
    def pack(self, grads: Sequence[int], groups: Sequence[_Group]) -> int: ...
    @property
    def packed_size(self) -> int: ...
    def write(self, to: int, bytes: int) -> None: ...
    def plan(self) -> tuple[int, int]: ...
    def launch(  # only where cuda is not None
        self,
        table: int,
        blocks_done: int,
        grad_scale: int,
        found_inf: int,
        device: int,
        stream: int,
    ) -> None: ...
