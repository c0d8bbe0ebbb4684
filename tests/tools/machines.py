"""Two machines in one: network namespaces joined by a cable, each with a name of its own.

Needs root, Linux and iproute2. A slow cable is a process that carries the packets, as many
kernels come without tc's netem: python tests/tools/machines.py NAMESPACE NAMESPACE RATE LATENCY
"""

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# In a namespace of its own, each command sees its machine's name, and both names resolve.
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def shell(command: str) -> None:
    """Run a command; raise OSError with what it printed if it fails."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


def open_card(namespace: str) -> int:
    """Create the network card eth0 in a namespace; return the file of its packets."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None).setns(file.fileno(), 0):
            raise OSError(f"cannot enter {namespace}")
    card = os.open("/dev/net/tun", os.O_RDWR)
    tunsetiff, iff_tun, iff_no_pi = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
    request = struct.pack("16sH22x", b"eth0", iff_tun | iff_no_pi)
    fcntl.ioctl(card, tunsetiff, request)
    return card


def carry(cards: list[int], rate: float, latency: float) -> None:
    """Carry packets between two cards for ever: `rate` in bits/s each way, `latency` in s."""
    waiting = deque(), deque()  # for each card, what it sent: (when it arrives, packet)
    free = [0.0, 0.0]  # when its side of the cable has sent all of them
    while True:
        next_one = min((queue[0][0] for queue in waiting if queue), default=None)
        timeout = None if next_one is None else max(0, next_one - time.monotonic())
        readable, _, _ = select.select(cards, [], [], timeout)
        now = time.monotonic()
        for side, (card, queue) in enumerate(zip(cards, waiting)):
            if card in readable:
                packet = os.read(card, 65536)
                free[side] = max(now, free[side]) + 8 * len(packet) / rate
                queue.append((free[side] + latency, packet))
            while queue and queue[0][0] <= now:
                with contextlib.suppress(OSError):  # to a card that is not up yet
                    os.write(cards[1 - side], queue.popleft()[1])


@contextlib.contextmanager
def slow_cable(names: list[str], rate: float, latency: float) -> Iterator[None]:
    """Join two namespaces by cards that are called eth0."""
    command = [sys.executable, __file__, *names, str(rate), str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            if not process.stdout.readline():
                raise OSError("cannot create network cards")
            yield
        finally:
            process.kill()


@contextlib.contextmanager
def two_machines(
    rate: float | None = None, latency: float = 0
) -> Iterator[dict[str, list[str]]]:
    """Create machines; yield for each name the prefix of commands to be run on it.

    `rate` in bits/s and `latency` in seconds slow the cable, each way. Raises OSError where
    this is not possible.
    """
    if os.geteuid():
        raise OSError("needs root")
    addresses = {f"ddp{os.getpid()}{n}": f"10.213.77.{n}" for n in (1, 2)}
    first, second = addresses
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as clean_up:
        hosts = Path(folder, "hosts")
        lines = [f"{address} {name}\n" for name, address in addresses.items()]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        for name in addresses:
            shell(f"ip netns add {name}")
            clean_up.callback(shell, f"ip netns del {name}")
        if rate:
            clean_up.enter_context(slow_cable([*addresses], rate, latency))
            for name in addresses:  # jumbo frames leave more of the CPU to the ranks
                shell(f"ip -n {name} link set eth0 mtu 9000")
        else:
            card = f"ip link add eth0 netns {first} type veth"
            shell(f"{card} peer name eth0 netns {second}")
        for name, address in addresses.items():
            shell(f"ip -n {name} addr add {address}/24 dev eth0")
            for card in "eth0", "lo":
                shell(f"ip -n {name} link set {card} up")
        enter = ["unshare", "-mu", "sh", "-ec", ENTER, "sh"]
        shell(f"ip netns exec {first} unshare -mu true")
        yield {
            name: ["ip", "netns", "exec", name, *enter, name, str(hosts)]
            for name in addresses
        }


if __name__ == "__main__":
    *namespaces, rate, latency = sys.argv[1:]
    cards = [open_card(name) for name in namespaces]
    # Its work must not wait for the ranks, which keep all cores busy.
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("ready", flush=True)
    carry(cards, float(rate), float(latency))
