"""The lab's host: a whole virtualisation host in QEMU under software emulation, with real devices to hand around.

What is plugged in, by its place on the PCI root (see DEVICES): a display, the root disk and the uplink, which the host
itself needs; a lone NIC and an SR-IOV NIC behind root ports of their own; three empty root ports; a conventional bridge
with a NIC and a sound card; a graphics card with its sound function; an NVMe disk; a random generator; a USB
controller with a hub, a tablet and a serial port behind it, and a stick; a SCSI controller with a disk and a CD drive.
Everything listens on unix sockets or on loopback, and dies with the process that booted it.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab.image import Image, ready_image

# Seconds after which whoever waits for something has waited in vain. It is long, for no test may hang on the speed of
# the machine that it runs on: under software emulation everything takes what it takes.
PATIENCE = 300

DISPLAY = "0000:00:02.0"
ROOT_DISK = "0000:00:03.0"
UPLINK = "0000:00:04.0"
USB_CONTROLLER = "0000:00:0b.0"
SCSI_CONTROLLER = "0000:00:0c.0"
LONE_NIC = "0000:01:00.0"
SRIOV_NIC = "0000:02:00.0"
BRIDGED_NIC = "0000:06:01.0"
BRIDGED_SOUND = "0000:06:02.0"
BRIDGE = "0000:00:0a.0"
GRAPHICS = "0000:07:00.0"
GRAPHICS_SOUND = "0000:07:00.1"
NVME = "0000:08:00.0"
RANDOM = "0000:00:0f.0"
EMPTY_PORTS = ("empty1", "empty2", "empty3")
"""QEMU's ids of the empty root ports, for plug(..., bus=...); what is plugged there is 0000:03:00.0 and so on."""

STICK_SERIAL = "STICK-0001"
DISK_SERIAL = "DISK-0001"

DEVICES = """
    VGA,id=display,bus=pcie.0,addr=0x2
    virtio-blk-pci,id=root,drive=root,serial=ROOT-0001,bus=pcie.0,addr=0x3,romfile=
    virtio-net-pci,id=uplink,netdev=uplink,mac=52:54:00:00:00:01,bus=pcie.0,addr=0x4,romfile=
    pcie-root-port,id=port1,chassis=1,slot=1,bus=pcie.0,addr=0x5
    pcie-root-port,id=port2,chassis=2,slot=2,bus=pcie.0,addr=0x6
    pcie-root-port,id=empty1,chassis=3,slot=3,bus=pcie.0,addr=0x7
    pcie-root-port,id=empty2,chassis=4,slot=4,bus=pcie.0,addr=0x8
    pcie-root-port,id=empty3,chassis=5,slot=5,bus=pcie.0,addr=0x9
    pcie-pci-bridge,id=bridge,bus=pcie.0,addr=0xa
    qemu-xhci,id=xhci,p2=8,p3=8,bus=pcie.0,addr=0xb
    virtio-scsi-pci,id=scsi,bus=pcie.0,addr=0xc
    e1000e,id=lone-nic,mac=52:54:00:00:00:02,bus=port1,romfile=
    igb,id=sriov-nic,mac=52:54:00:00:00:03,bus=port2,romfile=
    e1000,id=bridged-nic,mac=52:54:00:00:00:04,bus=bridge,addr=0x1,romfile=
    AC97,id=sound,audiodev=silence,bus=bridge,addr=0x2
    pcie-root-port,id=port3,chassis=6,slot=6,bus=pcie.0,addr=0xd
    bochs-display,id=graphics,bus=port3,addr=0.0,multifunction=on
    ich9-intel-hda,id=graphics-sound,bus=port3,addr=0.1
    pcie-root-port,id=port4,chassis=7,slot=7,bus=pcie.0,addr=0xe
    nvme,id=nvme,drive=nvme,serial=NVME-0001,bus=port4
    virtio-rng-pci,id=random,bus=pcie.0,addr=0xf
    usb-hub,id=hub,bus=xhci.0,port=1
    usb-tablet,id=tablet,bus=xhci.0,port=1.1
    usb-serial,id=usb-serial,chardev=nothing,always-plugged=on,serial=SERIAL-0001,bus=xhci.0,port=1.2
    usb-storage,id=stick,drive=stick-disk,serial=STICK-0001,bus=xhci.0,port=2
    scsi-hd,id=disk,drive=disk,serial=DISK-0001,bus=scsi.0,channel=0,scsi-id=0,lun=0
    scsi-cd,id=cd,drive=cd,serial=CD-0001,bus=scsi.0,channel=0,scsi-id=1,lun=0
""".split()  # noqa: SIM905

QEMU = """
    qemu-system-x86_64 -name host -nodefaults -no-user-config -display none
    -machine q35,kernel-irqchip=split -accel tcg,thread=multi,tb-size=1024 -cpu max -smp 2
    -kernel /mnt/vmlinuz -initrd /mnt/initrd
    -append 'root=/dev/vda rw console=ttyS0 intel_iommu=on quiet systemd.show_status=0 mitigations=off audit=0'
    -qmp unix:/srv/qmp.sock,server=on,wait=off
    -chardev socket,id=serial,path=/srv/serial.sock,server=on,wait=off,logfile=/srv/serial.log
    -serial chardev:serial
    -netdev user,id=uplink,hostfwd=tcp:127.0.0.1:0-:22
    -audiodev none,id=silence
    -chardev null,id=nothing
    -drive id=root,if=none,file=/mnt/disk.raw,format=raw,snapshot=on,cache=unsafe,discard=unmap
    -device intel-iommu,caching-mode=on,intremap=on,device-iotlb=on
"""
"""The machine itself. Its changes to the root disk go to an overlay that has no name and ends with it."""

CHROOT = """
set -e
mount --bind /dev "$1/dev"
mount --bind /proc "$1/proc"
mount --bind "$2" "$1/mnt"
mount --bind "$3" "$1/srv"
root=$1
shift 3
exec chroot "$root" "$@"
"""
"""Runs a program of the image on the outside: the image's folder at /mnt, the running host's own folder at /srv."""

READY = "host is up"

INSIDE = Path(__file__).resolve().parent / "inside"
"""The lab's own programs that run inside the host, at /opt/lab there."""


@dataclass(frozen=True)
class Result:
    """What a command inside the host said and how it ended."""

    stdout: str
    stderr: str
    status: int


class CommandFailed(Exception):
    """A command inside the host ended with another status than 0."""

    def __init__(self, command: str, result: Result) -> None:
        super().__init__(f"{command!r} ended with {result.status}\n{result.stdout}{result.stderr}")
        self.result = result


class QmpError(Exception):
    """QEMU refused a command."""


class Host:
    """The virtualisation host: booted once, told what to do over ssh from within and over QMP from without."""

    def __init__(self, image: Image | None = None, memory: int = 4096) -> None:
        self.image = image or ready_image()
        self.memory = memory
        self.folder = Path(tempfile.mkdtemp(prefix="hostpassd-lab-"))
        self._qemu: subprocess.Popen[bytes] | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._qmp: _Qmp | None = None
        self._ssh: list[str] = []
        self._boots = 0
        self._nodes: dict[str, str] = {"stick": "stick-disk"}

    def __enter__(self) -> Host:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # --- life ---

    def boot(self, timeout: float = 2 * PATIENCE) -> None:
        """Starts the host and returns when it takes commands."""
        for name in ("stick", "disk", "cd", "nvme"):
            _make_disk(self.folder / f"{name}.img")
        log = (self.folder / "qemu.log").open("wb")
        self._qemu = subprocess.Popen(
            _dying_with_us(_in_image(self.image, self.folder, self._arguments())),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        try:
            self._qmp = _Qmp(self.folder / "qmp.sock", self._qemu)
            self._wait_until_up(timeout)
            self._resets()
        except BaseException as error:
            if isinstance(error, Exception):
                error.add_note(self._last_words())
            self.stop()
            raise

    def stop(self) -> None:
        """Switches the host off and leaves nothing behind."""
        for process in (self._master, self._qemu):
            if process is not None:
                process.kill()
                process.wait()
        if self._qmp is not None:
            self._qmp.close()
        self._master = self._qemu = self._qmp = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def reboot(self, *, power_cut: bool = False, timeout: float = 2 * PATIENCE) -> None:
        """Boots the same disk again, in an orderly way or as after a power cut."""
        if power_cut:
            self.qmp("system_reset")
        else:
            self.run("systemctl reboot", check=False)
        self.qmp_event("RESET", timeout)
        self._wait_until_up(timeout)
        self._resets()

    def lost(self) -> str:
        """What became of the host without being asked for, and its last words; '' where it is there as before."""
        assert self._qemu is not None
        if self._qemu.poll() is not None:
            return f"QEMU ended with status {self._qemu.returncode}. {self._last_words()}"
        if self._resets():
            return f"The emulated host restarted by itself. {self._last_words()}"
        try:
            self.run("true", timeout=60)
        except (TimeoutError, subprocess.TimeoutExpired, CommandFailed) as error:
            return f"The host no longer answers: {error}. {self._last_words()}"
        return ""

    def _resets(self) -> int:
        """How often the host was reset since this was last asked; QEMU may tell of one reset more than once."""
        count = 0
        with contextlib.suppress(TimeoutError):
            while True:
                self.qmp_event("RESET", 0)
                count += 1
        return count

    def serial_log(self) -> str:
        """All that the host wrote on its serial console."""
        path = self.folder / "serial.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def _wait_until_up(self, timeout: float) -> None:
        assert self._qemu is not None
        until = time.monotonic() + timeout
        while self.serial_log().count(READY) <= self._boots:
            if self._qemu.poll() is not None:
                raise RuntimeError(f"QEMU ended with status {self._qemu.returncode}")
            if time.monotonic() > until:
                raise TimeoutError(f"the host was not up after {timeout:.0f} s")
            time.sleep(0.2)
        self._boots += 1
        self._connect(until)

    def _connect(self, until: float) -> None:
        """Opens the one ssh connection that every command then shares."""
        if self._master is not None:
            self._master.kill()
            self._master.wait()
        control = self.folder / "ssh.sock"
        control.unlink(missing_ok=True)
        options = "-F none -o BatchMode=yes -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        self._ssh = ["ssh", *options.split(), "-o", "UserKnownHostsFile=/dev/null", "-o", "ConnectTimeout=60"]
        self._ssh += ["-o", "ServerAliveInterval=20", "-o", "ServerAliveCountMax=3"]
        self._ssh += ["-S", str(control), "-i", str(self.image.key), "-p", str(self.ssh_port())]
        self._master = subprocess.Popen(
            _dying_with_us([*self._ssh, "-M", "-N", "root@127.0.0.1"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not control.exists():
            if self._master.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the host is up but takes no ssh connection")
            time.sleep(0.05)
        self.copy_in(INSIDE, "/opt/lab")

    def _last_words(self) -> str:
        log = self.folder / "qemu.log"
        said = log.read_text(errors="replace") if log.exists() else ""
        return f"QEMU said: {said}\nThe serial console ended with:\n{self.serial_log()[-3000:]}"

    def _arguments(self) -> list[str]:
        arguments = [*shlex.split(QEMU), "-m", str(self.memory)]
        for name, node in (("stick", "stick-disk"), ("disk", "disk"), ("cd", "cd"), ("nvme", "nvme")):
            arguments += ["-blockdev", json.dumps(_blockdev(node, name))]
        for device in DEVICES:
            arguments += ["-device", device]
        return arguments

    # --- from within ---

    def run(
        self,
        command: str,
        *,
        check: bool = True,
        timeout: float = PATIENCE,
        user: str = "root",
        input: str | bytes | None = None,
    ) -> Result:
        """Runs a shell command inside the host; with check, any status but 0 raises CommandFailed."""
        done = self._run_bytes(command, timeout, user, input.encode() if isinstance(input, str) else input)
        result = Result(done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), done.returncode)
        if result.status == 124:
            raise TimeoutError(f"{command!r} was not done after {timeout:.0f} s\n{result.stdout}{result.stderr}")
        if check and result.status != 0:
            raise CommandFailed(command, result)
        return result

    def open(self, command: str, *, user: str = "root") -> subprocess.Popen[bytes]:
        """Starts a command inside the host that is spoken to through its pipes; it should end with its input."""
        return subprocess.Popen(
            self._as_user(command, user),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def access(self) -> str:
        """How else the running host can be reached, for people."""
        command = shlex.join([*self._ssh, "root@127.0.0.1"])
        return f"Another shell: {command}\nQEMU's control socket: {self.folder}/qmp.sock"

    def shell(self) -> int:
        """Puts the person at the terminal in front of a shell inside the host."""
        return subprocess.call([*self._ssh, "-t", "root@127.0.0.1"])

    def wait_for(self, condition: str, timeout: float = PATIENCE, *, user: str = "root", interval: float = 0.2) -> None:
        """Waits inside the host, as one command, until a shell condition holds."""
        loop = f"until {{ {condition}\n}} >/dev/null 2>&1; do sleep {interval}; done"
        self.run(loop, timeout=timeout, user=user)

    def copy_in(self, path: Path, target: str) -> None:
        """Copies a file or a folder's content to the absolute path `target` inside the host."""
        place = shlex.quote(target)
        if path.is_dir():
            packed = subprocess.run(["tar", "-c", "-C", str(path), "."], stdout=subprocess.PIPE, check=True).stdout
            self.run(f"mkdir -p {place} && tar -x --no-same-owner -C {place}", input=packed)
        else:
            mode = path.stat().st_mode & 0o777
            self.run(f"cat > {place} && chmod {mode:o} {place}", input=path.read_bytes())

    def copy_out(self, source: str, path: Path) -> None:
        """Copies a file or a folder's content from the absolute path `source` inside the host."""
        place = shlex.quote(source)
        if self.run(f"test -d {place}", check=False).status == 0:
            path.mkdir(parents=True, exist_ok=True)
            packed = self._run_bytes(f"tar -c -C {place} .", 120, "root", None).stdout
            subprocess.run(["tar", "-x", "--no-same-owner", "-C", str(path)], input=packed, check=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.run(f"test -f {place}")
            path.write_bytes(self._run_bytes(f"cat {place}", 120, "root", None).stdout)

    def ssh_port(self) -> int:
        """The port on loopback that leads to the host's ssh server."""
        shown = str(self.qmp("human-monitor-command", **{"command-line": "info usernet"}))
        for line in shown.splitlines():
            if "HOST_FORWARD" in line:
                return int(line.split()[3])
        raise RuntimeError(f"QEMU forwards no port: {shown}")

    def _run_bytes(
        self, command: str, timeout: float, user: str, data: bytes | None
    ) -> subprocess.CompletedProcess[bytes]:
        limited = f"timeout -k 5 {timeout:g} sh -c {shlex.quote(command)}"
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
        command_line = self._as_user(limited, user)
        return subprocess.run(command_line, capture_output=True, check=False, timeout=timeout + 30, **source)

    def _as_user(self, command: str, user: str) -> list[str]:
        if user != "root":
            identity = f"--reuid={user} --regid={user} --init-groups --reset-env"
            command = f"cd / && exec setpriv {identity} sh -c {shlex.quote(command)}"
        return [*self._ssh, "root@127.0.0.1", command]

    # --- from without ---

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Tells QEMU a command and returns its answer."""
        assert self._qmp is not None, "the host is not running"
        return self._qmp.call(command, arguments)

    def qmp_event(self, name: str, timeout: float = PATIENCE, **data: Any) -> dict[str, Any]:
        """The first event of that name and that data not yet asked for, waited for if need be."""
        assert self._qmp is not None, "the host is not running"
        return self._qmp.event(name, data, timeout)

    def plug(self, driver: str, id: str, **properties: Any) -> None:
        """Plugs a device in, as a hand would."""
        self.qmp("device_add", driver=driver, id=id, **properties)

    def unplug(self, id: str, timeout: float = PATIENCE) -> None:
        """Pulls a device out; a PCI device is gone when the host has let go of it."""
        self.qmp("device_del", id=id)
        self.qmp_event("DEVICE_DELETED", timeout, device=id)
        if node := self._nodes.pop(id, None):
            self.qmp("blockdev-del", **{"node-name": node})

    def plug_usb_storage(self, id: str, serial: str, port: str | None = None) -> None:
        """Plugs a USB stick in; its content is kept per id, its vendor and product are always 46f4:0001."""
        _make_disk(self.folder / f"{id}.img")
        node = f"{id}-{time.monotonic_ns()}"
        self.qmp("blockdev-add", **_blockdev(node, id))
        self._nodes[id] = node
        place = {} if port is None else {"port": port}
        self.plug("usb-storage", id, drive=node, serial=serial, bus="xhci.0", **place)


class _Qmp:
    """QEMU's control socket."""

    def __init__(self, path: Path, qemu: subprocess.Popen[bytes]) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        until = time.monotonic() + PATIENCE
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if qemu.poll() is not None or time.monotonic() > until:
                    raise RuntimeError("QEMU did not start") from None
                time.sleep(0.05)
        self._read(until)
        self.call("qmp_capabilities", {})

    def call(self, command: str, arguments: dict[str, Any]) -> Any:
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        until = time.monotonic() + PATIENCE
        while True:
            message = self._read(until)
            if "event" in message:
                self._events.append(message)
            elif "error" in message:
                raise QmpError(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def event(self, name: str, data: dict[str, Any], timeout: float) -> dict[str, Any]:
        until = time.monotonic() + timeout
        seen = 0
        while True:
            for index, event in enumerate(self._events[seen:], seen):
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return self._events.pop(index)
            seen = len(self._events)
            message = self._read(until, f"no event {name} {data}")
            self._events.append(message)

    def close(self) -> None:
        self._socket.close()

    def _read(self, until: float, otherwise: str = "QEMU does not answer") -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, until - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise TimeoutError(otherwise) from None
            if not data:
                raise ConnectionError("QEMU is gone")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _in_image(image: Image, folder: Path, command: list[str]) -> list[str]:
    """The command run from the image's files, in mounts of its own that vanish with it."""
    script = ["sh", "-c", CHROOT, "sh", str(image.root), str(image.folder), str(folder)]
    return ["unshare", "--mount", "--propagation", "private", *script, *command]


def _dying_with_us(command: list[str]) -> list[str]:
    """The command, killed by the kernel when this process ends, however it ends."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


def _blockdev(node: str, name: str) -> dict[str, Any]:
    file = {"driver": "file", "filename": f"/srv/{name}.img", "locking": "off"}
    return {"driver": "raw", "node-name": node, "file": file}


def _make_disk(path: Path, megabytes: int = 64) -> None:
    """An empty disk of that size that takes no room until it is written to."""
    with path.open("ab") as disk:
        disk.truncate(megabytes << 20)
