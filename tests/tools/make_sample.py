"""Draw the bundled MNIST sample from the full set: `python tests/tools/make_sample.py FOLDER_WITH_MNIST`.

FOLDER_WITH_MNIST is in torchvision's layout (FOLDER/MNIST/raw/train-images-idx3-ubyte, ...). The sample is balanced over
the ten classes and drawn with a fixed seed; the same input gives the same bytes.
"""

import random
import struct
import sys
from pathlib import Path

PER_CLASS = {"train": 1000, "t10k": 200}
TARGET = Path(__file__).parent.parent / "mnist_sample" / "MNIST" / "raw"


def main() -> None:
    raw = Path(sys.argv[1]) / "MNIST" / "raw"
    for split, per_class in PER_CLASS.items():
        labels = (raw / f"{split}-labels-idx1-ubyte").read_bytes()[8:]
        pixels = (raw / f"{split}-images-idx3-ubyte").read_bytes()[16:]
        chooser = random.Random(f"mnist sample of {split}")
        chosen: list[int] = []
        for digit in range(10):
            of_digit = [i for i, label in enumerate(labels) if label == digit]
            chosen += chooser.sample(of_digit, per_class)
        chooser.shuffle(chosen)
        header = struct.pack(">iiii", 2051, len(chosen), 28, 28)
        images = [pixels[i * 784 : (i + 1) * 784] for i in chosen]
        write(f"{split}-images-idx3-ubyte", header + b"".join(images))
        header = struct.pack(">ii", 2049, len(chosen))
        write(f"{split}-labels-idx1-ubyte", header + bytes(labels[i] for i in chosen))


def write(name: str, content: bytes) -> None:
    (TARGET / name).write_bytes(content)
    print(name, len(content), "bytes")


if __name__ == "__main__":
    main()
