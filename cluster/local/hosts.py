#!/usr/bin/env python3
"""Several hosts on one Linux machine: network namespaces with a Ray cluster in them. Needs root, and Ray installed.

    sudo $(which python) cluster/local/hosts.py up --hosts 2 --cpus 2
    sudo $(which python) cluster/local/hosts.py exec head -- ftray train quickstart-cheese workers.count=2
    sudo $(which python) cluster/local/hosts.py down

Hosts are called head, worker1, worker2 and so on; `client` is on the same network and runs no Ray. Each has an address,
a name, an /etc/hosts and temporary folders of its own; all other files are the machine's, which makes the whole disk a
shared one. A bridge in a namespace of its own joins them, so nothing of the machine's firewall lies between them, and
the machine reaches them by one link of its own. Like many an installer, each host's /etc/hosts has its own name at
127.0.1.1, where no other host can reach it.

Nothing but the standard library is needed here, and nothing outside the folder of a cluster is remembered.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path("/tmp/ftray-hosts")
"""Short, because Ray's sockets lie under it and a socket's path has 107 bytes at most."""
NETWORK = ipaddress.ip_network("10.213.0.0/16")
"""Each cluster takes a /24 of it that the machine does not use."""
GCS_PORT, DASHBOARD_PORT = 6379, 8265
STOP_SECONDS = 15.0
HEAD, CLIENT, SWITCH = "head", "client", "switch"


def main() -> None:
    arguments = parse()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started this in the background
        signal.signal(number, lambda *_: sys.exit("hosts.py: stopped"))
    cluster = Cluster(arguments.name)
    try:
        arguments.call(cluster, arguments)
    except subprocess.CalledProcessError as error:
        fail(f"{shlex.join(map(str, error.cmd))}: {(error.stderr or '').strip() or error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hosts.py", description="Several hosts on one Linux machine, with Ray on them. Needs root."
    )
    default = os.environ.get("FTRAY_HOSTS", "ftray")
    parser.add_argument(
        "--name",
        default=default,
        type=_name,
        help="which cluster, where there are several; default: FTRAY_HOSTS, else ftray",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, call: Any, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(call=call)
        return made

    up_ = command("up", up, "Make the hosts and start Ray on them.")
    up_.add_argument("--hosts", type=int, default=2, help="the head and its workers; default 2")
    up_.add_argument("--cpus", type=float, default=2, help="CPUs that Ray may use on each host; default 2")
    up_.add_argument("--head-cpus", type=float, help="of the head alone; 0: no work runs there; default: as --cpus")
    up_.add_argument("--gpus", type=int, default=0, help="GPUs that Ray may use on each host; default 0")
    up_.add_argument("--object-store-mb", type=int, default=150, help="Ray's shared memory on each host; default 150")
    up_.add_argument("--wait", type=float, default=300, help="seconds that Ray may take to start; default 300")
    up_.add_argument("--no-ray", action="store_true", help="the hosts alone")
    status_ = command("status", status, "Show the hosts, what Ray says of them, and how to talk to them.")
    status_.add_argument("--json", action="store_true", dest="as_json")
    exec_ = command("exec", execute, "Run a command on a host, in this working directory.")
    exec_.add_argument("host")
    exec_.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND …")
    for name, call, text in (
        ("cut", cut, "Pull a host's network cable: its processes live, and reach nobody."),
        ("heal", heal, "Put the cable back."),
        ("kill", kill, "Kill every process of a host at once."),
        ("start", start, "Start Ray again on a host that was killed."),
    ):
        command(name, call, text).add_argument("host")
    command("env", environment, 'Print what a shell of this machine needs to talk to the cluster: eval "$(… env)".')
    command("down", down, "End every process of the hosts, and remove all that `up` made.")
    return parser.parse_args()


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9]{0,7}", text):
        raise argparse.ArgumentTypeError("a name is one to eight small letters and digits")
    return text


class Cluster:
    """What is known of a cluster: FOLDER/state.json, written before anything is made."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, ROOT / name
        self.file, self.token = self.folder / "state.json", self.folder / "token"
        self.scratch = self.folder / "scratch"
        """The same path on every host, and another folder on each: Ray's temporary files and TMPDIR."""
        self.state: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    @property
    def hosts(self) -> dict[str, str]:
        """Addresses by name, the client's too."""
        return self.state["hosts"]

    @property
    def ray_hosts(self) -> list[str]:
        return [host for host in self.hosts if host != CLIENT]

    @property
    def dashboard(self) -> str:
        return f"http://{self.hosts[HEAD]}:{DASHBOARD_PORT}"

    @property
    def link(self) -> str:
        """The machine's own interface on the hosts' network."""
        return f"{self.name}-hosts"

    def namespace(self, host: str) -> str:
        return f"{self.name}-{host}"

    def namespaces(self) -> list[str]:
        """All there could be: also of an `up` that was broken off."""
        return [self.namespace(host) for host in [*self.state.get("hosts", {}), SWITCH]]

    def home(self, host: str) -> Path:
        return self.folder / host

    def save(self) -> None:
        self.file.write_text(json.dumps(self.state, indent=1))

    def require(self, host: str | None = None, *, ray: bool = False) -> None:
        """End the program unless the cluster is up and has this host."""
        require_root()
        if not self.state:
            fail(f"there is no cluster {self.name!r}; `hosts.py up` makes one" + _others(self.name))
        if host is not None and host not in self.hosts:
            fail(f"no host {host!r}; there are {', '.join(self.hosts)}")
        if ray and host == CLIENT:
            fail("the client runs no Ray")


# ------------------------------------------------------------------------------------------------------------ commands


def up(cluster: Cluster, arguments: argparse.Namespace) -> None:
    require_root()
    for tool in ("ip", "unshare", "mount"):
        if not shutil.which(tool):
            fail(f"{tool} is not installed (Debian: apt install iproute2 util-linux mount)")
    if cluster.state:
        fail(f"the cluster {cluster.name!r} is there already: `hosts.py status` shows it, `hosts.py down` removes it")
    if arguments.hosts < 1:
        fail("--hosts is 1 at least: the head")
    if not arguments.no_ray:
        ray_program()
    head_cpus = arguments.cpus if arguments.head_cpus is None else arguments.head_cpus
    with taken_in_turn():
        subnet = free_subnet()
        addresses = subnet.hosts()
        names = [HEAD, *(f"worker{i}" for i in range(1, arguments.hosts)), CLIENT]
        machine = str(next(addresses))
        cluster.folder.mkdir(parents=True)
        cluster.state = {
            "subnet": str(subnet),
            "machine": machine,
            "hosts": {name: str(next(addresses)) for name in names},
            "cpus": {name: head_cpus if name == HEAD else arguments.cpus for name in names},
            "gpus": arguments.gpus,
            "object_store_bytes": arguments.object_store_mb << 20,
            "start_seconds": arguments.wait,
        }
        cluster.save()
    try:
        write_token(cluster.token)
        cluster.scratch.mkdir()
        make_network(cluster)
        if not arguments.no_ray:
            await_node(cluster, HEAD, start_ray(cluster, HEAD))  # workers give up on a head that is not there yet
            workers = {host: start_ray(cluster, host) for host in cluster.ray_hosts if host != HEAD}
            for host, process in workers.items():
                await_node(cluster, host, process)
    except BaseException:
        remove(cluster)
        raise
    show(cluster)


def status(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require()
    show(cluster, as_json=arguments.as_json)


def execute(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require(arguments.host)
    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        fail("which command? hosts.py exec HOST -- COMMAND …")
    line = inside(cluster, arguments.host, command)
    os.execvpe(line[0], line, environment_of(cluster, arguments.host))


def cut(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require(arguments.host)
    ip("-n", cluster.namespace(SWITCH), "link", "set", arguments.host, "down")


def heal(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require(arguments.host)
    ip("-n", cluster.namespace(SWITCH), "link", "set", arguments.host, "up")


def kill(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require(arguments.host)
    kill_all(cluster.namespace(arguments.host))


def start(cluster: Cluster, arguments: argparse.Namespace) -> None:
    cluster.require(arguments.host, ray=True)
    if pids_in(cluster.namespace(arguments.host)):
        fail(f"processes are running on {arguments.host}; `hosts.py kill {arguments.host}` ends them")
    end = time.monotonic() + cluster.state["start_seconds"]
    while cluster.hosts[arguments.host] in (alive_nodes(cluster) or []):  # the head has not missed it yet
        if time.monotonic() > end:
            fail(f"Ray's head still takes {arguments.host} to be alive")
        time.sleep(0.5)
    await_node(cluster, arguments.host, start_ray(cluster, arguments.host))


def environment(cluster: Cluster, _: argparse.Namespace) -> None:
    cluster.require()
    values = environment_of(cluster, CLIENT)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"):
        print(f"export {name}={shlex.quote(values[name])}")


def down(cluster: Cluster, _: argparse.Namespace) -> None:
    require_root()
    if cluster.folder.exists():
        remove(cluster)
    else:
        print(f"there is no cluster {cluster.name!r}: nothing to remove" + _others(cluster.name))


# ------------------------------------------------------------------------------------------------------------- network


def make_network(cluster: Cluster) -> None:
    """A bridge in a namespace of its own; a namespace a host, with one interface `eth0`; a link to the machine."""
    switch = cluster.namespace(SWITCH)
    ip("netns", "add", switch)
    ip("-n", switch, "link", "set", "lo", "up")
    ip("-n", switch, "link", "add", "br0", "type", "bridge")
    ip("-n", switch, "link", "set", "br0", "up")
    prefix = cluster.state["subnet"].split("/")[1]
    for host, address in cluster.hosts.items():
        space = cluster.namespace(host)
        ip("netns", "add", space)
        ip("link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", host, "netns", switch)
        ip("-n", switch, "link", "set", host, "master", "br0", "up")
        ip("-n", space, "addr", "add", f"{address}/{prefix}", "dev", "eth0")
        for interface in ("lo", "eth0"):
            ip("-n", space, "link", "set", interface, "up")
        etc = Path("/etc/netns") / space  # `ip netns exec` puts these files in the place of those in /etc
        etc.mkdir(parents=True)
        others = [f"{at} {name}" for name, at in cluster.hosts.items() if name != host]
        (etc / "hosts").write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {host}", *others, ""]))
        for part in ("ray", "tmp"):
            (cluster.home(host) / part).mkdir(parents=True)
    ip("link", "add", cluster.link, "type", "veth", "peer", "name", "machine", "netns", switch)
    ip("-n", switch, "link", "set", "machine", "master", "br0", "up")
    ip("addr", "add", f"{cluster.state['machine']}/{prefix}", "dev", cluster.link)
    ip("link", "set", cluster.link, "up")


def free_subnet() -> ipaddress.IPv4Network:
    """A /24 that no route of the machine and no other cluster has."""
    routes = ip("-4", "route", "show", "table", "all").split()
    used = {_network(word) for word in routes} | {_network(json.loads(f.read_text())["subnet"]) for f in _states()}
    for candidate in NETWORK.subnets(new_prefix=24):
        if not any(other and other.prefixlen and candidate.overlaps(other) for other in used):
            return ipaddress.IPv4Network(candidate)
    fail(f"no free network in {NETWORK}")


def _network(text: str) -> ipaddress.IPv4Network | None:
    try:
        return ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        return None


def _states() -> Iterable[Path]:
    return ROOT.glob("*/state.json")


def _others(name: str) -> str:
    others = sorted(file.parent.name for file in _states() if file.parent.name != name)
    return f" (there are: {', '.join(others)}; see --name)" if others else ""


@contextmanager
def taken_in_turn() -> Iterator[None]:
    """Two `up` at once must not take the same network."""
    ROOT.mkdir(mode=0o755, exist_ok=True)
    with open(ROOT / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove(cluster: Cluster) -> None:
    """Every process in the namespaces, then these and the folder; what is not there is passed over."""
    there = set(_namespaces())
    mine = [space for space in cluster.namespaces() if space in there]
    everything = [pid for space in mine for pid in pids_in(space)]
    for pid in everything:
        _signal(pid, signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    while time.monotonic() < end and any(pids_in(space) for space in mine):
        time.sleep(0.2)
    for space in mine:
        kill_all(space)
        ip("netns", "delete", space)
    for space in cluster.namespaces():
        shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
    with suppress(OSError):  # others have files there
        Path("/etc/netns").rmdir()
    if Path(f"/sys/class/net/{cluster.link}").exists():
        subprocess.run(["ip", "link", "delete", cluster.link], capture_output=True)  # it may go with its other end
    shutil.rmtree(cluster.folder)


def _namespaces() -> list[str]:
    return [line.split()[0] for line in ip("netns", "list").splitlines() if line.strip()]


def pids_in(space: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", space).split()]


def kill_all(space: str) -> None:
    """SIGKILL to all processes of a namespace, until there are none: some may be starting others."""
    end = time.monotonic() + STOP_SECONDS
    while pids := pids_in(space):
        if time.monotonic() > end:
            fail(f"processes {pids} of {space} do not end")
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


# ----------------------------------------------------------------------------------------------------------------- Ray


def start_ray(cluster: Cluster, host: str) -> subprocess.Popen[bytes]:
    """`ray start` on a host; it writes to FOLDER/HOST/ray.log, and lives as long as Ray does there."""
    state, seconds = cluster.state, f"{cluster.state['start_seconds']:g}"
    shutil.rmtree(cluster.home(host) / "ray", ignore_errors=True)
    (cluster.home(host) / "ray").mkdir()
    command = [
        *(ray_program(), "start", "--block", "--disable-usage-stats"),
        f"--node-ip-address={cluster.hosts[host]}",
        f"--num-cpus={state['cpus'][host]:g}",
        f"--num-gpus={state['gpus']}",
        f"--object-store-memory={state['object_store_bytes']}",
    ]
    if host == HEAD:
        command += ["--head", f"--port={GCS_PORT}", f"--dashboard-host={cluster.hosts[HEAD]}"]
        command += [f"--dashboard-port={DASHBOARD_PORT}", "--include-dashboard=true"]
        command += [f"--temp-dir={cluster.scratch}/ray"]
    else:
        command += [f"--address={cluster.hosts[HEAD]}:{GCS_PORT}"]
    patience = {"RAY_DASHBOARD_STARTUP_TIMEOUT_S": seconds}
    values = {k: v for k, v in environment_of(cluster, host).items() if k != "RAY_ADDRESS"}
    with open(log_of(cluster, host), "w") as log:
        return subprocess.Popen(
            inside(cluster, host, command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=patience | values,
            start_new_session=True,
        )


def log_of(cluster: Cluster, host: str) -> Path:
    return cluster.home(host) / "ray.log"


def await_node(cluster: Cluster, host: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the host is a living node. Ends the program when its `ray start` ends, or it takes too long."""
    end = time.monotonic() + cluster.state["start_seconds"]
    while cluster.hosts[host] not in (alive_nodes(cluster) or []):
        late = time.monotonic() > end
        if late or process.poll() is not None:
            log = "\n".join(log_of(cluster, host).read_text(errors="replace").splitlines()[-25:])
            what = f"Ray is not there after {cluster.state['start_seconds']:g} s" if late else "Ray ended"
            fail(f"{what} on {host}; it said:\n\n{log}")
        time.sleep(0.5)


def alive_nodes(cluster: Cluster) -> list[str] | None:
    """Addresses of Ray's living nodes, as the dashboard tells them; None while there is no answer."""
    request = urllib.request.Request(
        f"{cluster.dashboard}/nodes?view=summary", headers={"Authorization": f"Bearer {cluster.token.read_text()}"}
    )
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or not ready to answer
        return None
    raylets = [node.get("raylet", {}) for node in nodes]
    return [raylet["nodeManagerAddress"] for raylet in raylets if raylet.get("state") == "ALIVE"]


def write_token(path: Path) -> None:
    """It is root's, or theirs who called `sudo`: their own shell talks to the cluster with it, see `env`."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        if "SUDO_UID" in os.environ:
            os.fchown(file.fileno(), int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))
        file.write(secrets.token_hex(32))


def ray_program() -> str:
    """`ray` beside this Python, else in PATH."""
    beside = Path(sys.executable).parent / "ray"
    found = str(beside) if beside.exists() else shutil.which("ray")
    if not found:
        fail(f"Ray is not installed for {sys.executable}; with sudo, name your own Python: sudo $(which python) …")
    return found


# ---------------------------------------------------------------------------------------------------------------- hosts

_ENTER = 'echo "$0" > /proc/sys/kernel/hostname && mount --bind "$1" "$2" && shift 2 && exec "$@"'
"""Inside new UTS and mount namespaces: the host's name, and its own scratch folder."""


def inside(cluster: Cluster, host: str, command: list[str]) -> list[str]:
    """The command line that runs `command` on a host. Signals reach the command itself."""
    enter = ["ip", "netns", "exec", cluster.namespace(host), "unshare", "--uts", "sh", "-c", _ENTER, host]
    return [*enter, str(cluster.home(host)), str(cluster.scratch), *command]


def environment_of(cluster: Cluster, host: str) -> dict[str, str]:
    """What a process on a host sees: this one's variables, without those that lead to another Ray."""
    passed = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "TMPDIR": f"{cluster.scratch}/tmp",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
        "RAY_API_SERVER_ADDRESS": cluster.dashboard,
        "RAY_DASHBOARD_ADDRESS": cluster.dashboard,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    address = {} if host == CLIENT else {"RAY_ADDRESS": f"{cluster.hosts[HEAD]}:{GCS_PORT}"}
    return passed | own | address


_FOREIGN = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_JOB_ID", "RAY_TMPDIR", "http_proxy", "HTTP_PROXY")


def show(cluster: Cluster, *, as_json: bool = False) -> None:
    nodes = alive_nodes(cluster)
    links = {link["ifname"]: link for link in json.loads(ip("-n", cluster.namespace(SWITCH), "-json", "link", "show"))}
    rows = []
    for host, address in cluster.hosts.items():
        processes = len(pids_in(cluster.namespace(host)))
        ray = "none" if host == CLIENT else "alive" if address in (nodes or []) else "not alive"
        cable = "in" if "UP" in links[host]["flags"] else "cut"
        rows.append({"host": host, "address": address, "cable": cable, "processes": processes, "ray": ray})
    if as_json:
        facts = {"name": cluster.name, "folder": str(cluster.folder), "token": str(cluster.token)}
        print(json.dumps(facts | {"dashboard": cluster.dashboard, "hosts": rows}))
        return
    print(f"{'host':10}{'address':16}{'cable':7}{'processes':11}ray")
    for row in rows:
        print(f"{row['host']:10}{row['address']:16}{row['cable']:7}{row['processes']:<11}{row['ray']}")
    name = f" --name {cluster.name}" if cluster.name != "ftray" else ""
    print(f"\ndashboard and jobs: {cluster.dashboard} (this machine reaches it; it asks for the token)")
    print(f"token:              {cluster.token}")
    print(f"logs:               {cluster.folder}/HOST/ray.log and HOST/ray/session_latest/logs")
    print(f"a command on a host: hosts.py{name} exec {HEAD} -- ftray train RUN")


def require_root() -> None:
    if sys.platform != "linux":
        fail("network namespaces are Linux's")
    if os.geteuid() != 0:
        fail("this needs root: sudo $(which python) cluster/local/hosts.py …")


def fail(text: str) -> NoReturn:
    sys.exit(f"hosts.py: {text}")


if __name__ == "__main__":
    main()
