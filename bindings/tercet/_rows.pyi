class RowType:
    """Element type of logits."""

    float32: RowType
    bfloat16: RowType
    float16: RowType

def instruction_sets() -> list[str]:
    """Instruction sets of this machine, slowest first."""

def forward(
    *,
    x: int,
    type: RowType,
    layout: tuple[int, int, int],
    rows: int,
    columns: int,
    first_column: int,
    targets: int,
    num_targets: int,
    scale: int,
    maximum: int,
    rest: int,
    spread: int | None,
    picked: int,
    exponentials: int | None = None,
    num_threads: int,
    instruction_set: str,
) -> None:
    """Adds a tile to the state of its rows; every argument named like a tensor is an address."""

def backward(
    *,
    x: int,
    type: RowType,
    layout: tuple[int, int, int],
    rows: int,
    columns: int,
    first_column: int,
    targets: int,
    num_targets: int,
    scale: int,
    maximum: int,
    log_sum: int,
    a: int,
    b: int | None,
    target: int,
    dx: int,
    dx_layout: tuple[int, int, int],
    num_threads: int,
    instruction_set: str,
) -> None:
    """Writes the gradient of a tile; every argument named like a tensor is an address."""
