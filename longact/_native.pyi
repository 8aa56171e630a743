"""Types of the native module (csrc/bindings.cpp). Addresses are `Tensor.data_ptr()`, 0 for none."""

from collections.abc import Sequence

openmp: bool

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
    threads: int,
    isa: str = "",
) -> None: ...

class AdamWTable:
    def __init__(self) -> None: ...
    def __len__(self) -> int: ...
    def resize(self, size: int) -> None: ...
    def clear(self, index: int) -> None: ...
    def set(
        self,
        index: int,
        param: int,
        exp_avg: int,
        exp_avg_sq: int,
        max_exp_avg_sq: int,
        step: int,
        ages: int,
        rows: int,
        num_selected: int,
        num_rows: int,
        row_len: int,
        param_dtype: int,
        grad_dtype: int,
        moment_dtype: int,
        group: int,
        compact: bool,
    ) -> None: ...
    def update(
        self,
        grads: Sequence[int],
        groups: Sequence[tuple[float, float, float, float, float, bool, bool]],
        grad_scale: float,
        threads: int,
        isa: str = "",
    ) -> None: ...
