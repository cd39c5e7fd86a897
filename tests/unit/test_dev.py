"""./dev, as far as it can be seen without installing anything on this machine."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


def dev(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ./dev and returns what came of it."""
    return subprocess.run(
        [REPOSITORY / "dev", *words],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def stub(folder: Path, name: str, body: str) -> None:
    """Puts a program of that name into FOLDER."""
    program = folder / name
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["lint", "x"], ["check", "-x"], ["install", "--prefix"]])
def test_a_wrong_word_is_one_sentence_and_exit_2(words: list[str]) -> None:
    done = dev(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dev: ")
    assert done.stderr.count("\n") == 1


def test_help_names_every_word() -> None:
    done = dev("help")
    assert done.returncode == 0
    words = re.search(r"^WORDS='(.*) or (.*)'$", (REPOSITORY / "dev").read_text(), re.MULTILINE)
    assert words
    for word in (*words[1].split(", "), words[2]):
        assert f"\n./dev {word} " in done.stdout


def test_what_is_installed_is_taken_off_again_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "etc/hostpassd/hostpassd.toml"
    kept.parent.mkdir(parents=True)
    kept.write_text("")

    assert dev("install", DESTDIR=str(tmp_path)).returncode == 0
    package = tmp_path / "usr/lib/python3/dist-packages/hostpassd"
    assert {file.relative_to(package) for file in package.rglob("*.*")} == {
        file.relative_to(REPOSITORY / "hostpassd") for file in (REPOSITORY / "hostpassd").rglob("*.py")
    }
    manifest = tmp_path / "usr/share/hostpassd/manifest"
    files = {str(file) for file in tmp_path.rglob("*") if file.is_file()} - {str(manifest), str(kept)}
    assert files == {f"{tmp_path}{target}" for target in manifest.read_text().splitlines()}
    assert all(Path(file).stat().st_mode & 0o777 == 0o644 for file in files)
    assert f"{tmp_path}/usr/share/dbus-1/interfaces/org.hostpassd1.xml" in files

    assert dev("uninstall", DESTDIR=str(tmp_path)).returncode == 0
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [kept]


def test_installing_again_leaves_no_file_of_the_older_one(tmp_path: Path) -> None:
    dev("install", DESTDIR=str(tmp_path))
    old = tmp_path / "usr/lib/python3/dist-packages/hostpassd/gone.py"
    old.write_text("")
    assert dev("install", DESTDIR=str(tmp_path)).returncode == 0
    assert not old.exists()


def test_uninstalling_what_is_not_there_says_so(tmp_path: Path) -> None:
    done = dev("uninstall", DESTDIR=str(tmp_path))
    assert done.returncode == 1
    assert "not installed" in done.stderr


def missing_package(tmp_path: Path, *, uid: int, update: int = 0, install: int = 0) -> subprocess.CompletedProcess[str]:
    """What './dev run' does where one package is missing and apt-get's commands end with those statuses."""
    stub(tmp_path, "dpkg-query", '[ "$4" = python3-pyudev ] || echo installed')
    stub(tmp_path, "id", f"echo {uid}")
    status = f"[ $1 = update ] && exit {update}; exit {install}"
    stub(tmp_path, "apt-get", f'echo "$@" >>{tmp_path}/apt-calls; echo said by apt; {status}')
    return dev("run", PATH=f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a policy for new services is laid down meanwhile")
@pytest.mark.parametrize(("update", "could"), [(0, "not"), (100, "neither read the package lists afresh nor")])
def test_only_what_is_missing_is_asked_of_apt_and_its_failure_is_told(tmp_path: Path, update: int, could: str) -> None:
    done = missing_package(tmp_path, uid=0, update=update, install=100)
    assert done.returncode == 1
    calls = (tmp_path / "apt-calls").read_text().splitlines()
    assert calls[0] == "update --error-on=any"
    assert len(calls) == 2
    assert calls[1].endswith("install -y --no-install-recommends python3-pyudev")
    assert done.stderr.count("said by apt") == 1 + bool(update)
    assert done.stderr.splitlines()[-1].startswith(f"dev: apt-get could {could} install python3-pyudev (")


def test_who_is_not_root_is_told_what_to_install(tmp_path: Path) -> None:
    done = missing_package(tmp_path, uid=1000)
    assert done.returncode == 1
    assert done.stderr.endswith("apt-get install --no-install-recommends python3-pyudev\n")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "apt-calls").exists()


@pytest.mark.parametrize("word", ["check", "cover", "soak", "test"])
def test_who_is_not_root_is_told_that_the_tests_take_it(tmp_path: Path, word: str) -> None:
    stub(tmp_path, "id", "echo 1000")
    done = dev(word, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith(f"dev: '{word}' starts programs of several users, which takes root;")


def test_another_system_than_debian_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = dev("run", PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dev: This is not a Debian system")
    assert done.stderr.count("\n") == 1


def covered(tmp_path: Path, failing: str, figures: str) -> int:
    """How './dev cover' ends where coverage's command FAILING fails, if any, and these are the FIGURES."""
    stub(tmp_path, "dpkg-query", "echo installed")
    stub(tmp_path, "id", "echo 0")
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    (tmp_path / f"cache/dbus-broker-{codename}").mkdir(parents=True)
    tools = re.search("^TOOLS='(.*)'$", (REPOSITORY / "dev").read_text(), re.MULTILINE)
    assert tools
    number = subprocess.run(["cksum"], input=f"{tools[1]}\n", capture_output=True, text=True, check=True).stdout.split()
    version = ".".join(map(str, sys.version_info[:2]))
    programs = tmp_path / f"cache/venv-{version}-{number[0]}/bin"
    programs.mkdir(parents=True)
    (programs.parent / "whole").touch()
    write = f"[ $1 != json ] || [ -z '{figures}' ] || echo '{figures}' >$4"
    stub(programs, "coverage", f"{write}\n[ $1 != '{failing}' ]")
    path = f"{tmp_path}:{os.environ['PATH']}"
    return dev("cover", PATH=path, HOSTPASSD_CACHE=str(tmp_path / "cache")).returncode


@pytest.mark.parametrize(
    ("failing", "figures", "status"),
    [("", '{"files": {}}', 0), ("", "", 1), *((step, '{"files": {}}', 1) for step in ("run", "combine", "json"))],
)
def test_cover_fails_where_a_test_does_or_there_is_no_figure(
    tmp_path: Path, failing: str, figures: str, status: int
) -> None:
    assert covered(tmp_path, failing, figures) == status
