"""Arguments, logging, asyncio.run."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import logging
import os
import sys
from pathlib import Path

from hostpassd import bus

bus.leave_out_glib()

from hostpassd import __version__, config, errors  # noqa: E402
from hostpassd.base import capabilities  # noqa: E402
from hostpassd.base.logs import Lines  # noqa: E402
from hostpassd.bus.router import NameTaken  # noqa: E402
from hostpassd.daemon import Daemon  # noqa: E402
from hostpassd.ends import Ends  # noqa: E402
from hostpassd.host.udev import Armed, arm  # noqa: E402

log = logging.getLogger("hostpassd")


def main() -> int:
    """Runs the daemon; the exit status."""
    arguments = _arguments()
    try:
        armed = arm()
    except OSError as error:
        log.error("uevents cannot be listened to: %s", error)
        return 1
    _give_up_capabilities()
    logging.basicConfig(level=arguments.log_level.upper(), handlers=[Lines()])
    try:
        settings = config.load(arguments.config)
    except config.ConfigError as error:
        log.error("%s", error)
        return 78  # EX_CONFIG
    if arguments.uri:
        settings = dataclasses.replace(settings, hypervisors=tuple(arguments.uri))
    folder = arguments.state_folder
    try:
        asyncio.run(_run(settings, folder, arguments.bus_address, armed))
    except (OSError, NameTaken, errors.HostpassError) as error:
        log.error("%s", error)
        return 1
    return 0


async def _run(settings: config.Config, folder: Path, bus_address: str | None, armed: Armed) -> None:
    await Daemon(settings, Ends.real(settings, folder, bus_address, armed)).run()


def _give_up_capabilities() -> None:
    """Nothing that follows needs any. Before the first thread is started: each has its own."""
    try:
        capabilities.give_up_all()
    except OSError as error:
        log.warning("the capabilities that hostpassd was started with cannot be given up: %s", error)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hostpassd", description="Which devices this host has, and which machine holds which."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH, help="configuration file (%(default)s)")
    parser.add_argument(
        "--state-folder", type=Path, default=_state_folder(), help="where the intent log is kept (%(default)s)"
    )
    parser.add_argument("--bus-address", help="D-Bus address (default: the system bus)")
    parser.add_argument("--uri", action="append", help="hypervisor, instead of the configuration's; can be repeated")
    parser.add_argument("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    return parser.parse_args()


def _state_folder() -> Path:
    """systemd's StateDirectory=, or the place that it stands for."""
    return Path(os.environ.get("STATE_DIRECTORY", "/var/lib/hostpassd").split(":")[0])


if __name__ == "__main__":
    sys.exit(main())
