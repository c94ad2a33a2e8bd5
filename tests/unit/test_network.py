"""Which interface a worker is reached by, and what is said where it cannot be."""

from __future__ import annotations

import pytest

from ftray.errors import RunError
from ftray.train import network
from ftray.train.network import Link, find_link

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "docker0": ["172.17.0.1"],
    "eth0": ["10.0.0.2", "2001:db8::2"],
    "eth10": ["10.1.0.2"],
    "wlan0": [],
}


def link(host: str, node: str, address: str | None = None, setting: str | None = None) -> Link:
    return Link(host, node, "eth0", address or node, setting)


@pytest.mark.parametrize("library", ["gloo", "nccl"])
@pytest.mark.parametrize(("node", "interface"), [("10.1.0.2", "eth10"), ("2001:db8::2", "eth0"), ("127.0.0.1", "lo")])
def test_the_interface_is_that_of_the_nodes_address(library: str, node: str, interface: str) -> None:
    found = find_link(library, node, INTERFACES, {}, "here")
    assert found == Link("here", node, interface, node, None)


@pytest.mark.parametrize(
    ("library", "value", "interface", "address"),
    [
        ("gloo", "docker0", "docker0", "172.17.0.1"),
        ("gloo", "eth10,eth0", "eth0", "10.0.0.2"),
        ("nccl", "eth", "eth0", "10.0.0.2"),
        ("nccl", "=eth10", "eth10", "10.1.0.2"),
        ("nccl", "^docker,lo", "eth0", "10.0.0.2"),
        ("nccl", "^=eth0,lo", "docker0", "172.17.0.1"),
        ("nccl", "eth1:4791", "eth10", "10.1.0.2"),
    ],
)
def test_a_users_setting_counts(library: str, value: str, interface: str, address: str) -> None:
    variable = network.VARIABLES[library]
    found = find_link(library, "10.0.0.2", INTERFACES, {variable: value}, "here")
    assert (found.interface, found.address, found.setting) == (interface, address, f"{variable}={value}")


@pytest.mark.parametrize(
    ("library", "value"), [("gloo", "eth"), ("gloo", "eth1"), ("gloo", "wlan0"), ("nccl", "=eth"), ("nccl", "ib")]
)
def test_a_setting_that_names_no_interface_is_refused(library: str, value: str) -> None:
    variable = network.VARIABLES[library]
    with pytest.raises(RunError, match="no such interface") as error:
        find_link(library, "10.0.0.2", INTERFACES, {variable: value}, "here")
    assert error.value.where == f"{variable}={value} on here"
    assert "docker0 (172.17.0.1)" in error.value.what
    assert "10.0.0.2, eth0, is found by itself" in (error.value.hint or "")


def test_an_address_that_no_interface_has_is_told() -> None:
    with pytest.raises(RunError, match="no interface has the address 203\\.0\\.113\\.9") as error:
        find_link("gloo", "203.0.113.9", INTERFACES, {}, "here")
    assert "GLOO_SOCKET_IFNAME" in (error.value.hint or "")
    assert find_link("gloo", "203.0.113.9", INTERFACES, {"GLOO_SOCKET_IFNAME": "eth0"}, "here").address == "10.0.0.2"


def test_workers_on_several_nodes_need_addresses_that_differ() -> None:
    network.refuse_unreachable([link("a", "10.0.0.2"), link("a", "10.0.0.2"), link("b", "10.0.0.3")])
    network.refuse_unreachable([link("a", "10.0.0.2", "127.0.0.1"), link("a", "10.0.0.2", "127.0.0.1")])
    loopback = [link("a", "10.0.0.2"), link("b", "10.0.0.3", "127.0.0.1", "GLOO_SOCKET_IFNAME=lo")]
    with pytest.raises(RunError, match="loopback") as error:
        network.refuse_unreachable(loopback)
    assert error.value.where == "GLOO_SOCKET_IFNAME=lo"
    alike = [link(host, node, "172.17.0.1", "=docker0") for host, node in (("a", "10.0.0.2"), ("b", "10.0.0.3"))]
    with pytest.raises(RunError, match=r"a \(eth0, 172\.17\.0\.1\) and b .* have the same address"):
        network.refuse_unreachable(alike)


def test_a_port_that_nobody_listens_on_is_told_and_one_that_is_open_is_not() -> None:
    port = network.listen("127.0.0.1")
    assert network.failures([("127.0.0.1", port)]) == []
    network.close()
    [(number, reason)] = network.failures([("127.0.0.1", port)])
    assert number == 0
    assert "refused" in reason
    with pytest.raises(RunError, match=r"192\.0\.2\.77 cannot be listened on"):
        network.listen("192.0.2.77")


def test_own_interfaces_hold_the_loopback() -> None:
    assert any("127.0.0.1" in addresses for addresses in network.own_interfaces().values())


def test_a_variable_is_set_only_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = link("a", "10.0.0.2")
    for variable in network.VARIABLES.values():
        monkeypatch.setenv(variable, "mine")
        monkeypatch.delenv(variable)
    network.tell_library("nccl", mine, several_nodes=False)
    assert "NCCL_SOCKET_IFNAME" not in network.os.environ
    network.tell_library("nccl", mine, several_nodes=True)
    network.tell_library("gloo", mine, several_nodes=False)
    assert network.os.environ["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "docker0")
    network.tell_library("gloo", mine, several_nodes=True)
    assert network.os.environ["GLOO_SOCKET_IFNAME"] == "docker0"
