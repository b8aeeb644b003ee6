"""Debian packages of which the scenarios need only the files: they are unpacked and not installed, because they conflict
with Postfix (Exim), start services, or have many dependencies (test data).

They stay in `interop-packages` of the target directory for the next run.
"""

import fcntl
import shutil

from harness import TARGET, check

STORE = TARGET / "interop-packages"


def unpacked(box, *packages):
    """Package -> the directory with its files. A package that apt does not have is left out."""
    STORE.mkdir(parents=True, exist_ok=True)
    with open(STORE / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [package for package in packages if not (STORE / package).exists()]
        if missing and not fetch(box, missing):
            box.run("apt-get", "update", "-q", seconds=100)
            for package in missing:
                fetch(box, [package])
    return {package: STORE / package for package in packages if (STORE / package).exists()}


def fetch(box, packages):
    """Downloads and unpacks them all. Returns whether that was possible."""
    place = box.path / "downloads"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    done = box.run("apt-get", "download", "-q", *packages, cwd=place, seconds=100)
    for file in place.glob("*.deb"):
        name = box.run("dpkg-deb", "--field", file, "Package").stdout.strip()
        if not (STORE / name).exists():
            draft = STORE / f".{name}"
            shutil.rmtree(draft, ignore_errors=True)
            unpacking = box.run("dpkg-deb", "--extract", file, draft)
            check(unpacking.returncode == 0, f"dpkg-deb {file.name}: {unpacking.stderr}")
            draft.rename(STORE / name)
    return done.returncode == 0
