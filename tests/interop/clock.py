"""A clock that a scenario sets: libfaketime for the processes of odmr, their monotonic clock apart."""

import glob
import os

from harness import ODMR, Failed

HOUR = 3600
DAY = 24 * HOUR
YEAR = 365 * DAY


class Clock:
    """The time of the processes that are started with `environment`; it is that of the machine and `offset` seconds."""

    def __init__(self, box):
        libraries = glob.glob("/usr/lib/*/faketime/libfaketime.so.1") + glob.glob("/usr/lib/faketime/libfaketime.so.1")
        if not libraries:
            raise Failed("needs libfaketime: see .ci/run for the packages")
        self.box = box
        # Beside the configuration: Landlock lets a daemon read there.
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
        """Runs odmr at this time, to its end."""
        return self.box.run(ODMR, *words, env=self.environment, **options)
