"""A shell on the lab's host: python3 -m tests.lab.shell"""

from __future__ import annotations

import sys

from tests.lab.install import install
from tests.lab.machine import CommandFailed, Host


def main() -> int:
    print("Booting the host; the first time its image is built before, which takes some minutes.", flush=True)
    with Host() as host:
        print("Installing hostpassd in it.", flush=True)
        try:
            print(install(host), end="")
        except CommandFailed as failure:
            print(failure, file=sys.stderr)
        print(f"This is the host. 'exit' or Ctrl-D leaves it, and all that was done in it is gone.\n{host.access()}")
        return host.shell()


if __name__ == "__main__":
    sys.exit(main())
