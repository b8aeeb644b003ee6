"""The moments at which a program under test changes its files: strace kills it there, or makes that call fail.

strace counts the calls of a name in each thread (`when=`), so a rehearsal finds the numbers of the calls on the files
of interest.
SIGKILL comes before the call is done. Attached to a running program, strace counts from then on.
"""

import collections
import pathlib
import re
import signal

from harness import check, end, wait_until

CALLS = ["openat", "write", "pwrite64", "fsync", "fdatasync", "ftruncate", "fallocate", "utimensat", "mkdir", "mkdirat"]
CALLS += ["rename", "renameat", "renameat2", "link", "linkat", "unlink", "unlinkat"]
# Calls on an open file may fail with other errors than calls that need a new block or inode.
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS")

Moment = collections.namedtuple("Moment", "call number rest")


def strace(output, inject=None, *, follow=True):
    """The words of a command line, before `-p` or a command. `inject`: CALL:ACTION:when=NUMBER; `follow`: new threads too."""
    # -e signal: no signal is printed. A `?` names a call that not every processor has.
    words = ["strace", *["-f"] * follow, "-y", "-s", "0", "-e", "signal=none", "-o", output]
    words += ["-e", "trace=" + ",".join(f"?{call}" for call in CALLS)]
    return words + (["-e", f"inject={inject}"] if inject else [])


class Tracer:
    """strace on a running program, until it is closed or the program has ended. `follow`: also on new threads."""

    def __init__(self, box, pid, inject=None, *, follow=True):
        self.box = box
        self.output = box.path / "strace.output"
        self.output.unlink(missing_ok=True)
        tasks = list(pathlib.Path(f"/proc/{pid}/task").iterdir())
        attach = [word for task in tasks for word in ("-p", task.name)][: 2 if follow else None]
        self.process = box.start("strace.log", *strace(self.output, inject, follow=follow), *attach)
        wait_until(lambda: self.tracers(tasks) <= {self.process.pid}, "strace to attach", pause=0.002)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        end(self.process, signal.SIGINT)
        self.process.wait(10)
        self.box.children.remove(self.process)

    def tracers(self, tasks):
        """The tracers of these threads, except threads that have ended."""
        check(self.process.poll() is None, f"strace ended: {self.box.log('strace.log')[-500:]}")
        found = set()
        for task in tasks:
            try:
                found.add(int(re.search(r"TracerPid:\t(\d+)", (task / "status").read_text()).group(1)))
            except OSError:
                pass
        return found


def calls(output):
    """Each call that strace has written to that file: a Moment with its number in its thread, and the rest of its line.

    If another thread is reported in between, the line is in two parts.
    """
    counts, found, unfinished = collections.Counter(), [], {}
    for line in output.read_text(errors="backslashreplace").splitlines():
        if match := re.match(r"(\d+) +(\w+)\((.*)", line):
            thread, call, rest = match.groups()
            counts[thread, call] += 1
            unfinished[thread] = len(found)
            found.append(Moment(call, counts[thread, call], rest.removesuffix(" <unfinished ...>")))
        elif (match := re.match(r"(\d+) +<\.\.\. \w+ resumed>(.*)", line)) and match[1] in unfinished:
            moment = found[unfinished[match[1]]]
            found[unfinished[match[1]]] = moment._replace(rest=moment.rest + match[2])
    return found


def changes(moment, directories):
    """Whether that call changes a file below those directories; locks and files without mail do not count."""
    paths = re.findall(r'["<](/[^">]*)', moment.rest)
    below = [path for path in paths if any(path.startswith(f"{directory}/") for directory in directories)]
    if not below or any(re.search(r"/odmr\.|/\.odmr(/|$)", path) for path in below):
        return False
    return moment.call != "openat" or bool(re.search(r"O_CREAT|O_WRONLY|O_RDWR", moment.rest))


def moments(output, *directories):
    """The calls that change a file below those directories; each call and number once.

    A call that failed in the rehearsal, such as mkdir(2) of an existing directory, changes nothing.
    """
    found = {}
    for moment in calls(output):
        if changes(moment, directories) and " = -1 E" not in moment.rest:
            found.setdefault(moment[:2], moment)
    return list(found.values())


def injected(output):
    """The calls that strace made fail: the one with that number in each thread."""
    return [moment for moment in calls(output) if "(INJECTED)" in moment.rest]
