"""Measure the trainer against the limit of the machine and against the usual ways.

    python tests/benchmark.py --data_dir FOLDER_WITH_FULL_MNIST [--rounds 3]

Every figure is taken once in each round, in turn, so that a slow minute of the machine hits
all of them alike. Printed are the median and the range over the rounds, and ratios that are
formed within each round. Needs about two minutes a round on two cores.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPT = str(ROOT / "train_ddp.py")
BATCH = 64


def child(arm: str, data_dir: Path) -> list[str]:
    """The command that runs one arm of the benchmark in a process of its own."""
    return [sys.executable, __file__, "--data_dir", str(data_dir), "--arm", arm]


def finish(command: list[str]) -> dict:
    """Run such a command; return what it has measured, its last line."""
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(output.stdout.splitlines()[-1])


def layout(data_dir: Path, world_size: int, blocks: int = 15, steps: int = 40) -> dict:
    """Alternate the trainer's loop with bare steps on the same ranks; return their rates."""
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, data_dir, folder, blocks, steps)
        multiprocessing.spawn(alternate, arguments, world_size)
        return json.loads(Path(folder, "result").read_text())


def alternate(
    rank: int, world_size: int, data_dir: Path, folder: str, blocks: int, steps: int
) -> None:
    """As one rank: time blocks of whole training, of its steps on one resident batch, and of
    such steps without DDP, in which nobody else takes part."""
    import torch.distributed as dist
    import torch.nn.functional as F

    import train_ddp
    import utils
    from data import Dataset, Digits, load_mnist
    from model import create_model, create_optimizers, optimizer_step

    size = str(world_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    store = dist.FileStore(f"{folder}/store", world_size)
    with utils.process_group(store) as device:
        name, train, test = load_mnist(data_dir)
        part = Digits(*(t[: world_size * BATCH * steps] for t in train))
        args = argparse.Namespace(seed=0, batch_size=BATCH, world_size=world_size)
        args.epochs, args.lr, args.save_every = 1, train_ddp.BASE_LR, None
        part = Dataset(name, part, test)
        progress = train_ddp.Progress()
        run = train_ddp.create_run(args, part, create_model(0), progress, [], device)
        images, labels = train.images[:BATCH].clone(), train.labels[:BATCH].clone()
        model = create_model(0)
        optimizers = create_optimizers(model)
        nobody = argparse.Namespace(signum=0)

        def loop() -> None:
            run.progress = train_ddp.Progress()
            train_ddp.train_epoch(run, nobody)

        def ddp() -> None:
            for _ in range(steps):
                count = world_size * BATCH
                train_ddp.train_step(
                    run, images, labels, count, train_ddp.BASE_LR / 100
                )

        def bare() -> None:
            for _ in range(steps):
                smoothing = train_ddp.LABEL_SMOOTHING
                loss = F.cross_entropy(
                    model(images), labels, label_smoothing=smoothing, reduction="sum"
                )
                (loss / BATCH).backward()
                optimizer_step(model, optimizers, train_ddp.BASE_LR / 100)

        rates = []
        for _ in range(blocks + 1):
            rates.append([])
            for work in loop, ddp, bare:
                dist.barrier()
                start = time.perf_counter()
                work()
                rates[-1].append(BATCH * steps / (time.perf_counter() - start))
        sums = [
            [sum(r) for r in zip(*ranks)]
            for ranks in zip(*utils.gather(rates, dist.group.WORLD))
        ]
        if rank == 0:
            median = statistics.median
            loops, ddps, bares = zip(*sums[1:])  # the first block warms up
            result = {"loop": median(loops), "bare": median(bares)}
            result["ratio"] = median(a / b for a, b in zip(loops, bares))
            result["ddp"] = median(a / b for a, b in zip(ddps, bares))
            Path(folder, "result").write_text(json.dumps(result))


def usual(data_dir: Path, steps: int = 150) -> dict:
    """Train our model the common way: a transform per image in two DataLoader workers."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    from data import MAX_SHIFT
    from model import create_model, create_optimizers, optimizer_step
    from train_ddp import BASE_LR, LABEL_SMOOTHING

    augment = transforms.Compose(
        [transforms.RandomCrop(28, padding=MAX_SHIFT), transforms.PILToTensor()]
    )
    loader = DataLoader(
        datasets.MNIST(data_dir, transform=augment),
        batch_size=2 * BATCH,
        shuffle=True,
        num_workers=2,
        drop_last=True,
    )
    torch.set_num_threads(2)
    model = create_model(0)
    optimizers = create_optimizers(model)
    done, start = -10, 0.0
    for images, labels in loader:
        if done == 0:
            start = time.perf_counter()
        loss = F.cross_entropy(
            model(images.squeeze(1)), labels, label_smoothing=LABEL_SMOOTHING
        )
        loss.backward()
        optimizer_step(model, optimizers, BASE_LR / 100)
        done += 1
        if done == steps:
            break
    return {"images_per_second": 2 * BATCH * steps / (time.perf_counter() - start)}


def fast(data_dir: Path) -> dict:
    """One epoch of the recipe of github.com/tuomaso/train_mnist_fast, its last notebook.

    Conv 5x5 of 24 and conv 3x3 of 32 channels, each with a max-pool and ReLU, linear layers
    of 256 and 10; Adam with betas (0.7, 0.9), one-cycle to 0.01, batches of 256, in order.
    """
    import torch
    from torch import nn

    from data import load_mnist

    torch.set_num_threads(2)
    data = load_mnist(data_dir)
    (images, test_images), (labels, test_labels) = (
        [(d.images.unsqueeze(1).float() / 255 - 0.1307) / 0.3081 for d in data[1:]],
        [d.labels for d in data[1:]],
    )
    layers = [nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3)]
    layers += [nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 256)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.7, 0.9))
    steps = -(-len(labels) // 256)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=steps, cycle_momentum=False
    )
    start = time.perf_counter()
    for x, y in zip(images.split(256), labels.split(256)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        correct = (model(test_images).argmax(1) == test_labels).float().mean()
    return {"seconds": seconds, "accuracy": float(correct)}


def trainer(data_dir: Path, world_size: int, seed: int) -> dict:
    """Run the program itself for one epoch; then run it again, with nothing left to do."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--epochs 1 --world_size {world_size} --seed {seed} --checkpoint_dir"
        command = [sys.executable, SCRIPT, *flags.split(), folder]
        command += ["--data_dir", str(data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # The largest process: ru_maxrss is in KiB on Linux.
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise RuntimeError("the trainer failed")
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        rerun = time.perf_counter() - start
        record = json.loads((Path(folder) / "metrics.jsonl").read_text())
    return record | {"rerun": rerun, "mb": usage.ru_maxrss / 1024}


def seconds(code: str, *flags: object) -> float:
    """How long a Python process takes that does nothing else."""
    command = [sys.executable, "-c", code, *map(str, flags)]
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT)
    return time.perf_counter() - start


def startup(data_dir: Path) -> float:
    """From the command to the first training step, in place of which the process ends."""
    code = """
import os, train_ddp, utils
train_ddp.train_step = lambda *_: os._exit(0)
args = train_ddp.parse_args()
utils.launch(train_ddp.work, args, args.world_size)"""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--world_size", 1, "--data_dir", data_dir.resolve()]
        return seconds(code, *flags, "--checkpoint_dir", folder)


def one_round(data_dir: Path, seed: int) -> dict[str, float]:
    alone, pair = layout(data_dir, 1), layout(data_dir, 2)
    two, record = trainer(data_dir, 2, seed), finish(child("fast", data_dir))
    one, common = trainer(data_dir, 1, seed), finish(child("usual", data_dir))
    plain, first = seconds("import torch"), startup(data_dir)
    # DDP's constructor and the optimizers import this. To the first step, nothing is torn down.
    floor = seconds("import os, torch, torch._dynamo; os._exit(0)")
    return {
        "1 process: trainer's loop, images/s": alone["loop"],
        "1 process: bare steps, images/s": alone["bare"],
        "1 process: loop / bare steps": alone["ratio"],
        "1 process: bare steps through DDP / bare steps": alone["ddp"],
        "2 ranks: trainer's loop, images/s": pair["loop"],
        "2 ranks: bare steps, each for itself, images/s": pair["bare"],
        "2 ranks: loop / bare steps": pair["ratio"],
        "2 ranks: bare steps through DDP / bare steps": pair["ddp"],
        "usual pipeline (transforms, DataLoader), images/s": common[
            "images_per_second"
        ],
        "2 ranks: one epoch of training, s": two["seconds"],
        "2 ranks: test accuracy after it, %": 100 * two["test_accuracy"],
        "train_mnist_fast recipe, one epoch, s": record["seconds"],
        "train_mnist_fast recipe, test accuracy, %": 100 * record["accuracy"],
        "2 ranks: trainer / train_mnist_fast, time": two["seconds"] / record["seconds"],
        "1 process: command to first step, s": first,
        "import torch, s": plain,
        "import torch and torch._dynamo, no exit, s": floor,
        "1 process: start-up / import torch": first / plain,
        "1 process: start-up / import torch, torch._dynamo": first / floor,
        "1 process: rerun of a finished training, s": one["rerun"],
        "2 ranks: rerun of a finished training, s": two["rerun"],
        "2 ranks: peak memory of a rank, MB": two["mb"],
    }


def cpu_name() -> str:
    try:
        names = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        return names[1]
    except (OSError, TypeError):
        return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arm", choices=["usual", "fast"])
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(globals()[args.arm](args.data_dir)), flush=True)
        return
    import torch

    print(
        f"{date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{os.cpu_count()} x {cpu_name()}, {args.rounds} rounds"
    )
    rounds = []
    for number in range(args.rounds):
        rounds.append(one_round(args.data_dir, number))
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    print(f"{'':52}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        digits = 0 if statistics.median(values) >= 1000 else 2
        cells = statistics.median(values), min(values), max(values)
        print(f"{name:52}" + "".join(f"{value:>10,.{digits}f}" for value in cells))


if __name__ == "__main__":
    main()
