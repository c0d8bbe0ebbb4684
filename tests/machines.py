"""Two machines in one: network namespaces joined by a cable, each with a name of its own.

Needs root and iproute2. A rate limit on the cable is set by tc's token bucket filter.
"""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

# In a namespace of its own, each command sees its machine's name, and both names resolve.
ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def shell(command: str) -> None:
    """Run a command; raise OSError with what it printed if it fails."""
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{command}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_machines(rate: str | None = None) -> Iterator[dict[str, list[str]]]:
    """Create machines; yield for each name the prefix of commands to be run on it.

    `rate` limits the cable, each way, in the words of tc, such as "1gbit". Raises OSError
    where this is not possible.
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
        card = f"ip link add eth0 netns {first} type veth"
        shell(f"{card} peer name eth0 netns {second}")
        for name, address in addresses.items():
            shell(f"ip -n {name} addr add {address}/24 dev eth0")
            for card in "eth0", "lo":
                shell(f"ip -n {name} link set {card} up")
            if rate:
                # A short queue: otherwise one side's backlog would count as latency.
                bucket = f"tbf rate {rate} burst 8kb latency 20ms"
                shell(f"ip netns exec {name} tc qdisc add dev eth0 root {bucket}")
        enter = ["unshare", "-mu", "sh", "-ec", ENTER, "sh"]
        shell(f"ip netns exec {first} unshare -mu true")
        yield {
            name: ["ip", "netns", "exec", name, *enter, name, str(hosts)]
            for name in addresses
        }
