"""The tree under test as others get it: what is committed and what is not yet, without what git ignores."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def packed() -> bytes:
    """The project's files as a tar archive."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=PROJECT, stdout=subprocess.PIPE, check=True
    ).stdout
    files = [name for name in listed.decode().split("\0") if name and (PROJECT / name).is_file()]
    return subprocess.run(
        ["tar", "-c", "--null", "-T", "-"],
        cwd=PROJECT,
        input="\0".join(files).encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout


def bundle(target: Path) -> None:
    """Writes a git bundle for others to clone: the files as they are now, as the one commit of a branch main."""
    git = ["git", "-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["tar", "-x"], cwd=folder, input=packed(), check=True)
        for words in (
            ["init", "--quiet", "--initial-branch=main"],
            ["add", "--all", "--force"],
            ["commit", "--quiet", "--message=The tree under test"],
            ["bundle", "create", "--quiet", str(target), "HEAD", "main"],
        ):
            subprocess.run([*git, *words], cwd=folder, check=True)
