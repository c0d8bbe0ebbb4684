"""Draw the bundled MNIST sample from the full set: `python tests/make_sample.py FOLDER_WITH_MNIST`.

FOLDER_WITH_MNIST is in torchvision's layout (FOLDER/MNIST/raw/train-images-idx3-ubyte, ...). The sample is balanced over
the ten classes, drawn with a fixed seed and written as gzipped IDX files; the same input gives the same bytes.
"""

import gzip
import random
import struct
import sys
from pathlib import Path

PER_CLASS = {"train": 1000, "t10k": 200}
TARGET = Path(__file__).parent / "mnist_sample" / "MNIST" / "raw"


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
        images = b"".join(pixels[i * 784 : (i + 1) * 784] for i in chosen)
        files = {
            f"{split}-labels-idx1-ubyte.gz": struct.pack(">ii", 2049, len(chosen))
            + bytes(labels[i] for i in chosen),
            f"{split}-images-idx3-ubyte.gz": struct.pack(
                ">iiii", 2051, len(chosen), 28, 28
            )
            + images,
        }
        for name, content in files.items():
            # mtime=0 keeps the time of day out of the file.
            (TARGET / name).write_bytes(
                gzip.compress(content, compresslevel=9, mtime=0)
            )
            print(name, (TARGET / name).stat().st_size, "bytes")


if __name__ == "__main__":
    main()
