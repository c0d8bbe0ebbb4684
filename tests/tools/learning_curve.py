"""Print the learning curves of trainings as a mermaid chart, from their checkpoints.

python tests/tools/learning_curve.py runs/1 runs/2 runs/4 runs/8
"""

import re
import sys
from pathlib import Path

import torch

# The colours are those that the README names; they can be seen on black and on white.
HEAD = """---
config:
  themeVariables:
    xyChart:
      plotColorPalette: "#3b82f6, #e8710a, #16a34a, #d946ef"
---
xychart-beta"""


def newest(folder: str) -> dict:
    """Return the newest checkpoint of a folder."""
    path = max(Path(folder).glob("epoch*.pt"))
    return torch.load(path, weights_only=True)


def chart(folders: list[str]) -> str:
    """Return the test accuracies as one line per folder, over the images seen."""
    checkpoints = [newest(folder) for folder in folders]
    histories = [checkpoint["progress"]["history"] for checkpoint in checkpoints]
    # The name of the data ends with the numbers of training and test images.
    name = checkpoints[0]["hyperparameters"]["data"]
    thousands = int(re.search(r"(\d+) \+", name)[1]) / 1000
    seen = [round(record["epoch"] * thousands) for record in histories[0]]
    curves = []
    for history in histories:
        curves.append([round(100 * record["test_accuracy"], 2) for record in history])
    lowest = min(min(curve) for curve in curves)
    lines = [
        HEAD,
        f'    x-axis "images seen, in thousands" {seen}',
        f'    y-axis "test accuracy, %" {lowest - 0.1:.1f} --> 99.6',
    ]
    for curve in curves:
        lines.append(f"    line {curve}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(chart(sys.argv[1:]))
