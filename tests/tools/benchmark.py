"""Measure the trainer against the limit of the machine and against a fast recipe.

    python tests/tools/benchmark.py --data_dir FOLDER_WITH_FULL_MNIST [--rounds 3]
    python tests/tools/benchmark.py --quick    to check that it works; its figures mean nothing

Every figure is taken once in each round, in turn, so that a slow minute of the machine hits
all alike. Ratios are formed within a round.

"Bare steps" are what the trainer computes and nothing else: the same model, optimizer and
batches, without DDP, loader, logging or saving. With two ranks, each takes them for itself.
"Resident batches" are the trainer's own loop, with batches that are in memory already: what
it is faster by is the price of the ordinary DataLoader.
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
from types import SimpleNamespace

# Before torch is imported: figures for CPUs, with one thread per rank.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("OMP_NUM_THREADS", None)

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import data
import train_ddp
import utils

BATCH = 64  # Images per rank and step.
Arm = Callable[[], None]


def compare_loops(data_dir: Path, quick: bool, world_size: int) -> None:
    """Start `world_size` ranks as the program does; rank 0 prints the figures as JSON."""
    args = SimpleNamespace(data_dir=data_dir, quick=quick, world_size=world_size)
    if world_size == 1:
        measure_as_rank(args)
    else:
        utils.launch(measure_as_rank, args)


def measure_as_rank(args: SimpleNamespace) -> None:
    """Set up what the program sets up, with few images, and measure in place of training."""
    quick = args.quick
    blocks = 1 if quick else 10
    steps = 4 if quick else 30
    device = utils.init_distributed()
    world_size = args.world_size
    images, labels = read(args.data_dir, train=True)
    size = world_size * BATCH * steps
    train_set = data.Digits(images[:size], labels[:size], seed=0)
    model = train_ddp.build_model(train_set)
    # A low rate: units that die leave denormal numbers, which are slow to compute.
    optimizer = train_ddp.build_optimizer(model, 0.0001)
    flags = SimpleNamespace(epochs=1, batch_size=BATCH, world_size=world_size)
    flags.save_every = None
    run = train_ddp.Run(flags, device, "", size, model, optimizer)
    ddp = DistributedDataParallel(model)
    arms = create_arms(run, ddp, train_set)
    rates = time_arms(arms, blocks, BATCH * steps)
    if dist.get_rank() == 0:
        figures = summarize(rates)
        figures["peak_share"] = flops_of_an_image(model) * figures["bare"] / world_size
        figures["peak_share"] /= matrix_product_flops(quick)
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def read(data_dir: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels as the files have them."""
    files = getattr(torchvision.datasets, data.DATASET)(data_dir, train=train)
    return files.data, files.targets


def create_arms(
    run: train_ddp.Run, ddp: nn.Module, train_set: data.Digits
) -> dict[str, Arm]:
    """Return what is to be compared; each call takes the steps of one short epoch."""
    sampler = data.ResumableSampler(train_set)
    loader = data.make_loader(train_set, BATCH, sampler)
    half = data.make_loader(train_set, BATCH // 2, sampler)
    batches = list(loader)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    model.train()
    gradients = torch.zeros(sum(p.numel() for p in model.parameters()))
    loss_function = nn.CrossEntropyLoss(label_smoothing=train_ddp.LABEL_SMOOTHING)

    def loop(loader, batch_size: int = BATCH) -> None:
        run.args.batch_size = batch_size
        run.progress = train_ddp.Progress()
        sampler.set_epoch(0)
        train_set.set_epoch(0)
        train_ddp.train_epoch(run, ddp, loader, utils.StopRequest())

    def ddp_steps() -> None:
        for batch in batches:
            train_ddp.train_step(run, ddp, batch)

    def bare_steps(meet: Arm = lambda: None) -> None:
        for images, labels in batches:
            loss_function(model(images), labels).backward()
            meet()
            optimizer.step()
            optimizer.zero_grad()

    def all_reduce() -> None:
        for _ in batches:
            dist.all_reduce(gradients)

    meet = functools.partial(dist.all_reduce, torch.zeros(1))
    arms = {
        "loop": functools.partial(loop, loader),
        "resident": functools.partial(loop, batches),
        "ddp": ddp_steps,
        "bare": bare_steps,
        "meet": functools.partial(bare_steps, meet),
        "busy": functools.partial(loop, loader),
        "all_reduce": all_reduce,
    }
    if run.args.world_size == 2:
        arms["half"] = functools.partial(loop, half, BATCH // 2)
    return arms


def flops_of_an_image(model: nn.Module) -> float:
    """Return the floating-point operations of a training step, for one image."""
    images = torch.zeros(BATCH, 28, 28, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad()
    return counter.get_total_flops() / BATCH


def matrix_product_flops(quick: bool) -> float:
    """Return the floating-point operations per second of one thread in a matrix product."""
    size = 256 if quick else 1024
    a = torch.rand(size, size)
    seconds = []
    for _ in range(3 if quick else 20):
        start = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def time_arms(arms: dict[str, Arm], blocks: int, images: int) -> dict[str, list[float]]:
    """Run the arms in turn; return images/s of all ranks together, by arm and block."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
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
    return dict(zip(arms, sums[:, 1:].tolist()))  # The first block warms up.


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
    pairs = [("loop", "bare"), ("loop", "resident"), ("ddp", "bare"), ("meet", "bare")]
    for pair in [*pairs, ("busy", "loop")]:
        ratios = [a / b for a, b in zip(*(rates[name] for name in pair))]
        figures["/".join(pair)] = statistics.median(ratios)
    return figures


def fast(data_dir: Path, quick: bool) -> None:
    """Take one epoch of the recipe of github.com/tuomaso/train_mnist_fast, last notebook.

    Conv 5x5 of 24 and conv 3x3 of 32 channels, each with a max-pool and ReLU, linear layers
    of 256 and 10; Adam with betas (0.7, 0.9), one-cycle to 0.01, batches of 256, in order.
    """
    torch.set_num_threads(2)
    pixels, labels = zip(*(read(data_dir, train) for train in (True, False)))
    images, test_images = [
        (part.unsqueeze(1).float() / 255 - 0.1307) / 0.3081 for part in pixels
    ]
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


def program(data_dir: Path, folder: str, epochs: int, world_size: int, seed: int):
    """Return the command that runs the trainer itself."""
    flags = f"--epochs {epochs} --world_size {world_size} --seed {seed}".split()
    flags += ["--batch_size", str(BATCH), "--data_dir", str(data_dir)]
    script = str(ROOT / "train_ddp.py")
    return [sys.executable, script, *flags, "--checkpoint_dir", folder]


def measure(command: list[str], folder: str | None = None) -> tuple[float, float]:
    """Return the seconds that a command takes, and the peak memory of its largest process, MB.

    Its temporary files go to `folder`, if given.
    """
    env = os.environ | ({"TMPDIR": folder} if folder else {})
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=env)
    _, process.returncode, usage = os.wait4(process.pid, 0)
    if process.returncode:
        raise RuntimeError(f"{command} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1024  # KiB on Linux


def first_step(data_dir: Path) -> float:
    """Return the seconds from the command to the first training step, which exits."""
    code = "import os, sys, train_ddp; train_ddp.train_step = lambda *_: os._exit(0)\n"
    with tempfile.TemporaryDirectory() as folder:
        command = program(data_dir, folder, epochs=1, world_size=1, seed=0)
        command[1:2] = "-c", code + "train_ddp.main()"
        return measure(command, folder)[0]


def whole_programs(data_dir: Path, seed: int) -> dict[str, float]:
    """Train one epoch, do it again with nothing left to do, and train three epochs."""
    with tempfile.TemporaryDirectory() as folder:
        _, memory = measure(program(data_dir, folder, 1, 2, seed))
        [path] = Path(folder).glob("*.pt")
        [record] = torch.load(path, weights_only=True)["progress"]["history"]
        rerun, _ = measure(program(data_dir, folder, 1, 1, seed))
    with tempfile.TemporaryDirectory() as folder:
        _, memory3 = measure(program(data_dir, folder, 3, 2, seed))
    return record | {"rerun": rerun, "memory": memory, "memory3": memory3}


def one_round(data_dir: Path, quick: bool, seed: int) -> dict[str, float]:
    """Take every figure once."""
    one, two = (run_arm(arm, data_dir, quick) for arm in ("one_rank", "two_ranks"))
    trained = whole_programs(data_dir, seed)
    recipe = run_arm("fast", data_dir, quick)
    started = first_step(data_dir)
    plain, _ = measure([sys.executable, "-c", "import torch"])
    # What a first step needs, and the same abrupt end: DDP imports torch._dynamo.
    code = "import os, torch, torchvision, torch._dynamo; os._exit(0)"
    floor, _ = measure([sys.executable, "-c", code])
    ratio = trained["seconds"] / recipe["seconds"]
    rerun = trained["rerun"]
    memory = trained["memory"]
    exchange = 2 * BATCH / two["all_reduce"]  # s
    return {
        "1 rank: trainer's loop, images/s": one["loop"],
        "2 ranks: trainer's loop, images/s": two["loop"],
        "2 ranks / 1 rank, images/s (goal 1.7)": two["loop"] / one["loop"],
        "2 ranks x 32 / 1 rank x 64 images, steps/s": two["half"] / one["loop"],
        "1 rank: bare steps, images/s": one["bare"],
        "1 rank: loop / bare steps (goal 0.93)": one["loop/bare"],
        "1 rank: loop / loop with resident batches": one["loop/resident"],
        "1 rank: bare steps through DDP / bare steps": one["ddp/bare"],
        "1 rank: bare steps / peak of a matrix product, FLOP/s": one["peak_share"],
        "2 ranks: bare steps, each for itself, images/s": two["bare"],
        "2 ranks: loop / bare steps (goal 0.88)": two["loop/bare"],
        "2 ranks: loop / loop with resident batches": two["loop/resident"],
        "2 ranks: bare steps through DDP / bare steps": two["ddp/bare"],
        "2 ranks: bare steps, all-reduce of 1 number / bare": two["meet/bare"],
        "2 ranks: one all-reduce of the parameters, ms": 1000 * exchange,
        "1 rank: busy / quiet machine, images/s (goal 0.33)": one["busy/loop"],
        "2 ranks: busy / quiet machine, images/s (goal 0.33)": two["busy/loop"],
        "2 ranks: one epoch, s": trained["seconds"],
        "2 ranks: test accuracy after it, %": 100 * trained["test_accuracy"],
        "train_mnist_fast, one epoch, s": recipe["seconds"],
        "train_mnist_fast, test accuracy, %": 100 * recipe["accuracy"],
        "2 ranks: epoch / train_mnist_fast, time (goal 0.47)": ratio,
        "import torch, s": plain,
        "import torch, torchvision and torch._dynamo, s": floor,
        "command to first step, s": started,
        "command to first step / import all (goal 1.2)": started / floor,
        "rerun of a finished training, s": rerun,
        "rerun of a finished training / import torch (goal 2)": rerun / plain,
        "peak memory of a rank, 1 epoch, MB": memory,
        "peak memory, 3 epochs / 1 epoch (goal 1)": trained["memory3"] / memory,
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
    name, _, _ = data.load_data(data_dir, seed=0, download=True)
    print(f"{machine()}, {name}, rounds: {count}", flush=True)
    rounds = []
    for number in range(count):
        rounds.append(one_round(data_dir, args.quick, number))
        print(f"round {number + 1} of {count} done", file=sys.stderr, flush=True)
    print_table(rounds)


if __name__ == "__main__":
    main()
