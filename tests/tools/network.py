"""Predict the time of a DDP step over a slow network, and compare with what is measured.

    python tests/tools/network.py        as root, on Linux with iproute2; takes three minutes

Two ranks train on two simulated machines (see machines.py), joined by cables of several
speeds and latencies. The model of a step with N ranks and P parameters of 4 bytes is

    step       = compute + straggler + all-reduce
    all-reduce = 2 (N - 1) L + 2 (N - 1) / N * 4 P / B        (a ring, as gloo and NCCL have)
    straggler  = S * sqrt(2 ln N)                             (the slowest of N normal ones)

compute is a step on the fastest cable, less its all-reduce; S is the spread of a rank's own
steps. Latency L and bandwidth B are fitted to all-reduces of 16 and of 400,000 numbers over
each cable. None of them has seen a step over that cable: this is what is predicted. L is
twice the latency of the cable, as gloo sends when the receiver has told that it is ready.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.pop("OMP_NUM_THREADS", None)

import torch
import torch.distributed as dist
from machines import two_machines
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from data import SAMPLE_DIR, load_data, make_loader
from model import ConvNet
from train_ddp import Run, settle_buckets, train_step

CABLES = {  # bits/s each way, and seconds
    "1 Tbit/s": (1e12, 0),
    "1 Gbit/s": (1e9, 0),
    "1 Gbit/s, 1 ms": (1e9, 1e-3),
    "300 Mbit/s, 1 ms": (3e8, 1e-3),
    "100 Mbit/s": (1e8, 0),
    "100 Mbit/s, 5 ms": (1e8, 5e-3),
}
SMALL = 16  # Numbers in the all-reduces that L and B are fitted to.
LARGE = 400_000
WIDE = 256  # units that are put before the last layer, for a model with more parameters
ROUNDS = 7
STEPS = 20


def measure() -> None:
    """Be a rank; rank 0 prints the median times, in seconds."""
    utils.init_distributed()
    _, _, digits = load_data(SAMPLE_DIR, seed=0, download=False)
    batches = list(make_loader(digits, 64, range(STEPS * 64)))
    narrow = ConvNet()
    wide = ConvNet()
    units = wide.layers[-1].in_features
    more = nn.Linear(units, WIDE), nn.ReLU(), nn.Linear(WIDE, 10)
    wide.layers[-1] = nn.Sequential(*more)
    arms = {}
    own_steps = []
    for name, model in ("narrow", narrow), ("wide", wide):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        run = Run(None, torch.device("cpu"), "", 0, model, optimizer)
        ddp = DistributedDataParallel(model)
        settle_buckets(run, ddp, batches[0])
        arms[name] = lambda batch, d=ddp, r=run: train_step(r, d, batch)
    small, large = torch.zeros(SMALL), torch.zeros(LARGE)
    arms |= {"small": lambda _: dist.all_reduce(small)}
    arms |= {"large": lambda _: dist.all_reduce(large)}
    times = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, work in arms.items():
            dist.barrier()
            start = time.perf_counter()
            for batch in batches:
                work(batch)
            times[name].append((time.perf_counter() - start) / STEPS)
        dist.barrier()
        for batch in batches:  # no communication: the spread of a rank's own steps
            start = time.perf_counter()
            narrow(batch[0]).sum().backward()
            own_steps.append(time.perf_counter() - start)
    figures = {name: statistics.median(values[1:]) for name, values in times.items()}
    low, _, high = statistics.quantiles(own_steps[STEPS:], n=4)
    figures["spread"] = (high - low) / 1.349  # the standard deviation, but for outliers
    for name, model in ("narrow", narrow), ("wide", wide):
        figures[f"{name} parameters"] = sum(p.numel() for p in model.parameters())
    utils.print0(json.dumps(figures))
    dist.destroy_process_group()


def measure_cable(rate: float, latency: float) -> dict[str, float]:
    with two_machines(rate, latency) as machines:
        first = next(iter(machines))
        ranks = []
        for rank, prefix in enumerate(machines.values()):
            env = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
            env |= {
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": first,
                "MASTER_PORT": "29500",
            }
            command = [*prefix, sys.executable, __file__, "--rank"]
            env = os.environ | env
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=env))
        outputs = [process.communicate(timeout=600)[0] for process in ranks]
    figures = json.loads(outputs[0])
    latency = figures["small"] / 2
    seconds = figures["large"] - figures["small"]
    return figures | {"L": latency, "B": 4 * (LARGE - SMALL) / seconds}


def all_reduce(
    parameters: float, ranks: int, latency: float, bandwidth: float
) -> float:
    """Return the seconds of a ring all-reduce."""
    return 2 * (ranks - 1) * (latency + 4 * parameters / ranks / bandwidth)


def main() -> None:
    cables = {name: measure_cable(*limits) for name, limits in CABLES.items()}
    base = cables["1 Tbit/s"]
    print(
        f"torch {torch.__version__}; times in ms, medians of {ROUNDS - 1} x {STEPS} steps"
    )
    print(f"{'cable':>16}{'L':>7}{'B, Mbit/s':>11}{'parameters':>12}", end="")
    print(f"{'all-reduce':>12}{'predicted':>11}{'measured':>10}{'error':>8}")
    compute = {}
    for limits, cable in cables.items():
        for name in "narrow", "wide":
            parameters = cable[f"{name} parameters"]
            exchange = all_reduce(parameters, 2, cable["L"], cable["B"])
            if cable is base:
                compute[name] = base[name] - exchange
            predicted, measured = compute[name] + exchange, cable[name]
            print(f"{limits:>16}{1e3 * cable['L']:>7.2f}", end="")
            print(
                f"{8e-6 * cable['B']:>11,.0f}{parameters:>12,}{1e3 * exchange:>12.2f}",
                end="",
            )
            print(f"{1e3 * predicted:>11.2f}{1e3 * measured:>10.2f}", end="")
            print(f"{predicted / measured - 1:>8.0%}")
    print(f"\nspread of a rank's own steps S: {1e3 * base['spread']:.2f} ms\n")
    mine = compute["narrow"], base["spread"], base["narrow parameters"]
    for name in "1 Gbit/s", "1 Gbit/s, 1 ms":
        print_outlook(
            f"this model, {name}", *mine, cables[name]["L"], cables[name]["B"]
        )
    print_outlook("25 M parameters, 50 us, 10 Gbit/s", 0.2, 0.004, 25e6, 50e-6, 1.25e9)
    print_outlook("100 M parameters, 50 us, 10 Gbit/s", 0.2, 0.004, 1e8, 50e-6, 1.25e9)


def print_outlook(
    case: str, own: float, spread: float, parameters: float, L: float, B: float
) -> None:
    """Print which part of N times the speed of one rank is left, and what raises it."""
    text = f"{case}, compute {1e3 * own:.1f} ms"
    print(f"{text:52}" + "".join(f"{f'N = {n}':>9}" for n in (2, 8, 64, 512)))
    for label, batches, size in (
        ("  DDP without overlap", 1, parameters),
        ("  16-bit gradients", 1, parameters / 2),
        ("  gradients of 8 batches accumulated", 8, parameters),
    ):
        print(f"{label:52}", end="")
        for ranks in 2, 8, 64, 512:
            slowest = spread * math.sqrt(batches * 2 * math.log(ranks))
            exchange = all_reduce(size, ranks, L, B)
            part = batches * own / (batches * own + slowest + exchange)
            print(f"{part:>9.0%}", end="")
        print()
    print(
        f"  many ranks spend 10% on bandwidth from {own * B / 72:,.0f} parameters on\n"
    )


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["--rank"] else main()
