"""Measure the trainer against the limit of the machine and against a fast recipe.

    python tests/benchmark.py --data_dir FOLDER_WITH_FULL_MNIST [--rounds 3]
    python tests/benchmark.py --quick    to check that it works; its figures mean nothing

Every figure is taken once in each round, in turn, so that a slow minute of the machine hits
all alike. Ratios are formed within a round. Takes two minutes a round on two cores.

"Bare steps" are what the trainer computes and nothing else: the same model, optimizer and
batches, without DDP, loader, logging or saving. With two ranks, each takes them for itself.
"""

import argparse
import contextlib
import copy
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import NoReturn

# Before torch is imported: figures for CPUs, with one thread per rank.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("OMP_NUM_THREADS", None)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import data
import train_ddp
import utils
from train_ddp import LABEL_SMOOTHING, Run, train_epoch, train_step

BATCH = 64  # images per rank and step
Arm = Callable[[], None]


def compare_loops(data_dir: Path, quick: bool, world_size: int) -> NoReturn:
    """Set up the program with `world_size` ranks, but measure where it would train."""
    blocks, steps = (1, 4) if quick else (12, 40)
    with tempfile.TemporaryDirectory() as folder:
        command = program(data_dir, folder, epochs=1, world_size=world_size, seed=0)
        # A low rate: units that die leave denormal numbers, which are slow to compute.
        sys.argv[1:] = [*command[2:], "--lr", "0.0001"]
        args = train_ddp.parse_args()
        utils.launch(functools.partial(measuring_rank, blocks, steps), args, world_size)


def measuring_rank(blocks: int, steps: int, rank: int, args, init_method) -> NoReturn:
    """Be a rank of the program that has few images, and measures in place of an epoch."""

    def load_part(data_dir: Path):
        name, train_set, test_set = data.load_data(data_dir)
        part = slice(args.world_size * BATCH * steps)
        images, labels = train_set.images[part], train_set.labels[part]
        return name, data.Digits(images, labels), test_set

    def measure(run, ddp, loader, stop) -> NoReturn:
        rates = time_arms(create_arms(run, ddp, loader, stop), blocks, BATCH * steps)
        if rank == 0:
            print(json.dumps(summarize(rates)), flush=True)
        sys.exit()

    train_ddp.load_data, train_ddp.train_epoch = load_part, measure
    train_ddp.run_rank(rank, args, init_method)


def create_arms(run: Run, ddp: nn.Module, loader: DataLoader, stop) -> dict[str, Arm]:
    """Return what is to be compared; each call takes the steps of one short epoch."""
    sampler, batches = loader.sampler, list(loader)
    half = DataLoader(loader.dataset, BATCH // 2, sampler=sampler, collate_fn=tuple)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    model.train()
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))

    def loop(loader: DataLoader) -> None:
        run.epoch, run.images, run.step, run.loss_sum, run.seconds = 0, 0, 0, 0.0, 0.0
        sampler.set_epoch(0)
        loader.dataset.draw_shifts(run.args.seed, 0)
        train_epoch(run, ddp, loader, stop)

    def ddp_steps() -> None:
        for batch in batches:
            train_step(ddp, run.optimizer, batch)

    def bare_steps(meet: Arm = lambda: None) -> None:
        loss_function = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
        for images, labels in batches:
            loss_function(model(images), labels).backward()
            meet()
            optimizer.step()
            optimizer.zero_grad()

    def all_reduce() -> None:
        for _ in batches:
            dist.all_reduce(gradients)

    arms = {"loop": functools.partial(loop, loader), "ddp": ddp_steps}
    meet = functools.partial(dist.all_reduce, torch.zeros(1))
    arms |= {"bare": bare_steps, "meet": functools.partial(bare_steps, meet)}
    arms |= {"busy": arms["loop"], "all_reduce": all_reduce}
    if run.args.world_size == 2:
        arms["half"] = functools.partial(loop, half)
    return arms


def time_arms(arms: dict[str, Arm], blocks: int, images: int) -> dict[str, list[float]]:
    """Run the arms in turn; return images/s of all ranks together, by arm and block."""
    rates = {name: [] for name in arms}
    for _ in range(1 + blocks):
        for name, work in arms.items():
            busy = name == "busy" and dist.get_rank() == 0
            with spinning_process() if busy else contextlib.nullcontext():
                dist.barrier()
                start = time.perf_counter()
                work()
                rates[name].append(images / (time.perf_counter() - start))
    sums = torch.tensor(list(rates.values()), dtype=torch.float64)
    dist.all_reduce(sums)
    return dict(zip(arms, sums[:, 1:].tolist()))  # the first block warms up


@contextlib.contextmanager
def spinning_process() -> Iterator[None]:
    """Keep one core busy; for a minute at most, should this process be killed meanwhile."""
    code = "import time; print(flush=True); end = time.time() + 60\n"
    command = [sys.executable, "-c", code + "while time.time() < end: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def summarize(rates: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each arm, and of ratios that are formed within each block."""
    figures = {name: statistics.median(values) for name, values in rates.items()}
    for pair in ("loop", "bare"), ("ddp", "bare"), ("meet", "bare"), ("busy", "loop"):
        ratios = [a / b for a, b in zip(*(rates[name] for name in pair))]
        figures["/".join(pair)] = statistics.median(ratios)
    return figures


def fast(data_dir: Path, quick: bool) -> None:
    """Take one epoch of the recipe of github.com/tuomaso/train_mnist_fast, last notebook.

    Conv 5x5 of 24 and conv 3x3 of 32 channels, each with a max-pool and ReLU, linear layers
    of 256 and 10; Adam with betas (0.7, 0.9), one-cycle to 0.01, batches of 256, in order.
    """
    torch.set_num_threads(2)
    _, *sets = data.load_data(data_dir)
    pixels, labels = [s.images.unsqueeze(1) for s in sets], [s.labels for s in sets]
    images, test_images = [(p.float() / 255 - 0.1307) / 0.3081 for p in pixels]
    layers = [nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3)]
    layers += [nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(800, 256)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.7, 0.9))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, total_steps=-(-len(images) // 256), cycle_momentum=False
    )
    start = time.perf_counter()
    for x, y in zip(images.split(256), labels[0].split(256)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        correct = (model(test_images).argmax(1) == labels[1]).float().mean()
    print(json.dumps({"seconds": seconds, "accuracy": float(correct)}))


def seconds_of(command: list[str], folder: str | None = None) -> float:
    """Return how long a command takes; its temporary files go to `folder`, if given."""
    env = os.environ | ({"TMPDIR": folder} if folder else {})
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True, cwd=ROOT, env=env)
    return time.perf_counter() - start


def first_step(data_dir: Path) -> float:
    """Return the seconds from the command to the first training step, which exits."""
    code = "import os, train_ddp; train_ddp.train_step = lambda *_: os._exit(0)\n"
    with tempfile.TemporaryDirectory() as folder:
        command = program(data_dir, folder, epochs=1, world_size=1, seed=0)
        code += "args = train_ddp.parse_args()\n"
        code += "train_ddp.utils.launch(train_ddp.run_rank, args, args.world_size)"
        command[1:2] = "-c", code
        return seconds_of(command, folder)


def program(data_dir: Path, folder: str, epochs: int, world_size: int, seed: int):
    """Return the command that runs the trainer itself."""
    flags = f"--epochs {epochs} --world_size {world_size} --seed {seed}".split()
    flags += ["--batch_size", str(BATCH), "--data_dir", str(data_dir)]
    script = str(ROOT / "train_ddp.py")
    return [sys.executable, script, *flags, "--checkpoint_dir", folder]


def peak_memory(command: list[str]) -> float:
    """Run a command; return the peak memory of the largest of its processes, in MB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        raise RuntimeError("the trainer failed")
    return usage.ru_maxrss / 1024  # KiB on Linux


def whole_programs(data_dir: Path, seed: int) -> dict[str, float]:
    """Train one epoch, do it again with nothing left to do, and train three epochs."""
    with tempfile.TemporaryDirectory() as folder:
        memory = peak_memory(program(data_dir, folder, 1, 2, seed))
        [path] = Path(folder).glob("*.pt")
        [record] = torch.load(path, weights_only=True)["history"]
        rerun = seconds_of(program(data_dir, folder, 1, 1, seed))
    with tempfile.TemporaryDirectory() as folder:
        memory3 = peak_memory(program(data_dir, folder, 3, 2, seed))
    return record | {"rerun": rerun, "memory": memory, "memory3": memory3}


def one_round(data_dir: Path, quick: bool, seed: int) -> dict[str, float]:
    """Take every figure once."""
    one, two = (run_arm(arm, data_dir, quick) for arm in ("one_rank", "two_ranks"))
    trained, recipe = whole_programs(data_dir, seed), run_arm("fast", data_dir, quick)
    started, rerun = first_step(data_dir), trained["rerun"]
    plain = seconds_of([sys.executable, "-c", "import torch"])
    # What a first step needs of torch, and the same abrupt end: DDP imports torch._dynamo.
    code = "import os, torch, torch._dynamo; os._exit(0)"
    floor = seconds_of([sys.executable, "-c", code])
    ratio = trained["seconds"] / recipe["seconds"]
    memory, memory3 = trained["memory"], trained["memory3"]
    step, all_reduce = (2 * BATCH / two[arm] for arm in ("loop", "all_reduce"))  # s
    return {
        "1 rank: trainer's loop, images/s": one["loop"],
        "2 ranks: trainer's loop, images/s": two["loop"],
        "2 ranks / 1 rank, images/s (goal 1.7)": two["loop"] / one["loop"],
        "2 ranks x 32 / 1 rank x 64 images, steps/s": two["half"] / one["loop"],
        "1 rank: bare steps, images/s": one["bare"],
        "1 rank: loop / bare steps (goal 0.93)": one["loop/bare"],
        "1 rank: bare steps through DDP / bare steps": one["ddp/bare"],
        "2 ranks: bare steps, each for itself, images/s": two["bare"],
        "2 ranks: loop / bare steps (goal 0.88)": two["loop/bare"],
        "2 ranks: bare steps through DDP / bare steps": two["ddp/bare"],
        "2 ranks: bare steps, all-reduce of 1 number / bare": two["meet/bare"],
        "2 ranks: one all-reduce of the parameters, ms": 1000 * all_reduce,
        "2 ranks: all-reduce / step, time": all_reduce / step,
        "1 rank: busy / quiet machine, images/s (goal 0.33)": one["busy/loop"],
        "2 ranks: busy / quiet machine, images/s (goal 0.33)": two["busy/loop"],
        "2 ranks: one epoch, s": trained["seconds"],
        "2 ranks: test accuracy after it, %": 100 * trained["test_accuracy"],
        "train_mnist_fast, one epoch, s": recipe["seconds"],
        "train_mnist_fast, test accuracy, %": 100 * recipe["accuracy"],
        "2 ranks: epoch / train_mnist_fast, time (goal 0.45)": ratio,
        "import torch, s": plain,
        "import torch and torch._dynamo, s": floor,
        "command to first step, s": started,
        "command to first step / import both (goal 1.1)": started / floor,
        "rerun of a finished training, s": rerun,
        "rerun of a finished training / import torch (goal 2)": rerun / plain,
        "peak memory of a rank, 1 epoch, MB": memory,
        "peak memory of a rank, 3 epochs, MB": memory3,
        "peak memory, 3 epochs / 1 epoch (goal 1)": memory3 / memory,
    }


def run_arm(arm: str, data_dir: Path, quick: bool) -> dict[str, float]:
    """Run one arm in a process of its own; return what it has measured, its last line."""
    command = [sys.executable, __file__, "--data_dir", str(data_dir), "--arm", arm]
    output = subprocess.check_output(command + ["--quick"] * quick, text=True)
    return json.loads(output.splitlines()[-1])


def machine() -> str:
    """Return what the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    cpu = [*re.findall(r"model name\s*: (.*)", text), platform.machine()][0]
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{date.today()}, {versions}, {os.cpu_count()} x {cpu}"


def print_table(rounds: list[dict[str, float]]) -> None:
    print(f"{'':55}{'median':>10}{'lowest':>10}{'highest':>10}")
    for name in rounds[0]:
        values = [figures[name] for figures in rounds]
        cells = statistics.median(values), min(values), max(values)
        digits = 0 if cells[0] >= 1000 else 2
        print(f"{name:55}" + "".join(f"{value:>10,.{digits}f}" for value in cells))


ARMS = {
    "one_rank": functools.partial(compare_loops, world_size=1),
    "two_ranks": functools.partial(compare_loops, world_size=2),
    "fast": fast,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=Path, default=data.SAMPLE_DIR)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few steps, one round")
    parser.add_argument("--arm", choices=ARMS, help="for the processes that it starts")
    args = parser.parse_args()
    data_dir = args.data_dir.resolve()
    if args.arm:
        return ARMS[args.arm](data_dir, args.quick)
    if not args.quick and data_dir == data.SAMPLE_DIR:
        parser.error("--data_dir is needed, unless --quick is set")
    count = 1 if args.quick else args.rounds
    data.download(data_dir)
    name, _, _ = data.load_data(data_dir)
    print(f"{machine()}, {name}, rounds: {count}", flush=True)
    rounds = []
    for number in range(count):
        rounds.append(one_round(data_dir, args.quick, number))
        print(f"round {number + 1} of {count} done", file=sys.stderr, flush=True)
    print_table(rounds)


if __name__ == "__main__":
    main()
