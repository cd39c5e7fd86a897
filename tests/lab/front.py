"""hostpassd in the lab's host from a client's side: calls, properties, and what it signals."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable
from typing import Any

from tests.lab.machine import PATIENCE, Host

NAME, ROOT, MANAGER_PATH = "org.hostpassd1", "/org/hostpassd1", "/org/hostpassd1/manager"
MANAGER, DEVICE, MACHINE, JOB = (f"{NAME}.{word}" for word in ("Manager", "Device", "Machine", "Job"))
DEVICES = ROOT + "/devices/"
ERROR = NAME + ".Error."


class BusError(Exception):
    """An error reply."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message


class Front:
    """One client inside the host, with one unique name, running as USER."""

    def __init__(self, host: Host, user: str = "root") -> None:
        self.host = host
        self._numbers = itertools.count()
        self._process = host.open("exec python3 -B /opt/lab/call_bus.py", user=user)
        self._answers: dict[int, dict[str, Any]] = {}
        self.name = self._read()["name"]

    def close(self) -> None:
        """Leaves the bus."""
        self._process.communicate(timeout=PATIENCE)

    def begin(
        self,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        *body: Any,
        interactive: bool = False,
        destination: str = NAME,
    ) -> int:
        """Sends a call; `answer` has its reply."""
        number = next(self._numbers)
        request = {
            "id": number,
            "destination": destination,
            "path": path,
            "interface": interface,
            "member": member,
            "signature": signature,
            "body": list(body),
            "interactive": interactive,
        }
        assert self._process.stdin
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return number

    def answer(self, number: int) -> list[Any]:
        """The body of the reply to the call NUMBER. Raises BusError."""
        while number not in self._answers:
            line = self._read()
            self._answers[line["id"]] = line
        line = self._answers.pop(number)
        if "error" in line:
            raise BusError(line["error"], line["message"])
        return line["body"]  # type: ignore[no-any-return]

    def call(self, path: str, interface: str, member: str, signature: str = "", *body: Any, **how: Any) -> list[Any]:
        """Calls a method and waits for the body of its reply."""
        return self.answer(self.begin(path, interface, member, signature, *body, **how))

    def manager(self, member: str, signature: str = "", *body: Any, **how: Any) -> list[Any]:
        """Calls a method of the Manager."""
        return self.call(MANAGER_PATH, MANAGER, member, signature, *body, **how)

    def begin_operation(self, operation: str, machine: str, device: str, **options: Any) -> int:
        """Sends an Assign or Dismiss. Its job has all the time there is: the lab is slower than a host."""
        options = {"timeout": PATIENCE, **options}
        packed = {key.replace("_", "-"): [_signature(key, value), value] for key, value in options.items()}
        return self.begin(MANAGER_PATH, MANAGER, operation, "sasa{sv}", machine, [device], packed)

    def assign(self, machine: str, device: str, **options: Any) -> str:
        """Assigns; the job's path."""
        return str(self.answer(self.begin_operation("Assign", machine, device, **options))[0])

    def dismiss(self, machine: str, device: str, **options: Any) -> str:
        """Dismisses; the job's path."""
        return str(self.answer(self.begin_operation("Dismiss", machine, device, **options))[0])

    def dismiss_in_vain(self, machine: str, device: str) -> None:
        """Dismisses what the guest does not let go. Raises GuestDidNotRelease.

        What comes before the guest is asked takes of the job's time, too: where nothing is left, it gets more.
        """
        for seconds in (10, 40, 160):
            try:
                self.dismiss(machine, device, timeout=seconds)
            except BusError as error:
                if error.name != ERROR + "TimedOut":
                    raise

    def plan(self, operation: str, machine: str, device: str, **options: Any) -> dict[str, Any]:
        """PlanAssign or PlanDismiss."""
        packed = {key.replace("_", "-"): [_signature(key, value), value] for key, value in options.items()}
        return self.manager("Plan" + operation, "sasa{sv}", machine, [device], packed)[0]  # type: ignore[no-any-return]

    def blockers(self, name: str) -> dict[str, str]:
        """The messages of a device's blockers by their codes."""
        return {code: message for _, code, _, _, message in self.device(name)["Blockers"]}

    def sync(self) -> int:
        """Waits until hostpassd has told all that happened so far."""
        return int(self.manager("Sync")[0])

    def objects(self) -> dict[str, dict[str, dict[str, Any]]]:
        """GetManagedObjects."""
        interface = "org.freedesktop.DBus.ObjectManager"
        return self.call(ROOT, interface, "GetManagedObjects")[0]  # type: ignore[no-any-return]

    def device(self, name: str, interface: str = DEVICE) -> dict[str, Any]:
        """The properties of a device."""
        return self.properties(DEVICES + name, interface)

    def machine(self, name: str) -> dict[str, Any]:
        """The properties of a machine."""
        return self.properties(str(self.manager("GetMachine", "s", name)[0]), MACHINE)

    def properties(self, path: str, interface: str) -> dict[str, Any]:
        """All properties of one interface of an object."""
        return self.call(path, "org.freedesktop.DBus.Properties", "GetAll", "s", interface)[0]  # type: ignore[no-any-return]

    def state(self) -> str:
        """The Manager's State."""
        return str(self.properties(MANAGER_PATH, MANAGER)["State"])

    def holds(self, name: str) -> list[tuple[bool, bool]]:
        """(live, config) of each hold on a device."""
        return [(hold["live"], hold["config"]) for _, hold in self.device(name)["Holders"]]

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            assert self._process.stderr
            raise RuntimeError(f"the client inside the host ended: {self._process.stderr.read().decode()}")
        return json.loads(line)  # type: ignore[no-any-return]


def _signature(key: str, value: Any) -> str:
    if isinstance(value, bool):
        return "b"
    if isinstance(value, list):
        return "as"
    return {"timeout": "u", "boot_order": "u", "instance": "t"}.get(key, "s")


class Recording:
    """What hostpassd signals from now on."""

    def __init__(self, host: Host) -> None:
        self._process: subprocess.Popen[bytes] = host.open(f"exec python3 -B /opt/lab/record_bus.py {NAME}")
        self._heard: list[dict[str, Any]] = []
        assert self._next().get("ready")

    def until_generation(self, generation: int) -> list[dict[str, Any]]:
        """Everything heard up to that Generation, its own signal included."""
        while not any(_generation(signal) >= generation for signal in self._heard):
            self._heard.append(self._next())
        return list(self._heard)

    def wait_for(self, member: str, path: str = "") -> dict[str, Any]:
        """The first signal of that name (of a hold: on that device) since the recording began."""
        return self.wait_until(
            lambda signal: signal["member"] == member and path in (*map(str, signal["body"]), signal["path"], "")
        )

    def wait_until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The first signal that is WANTED since the recording began."""
        at = 0
        while True:
            if at == len(self._heard):
                self._heard.append(self._next())
            if wanted(self._heard[at]):
                return self._heard[at]
            at += 1

    def forget(self) -> None:
        """What was heard so far is over."""
        self._heard.clear()

    def members(self) -> list[str]:
        """The names of the signals read so far, in order."""
        return [signal["member"] for signal in self._heard]

    def close(self) -> None:
        """Ends the recording."""
        self._process.communicate(timeout=PATIENCE)

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, "the recorder inside the host ended"
        return json.loads(line)  # type: ignore[no-any-return]


def _generation(signal: dict[str, Any]) -> int:
    if signal["path"] != MANAGER_PATH or signal["member"] != "PropertiesChanged":
        return -1
    return int(signal["body"][1].get("Generation", -1))


def fold(tree: dict[str, Any], signals: list[dict[str, Any]]) -> dict[str, Any]:
    """The signals folded onto an earlier GetManagedObjects."""
    tree = {path: {name: dict(values) for name, values in interfaces.items()} for path, interfaces in tree.items()}
    for signal in signals:
        path, body = signal["path"], signal["body"]
        if signal["member"] == "InterfacesAdded":
            tree.setdefault(body[0], {}).update(body[1])
        elif signal["member"] == "InterfacesRemoved":
            for name in body[1]:
                del tree[body[0]][name]
            if not tree[body[0]]:
                del tree[body[0]]
        elif signal["member"] == "PropertiesChanged":
            tree[path][body[0]].update(body[1])
    return tree
