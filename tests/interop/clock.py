"""A clock that a scenario sets: libfaketime changes the time of odmr's processes, but not their monotonic clock."""

import glob
import os

from harness import ODMR, Failed

HOUR = 3600
DAY = 24 * HOUR
YEAR = 365 * DAY


class Clock:
    """The time of the processes that are started with `environment`: the machine's time plus `offset` seconds."""

    def __init__(self, box):
        libraries = glob.glob("/usr/lib/*/faketime/libfaketime.so.1") + glob.glob("/usr/lib/faketime/libfaketime.so.1")
        if not libraries:
            raise Failed("needs libfaketime: see .ci/run for the packages")
        self.box = box
        # In the directory of the configuration, which Landlock permits a daemon to read.
        self.file = box.path / "clock"
        self.environment = os.environ | {
            "LD_PRELOAD": libraries[0],
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        self.set(0)

    def set(self, offset):
        self.offset = offset
        new = self.box.write("clock.new", f"{offset:+d}\n")
        os.replace(new, self.file)

    def run(self, *words, **options):
        """Runs odmr at this time until it ends."""
        return self.box.run(ODMR, *words, env=self.environment, **options)
