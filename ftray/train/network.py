"""Which interface the workers of a run talk over: that of the address by which Ray knows a node.

Gloo asks for the address of the host's name, which many installations keep at 127.0.1.1, and NCCL takes the first
interface that looks right to it: a bridge of Docker's, a VPN. Ray's own processes reach each other by the node's
address already, so that is the one to use. A setting of the user's counts, and is checked before anybody waits for
somebody who cannot be reached. No torch, no Ray.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ftray.errors import FtrayError, RunError

VARIABLES = {"gloo": "GLOO_SOCKET_IFNAME", "nccl": "NCCL_SOCKET_IFNAME"}
CONNECT_SECONDS = 10.0

Interfaces = Mapping[str, list[str]]
"""Addresses, IPv4 first, by the name of the interface."""


@dataclass(frozen=True)
class Link:
    """How one worker is to be reached by the others."""

    host: str
    node: str
    """Address by which Ray knows the node."""
    interface: str
    address: str
    """The interface's."""
    setting: str | None
    """`NAME=value` of a user's own choice."""

    @property
    def is_loopback(self) -> bool:
        return ipaddress.ip_address(self.address).is_loopback

    def __str__(self) -> str:
        return f"{self.host} ({self.interface}, {self.address})"


def find_link(
    library: str, node: str, interfaces: Interfaces, environment: Mapping[str, str], host: str | None = None
) -> Link:
    """How this worker is to be reached. `library`: gloo or nccl; `node`: the node's address. Raises RunError where no
    interface has that address, or where the user's own setting names none that is there."""
    host = host or socket.gethostname()
    variable = VARIABLES[library]
    own = [name for name, addresses in interfaces.items() if node in addresses]
    if value := environment.get(variable):
        named = named_by(library, value, [name for name, addresses in interfaces.items() if addresses])
        if not named:
            raise RunError(
                f"there is no such interface with an address; there are {_list(interfaces)}",
                where=f"{variable}={value} on {host}",
                hint=f"unset {variable}: the interface of the node's address {node}"
                + (f", {own[0]}, is found by itself" if own else " is found by itself, where there is one"),
            )
        chosen = own[0] if own and own[0] in named else named[0]
        address = node if node in interfaces[chosen] else interfaces[chosen][0]
        return Link(host, node, chosen, address, f"{variable}={value}")
    if not own:
        raise RunError(
            f"no interface has the address {node}, by which Ray knows this node; there are {_list(interfaces)}",
            where=host,
            hint=f"start Ray there with --node-ip-address of an interface, or set {variable} on that node to the name"
            " of the interface that the other nodes can reach",
        )
    return Link(host, node, own[0], node, None)


def named_by(library: str, value: str, names: Iterable[str]) -> list[str]:
    """The interfaces of `names` that a setting means. Gloo takes names with commas between; NCCL takes beginnings of
    names, whole names after `=`, and after `^` those that it is not to use."""
    names = list(names)
    if library == "gloo":
        return [part for part in value.split(",") if part in names]
    excluded, value = value.startswith("^"), value.removeprefix("^")
    exact, value = value.startswith("="), value.removeprefix("=")
    parts = [part.split(":")[0] for part in value.split(",") if part]

    def meant(name: str) -> bool:
        return name in parts if exact else name.startswith(tuple(parts))

    return [name for name in names if meant(name) is not excluded]


def setting_of(library: str, link: Link) -> str:
    """What the library is to be told. NCCL takes names for beginnings of names unless they are marked."""
    return f"={link.interface}" if library == "nccl" else link.interface


def own_interfaces() -> dict[str, list[str]]:
    """Interfaces of this host that are up, with their addresses; link-local IPv6 ones left out, since they mean nothing
    elsewhere."""
    import psutil

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        inet = [e.address for e in entries if e.family == socket.AF_INET]
        inet6 = [e.address for e in entries if e.family == socket.AF_INET6 and not e.address.startswith("fe80")]
        if name in up:
            found[name] = inet + inet6
    return found


def refuse_unreachable(links: Iterable[Link]) -> None:
    """Raises RunError where the links of workers on several nodes show at once that they cannot reach each other."""
    by_node = {link.node: link for link in links}
    if len(by_node) < 2:
        return
    seen: dict[str, Link] = {}
    for link in by_node.values():
        if link.is_loopback:
            raise RunError(
                f"{link} is a loopback address, and the run's workers are on {len(by_node)} nodes",
                where=link.setting or link.host,
                hint=_hint(link),
            )
        if (other := seen.setdefault(link.address, link)) is not link:
            raise RunError(
                f"{other} and {link} have the same address, so neither can reach the other",
                where=link.setting or link.host,
                hint=_hint(link),
            )


def unreachable(mine: Link, other: Link, reason: str) -> FtrayError:
    return RunError(
        f"{other} cannot be reached from {mine}: {reason}",
        where=other.setting or "network",
        hint=_hint(other)
        if other.setting
        else "workers talk over ports that the system chooses: let the nodes of a cluster reach each other on all of"
        " them, and give Ray (--node-ip-address) addresses of a network that they share",
    )


def _hint(link: Link) -> str:
    if link.setting:
        return f"unset {link.setting.split('=')[0]}: the interface of the node's address {link.node} is found by itself"
    return "start Ray there with --node-ip-address of a network that all nodes share"


def _list(interfaces: Interfaces) -> str:
    return ", ".join(f"{name} ({', '.join(addresses) or 'no address'})" for name, addresses in interfaces.items())


# -------------------------------------------------------------------------------------------------- on a worker's node

_listening: socket.socket | None = None


def listen(address: str) -> int:
    """Let others try to connect until `close`; returns the port. Nobody takes the connections up: the system completes
    them by itself, which is all that is asked. Raises RunError where the address is not this host's."""
    global _listening
    close()
    found = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.bind((address, 0))
        found.listen(1024)
    except OSError as error:
        found.close()
        raise RunError(f"{address} cannot be listened on: {error.strerror}", where=socket.gethostname()) from None
    _listening = found
    return found.getsockname()[1]


def close() -> None:
    global _listening
    if _listening is not None:
        _listening.close()
        _listening = None


def failures(others: list[tuple[str, int]], seconds: float = CONNECT_SECONDS) -> list[tuple[int, str]]:
    """Connect to each (address, port) of `others`, all at once. Returns the numbers of those that failed, and why."""

    def reason(other: tuple[str, int]) -> str | None:
        try:
            with socket.create_connection(other, timeout=seconds):
                return None
        except TimeoutError:
            return f"no answer within {seconds:g} s"
        except OSError as error:
            return error.strerror or str(error)

    if not others:
        return []
    with ThreadPoolExecutor(min(64, len(others))) as pool:
        return [(i, why) for i, why in enumerate(pool.map(reason, others)) if why is not None]


def tell_library(library: str, link: Link, *, several_nodes: bool) -> None:
    """Set this process's variable, unless the user has. Within one node NCCL finds its own way."""
    if library == "gloo" or several_nodes:
        os.environ.setdefault(VARIABLES[library], setting_of(library, link))
