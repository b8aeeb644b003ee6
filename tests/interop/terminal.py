"""Text for a user at a terminal: the width of lines and the colours there; other output is unchanged."""

import fcntl
import os
import re
import struct
import termios

from daemon import Screen
from harness import ODMR, check, scenario, wait_until
from mistakes import Place

COLOUR = re.compile(r"\x1b\[[\d;]*m")
# Text that a user may copy is not divided.
COPIED = re.compile(r"`[^`]*`|[\w-]+ = \S+")
WIDTH = 60
HELP = [["help"], ["help", "send"], ["queue", "-h"], ["help", "exit-codes"], []]


def at_terminal(place, *words, **environment):
    """Runs odmr on a terminal of 60 columns. Returns the lines of its output and errors."""
    screen = Screen(place.box)
    fcntl.ioctl(screen.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, WIDTH, 0, 0))
    settings = {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), screen.slave)
    place.box.start("terminal.log", ODMR, *words, cwd=place.box.path, env=settings, **streams).wait(20)
    os.write(screen.slave, b"<end>")
    wait_until(lambda: "<end>" in screen.text, "the output")
    os.close(screen.slave)
    return screen.text.removesuffix("<end>").replace("\r\n", "\n").splitlines()


@scenario("terminal", needs=["openssl"])
def terminal(box):
    """On a terminal lines are divided between words, and warnings and errors have a colour, unless NO_COLOR or TERM=dumb is set"""
    place = Place(box)
    # Without a certificate, whose remaining days may change at any second.
    place.provider("-tls", "odmr.require-tls = false", 'spol = "x"', 'colour = "blue"')()
    checked = ("check", "-c", "provider.toml")
    lines = at_terminal(place, *checked)
    text = "\n".join(lines)
    check("\x1b[1;33mwarning:\x1b[0m provider.toml:" in text, f"no yellow warning: {lines}")
    for line, key in ((4, "spol"), (5, "colour")):
        check(f"\x1b[1;31modmr:\x1b[0m provider.toml:{line}: unknown key `{key}`" in text, f"no red error: {lines}")
    plain = [COLOUR.sub("", line) for line in lines]
    long = [line for line in plain if len(line) > WIDTH and " " in COPIED.sub("", line).strip()]
    check(not long, f"longer than {WIDTH}: {long}")
    for setting in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        check(at_terminal(place, *checked, **setting) == plain, f"other lines with {setting}")
    piped = place.odmr("check -c provider.toml")[1]
    check(not COLOUR.search(piped) and max(map(len, piped.splitlines())) > 2 * WIDTH, f"not as it is: {piped}")
    check(" ".join(plain).replace(f"{box.path}/", "").split() == piped.split(), f"other words on a terminal: {plain}")
    for words in HELP:
        long = [line for line in at_terminal(place, *words) if len(COLOUR.sub("", line)) > WIDTH]
        check(not long, f"{words}: longer than {WIDTH}: {long}")
    # Output for programs is never divided.
    place.provider('relay.tls-for = { "one.example" = "verify", "two.example" = "must", "three.example" = "may" }')()
    as_it_is = box.run(ODMR, *checked, "--print", cwd=box.path).stdout.splitlines()
    check(at_terminal(place, *checked, "--print") == as_it_is, "--print is not as elsewhere")
    closed = box.run("sh", "-c", f"{ODMR} help | head -n 1; {ODMR} help >&-; echo $?")
    check(closed.stdout.splitlines()[1:] == ["0"] and not closed.stderr, f"a closed output: {closed}")
    return f"{len(plain)} lines of {WIDTH} columns for {len(piped.splitlines())} of the check"
