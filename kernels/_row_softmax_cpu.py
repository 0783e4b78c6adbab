"""Compiled row kernels of `_row_softmax.py` for a CPU: one read of a row per pass.

They take the tensors of `_row_softmax_triton.py`, run on torch.get_num_threads() threads, and give
the same bits on any number of them.  float64 is not theirs: it stays with the PyTorch definition.
"""

import torch
from torch import Tensor

import tercet._rows as _rows
from tercet.kernels._row_softmax_triton import Rows

DTYPES = {
    torch.float32: _rows.RowType.float32,
    torch.bfloat16: _rows.RowType.bfloat16,
    torch.float16: _rows.RowType.float16,
}
INSTRUCTION_SETS = _rows.instruction_sets()


def supports(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in DTYPES


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if x.shape != shape or x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
        raise ValueError(
            f"row_softmax: {name} must be a contiguous {dtype} tensor {shape} on a CPU, "
            f"got {x.dtype} {tuple(x.shape)} with strides {x.stride()} on {x.device}"
        )


def _check_rows(name: str, x: Tensor, rows: Rows) -> None:
    if not supports(x):
        raise TypeError(f"row_softmax: {name} must be {list(DTYPES)} on a CPU, got {x.dtype}")
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"row_softmax: {name} needs unit stride along its last axis")
    outer, inner = divmod(rows.count, rows.inner)
    last = (outer - 1) * rows.stride_outer + (rows.inner - 1) * rows.stride_inner
    size = x.untyped_storage().nbytes() // x.itemsize - x.storage_offset()
    if rows.count and (inner or last + x.shape[-1] > size):
        raise ValueError(f"row_softmax: rows of {name} must lie inside it, got {rows}")


def _tile(x: Tensor, rows: Rows, targets: Tensor, scale: Tensor, first_column: int) -> dict:
    """Arguments that both passes share."""
    _check_rows("x", x, rows)
    _check("targets", targets, (rows.count, targets.shape[-1]), torch.int64)
    _check("scale", scale, (rows.count,), torch.float32)
    return {
        "x": x.data_ptr(),
        "type": DTYPES[x.dtype],
        "layout": rows[1:],
        "rows": rows.count,
        "columns": x.shape[-1],
        "first_column": first_column,
        "targets": targets.data_ptr(),
        "num_targets": targets.shape[-1],
        "scale": scale.data_ptr(),
        "num_threads": torch.get_num_threads(),
    }


def forward(
    x: Tensor,
    rows: Rows,
    targets: Tensor,
    scale: Tensor,
    state: tuple[Tensor, Tensor],
    *,
    first_column: int,
    entropy: bool,
    exponentials: bool = False,
    instruction_set: str = "",
) -> None:
    """Adds x, whose columns begin at first_column, to state: (stats [3, N], picked [N, K]).

    `exponentials`: then x becomes exp((x - maximum) * scale), with the maximum of the state.
    `instruction_set` is one of INSTRUCTION_SETS; empty: the last of them.
    """
    stats, picked = state
    tile = _tile(x, rows, targets, scale, first_column)
    for name, vector in zip(("maximum", "rest", "spread"), stats, strict=True):
        _check(name, vector, (rows.count,), torch.float32)
    _check("picked", picked, tuple(targets.shape), torch.float32)
    maximum, rest, spread = (vector.data_ptr() for vector in stats)
    _rows.forward(
        **tile,
        maximum=maximum,
        rest=rest,
        spread=spread if entropy else None,
        picked=picked.data_ptr(),
        exponentials=x.data_ptr() if exponentials else None,
        instruction_set=instruction_set,
    )


def backward(
    dx: Tensor,
    x: Tensor,
    rows: Rows,
    targets: Tensor,
    grads: tuple[Tensor, Tensor],
    *,
    first_column: int,
    entropy: bool,
    instruction_set: str = "",
) -> None:
    """Writes dx, contiguous or x itself, from (RowGrads.coef, RowGrads.target)."""
    coef, d_target = grads
    names = ("maximum", "scale", "log_sum", "a", "b")
    for name, vector in zip(names, coef, strict=True):
        _check(name, vector, (rows.count,), torch.float32)
    _check("target", d_target, tuple(targets.shape), torch.float32)
    same = dx.data_ptr() == x.data_ptr()
    layout = rows if same else Rows(rows.count, max(rows.count, 1), 0, x.shape[-1])
    if not same:
        _check("dx", dx, tuple(x.shape), x.dtype)
    maximum, scale, log_sum, a, b = coef
    _rows.backward(
        **_tile(x, rows, targets, scale, first_column),
        maximum=maximum.data_ptr(),
        log_sum=log_sum.data_ptr(),
        a=a.data_ptr(),
        b=b.data_ptr() if entropy else None,
        target=d_target.data_ptr(),
        dx=dx.data_ptr(),
        dx_layout=layout[1:],
        instruction_set=instruction_set,
    )
