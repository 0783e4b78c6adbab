"""The results in the columns of Liger-Kernel's benchmark/data/all_benchmark_data.csv.

    python bench/liger_csv.py [--out FILE]        so that its visualizer reads them, too

The memory is the peak beyond inputs and results; theirs is the whole peak, and both are in MiB.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import table

COLUMNS: tuple[str, ...] = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip
MODES = {"fwd": "forward", "fwd+bwd": "full"}
X_LABELS = {"N": "tokens", "V": "vocabulary size", "B": "batch size"}


def rows_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The speed row and the memory row of one measured side."""
    sizes = dict(line["sizes"])
    x = line.get("x", next(iter(sizes)))
    shared = {
        "kernel_name": line["op"],
        "kernel_provider": "tercet" if line["side"] == "ours" else line["side"],
        "kernel_operation_mode": MODES[line["mode"]],
        "x_name": x,
        "x_label": X_LABELS.get(x, x),
        "x_value": sizes.pop(x),
        "extra_benchmark_config_str": json.dumps({**sizes, "case": line["case"]}),
        "gpu_name": line["machine"],
        "timestamp": line["timestamp"],
        "liger_version": line["versions"].get("liger-kernel", ""),
    }
    memory = line["extra_mb"] * 1e6 / 2**20
    return [
        {**shared, "metric_name": "speed", "metric_unit": "ms", "y_value_50": line["ms"],
         "y_value_20": line["ms_p20"], "y_value_80": line["ms_p80"]},
        {**shared, "metric_name": "memory", "metric_unit": "MB",
         **dict.fromkeys(("y_value_50", "y_value_20", "y_value_80"), memory)},
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=table.RESULTS / "all_benchmark_data.csv")
    args = parser.parse_args()
    lines = [*table.speed_lines(), *table.load("growth")]
    measured = [line for line in lines if line.get("sizes") and "not_run" not in line]
    with args.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for line in measured for row in rows_of(line))
    print(f"wrote {2 * len(measured)} rows to {args.out}")


if __name__ == "__main__":
    main()
