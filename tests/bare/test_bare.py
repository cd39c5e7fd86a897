"""What a newcomer's first commands do on a Debian that has git, sh and apt. Each test is on a machine as installed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pytest

from tests.bare.machine import USER, Machine

PCI_DEVICES = {"pci_" + re.sub("[:.]", "_", address) for address in os.listdir("/sys/bus/pci/devices")}


@pytest.fixture(params=["bookworm", "trixie"])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A bare one of each Debian that hostpassd is for."""
    with Machine(request.param) as made:
        yield made


def succeed(machine: Machine, command: str, user: str = "root") -> str:
    """What COMMAND prints, which has to end well."""
    done = machine.run(command, user=user)
    assert done.status == 0, done.text
    return done.text


def devices(text: str) -> set[str]:
    """The names of the PCI devices in a printed tree."""
    return set(re.findall(r"^ *(pci_\w+)", text, re.MULTILINE))


def assert_assigned_and_dismissed(text: str) -> None:
    assert re.search(r"^Assign web 01:00\.0: \S+ is done; its driver is vfio-pci now$", text, re.MULTILINE), text
    assert re.search(r"^Dismiss web 01:00\.0: \S+GuestDidNotRelease: .* is vfio-pci now$", text, re.MULTILINE), text
    assert re.search(r"^Dismiss web 01:00\.0: \S+ is done; its driver is e1000e now$", text, re.MULTILINE), text


def test_the_first_command_shows_the_hosts_devices_and_leaves_nothing(machine: Machine) -> None:
    before = succeed(machine, "ls -A /tmp /usr/sbin/policy-rc.d /etc/init.d 2>&1; true")
    text = succeed(machine, "./dev run --once")
    assert devices(text) == PCI_DEVICES
    assert text.startswith("Installing ")
    assert machine.processes() == []
    assert succeed(machine, "ls -A /tmp /usr/sbin/policy-rc.d /etc/init.d 2>&1; true") == before
    assert succeed(machine, "git status --porcelain --ignored") == ""
    assert devices(again := succeed(machine, "./dev run --once")) == PCI_DEVICES
    assert "Installing" not in again


def test_the_first_command_may_be_the_simulated_host(machine: Machine) -> None:
    assert_assigned_and_dismissed(succeed(machine, "./dev run --simulated --once"))


@pytest.mark.parametrize("words", ["", " --simulated"])
def test_who_is_not_root_is_told_what_to_install_and_then_sees_the_same(machine: Machine, words: str) -> None:
    told = machine.run(f"./dev run{words} --once", user=USER)
    assert told.status == 1
    sentence, command = told.text.rstrip("\n").split("as root: ")
    assert sentence == "dev: Packages are missing; install them "
    succeed(machine, "apt-get --quiet update")
    succeed(machine, f"DEBIAN_FRONTEND=noninteractive {command} --yes")
    text = succeed(machine, f"./dev run{words} --once", user=USER)
    if words:
        assert_assigned_and_dismissed(text)
    else:
        assert devices(text) == PCI_DEVICES
    assert machine.processes() == []


@pytest.mark.timeout(2000)
def test_a_contributors_checks_pass(machine: Machine) -> None:
    """All of them: with udevd, which `./dev check` does not install, none has anything missing."""
    succeed(machine, "apt-get --quiet update && DEBIAN_FRONTEND=noninteractive apt-get install --yes udev")
    text = succeed(machine, "HOSTPASSD_FLOOD_SECONDS=1 ./dev check")  # how long floods are borne is seen on the host
    assert re.search(r"^\d+ passed, 0 failed, 0 skipped", text, re.MULTILINE)


def test_the_code_generators_of_qt_and_glib_take_the_interface(machine: Machine) -> None:
    succeed(machine, "apt-get --quiet update")
    tools = "qtbase5-dev-tools libglib2.0-dev-bin"
    succeed(machine, f"DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends {tools}")
    source, qt = "dbus/org.hostpassd1.xml", "/usr/lib/qt5/bin/qdbusxml2cpp"
    assert succeed(machine, f"{qt} -p /tmp/proxy {source} && {qt} -a /tmp/adaptor {source}") == ""
    assert "QDBusPendingReply<HostpassdCandidates> ListCandidates(" in succeed(machine, "cat /tmp/proxy.h")
    assert succeed(machine, f"gdbus-codegen --generate-c-code /tmp/gdbus --generate-docbook /tmp/doc {source}") == ""
    assert "org_hostpassd1_manager_call_list_candidates (" in succeed(machine, "cat /tmp/gdbus.h")
