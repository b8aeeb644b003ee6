"""The next hop of a hand-over: a local mail server over LMTP or SMTP with scripted replies.

As a separate program it stores each message durably before it replies, and can kill itself within a content:

    hop.py SOCKET DIRECTORY [DIE]      DIE: it kills itself in the content after the one that made so many files in DIRECTORY
"""

import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time

from harness import LOOPBACK, Failed, Server, angle, check, connections, hang_up, wait_until

DROP = 512  # octets of a content that it reads before it kills itself


class Session(Server):
    """One connection to the hop: LHLO or EHLO, PIPELINING, and replies to each recipient."""

    def __init__(self, sock, hop):
        super().__init__(sock, keywords=hop.keywords)
        self.hop = hop

    def more(self):
        return self.socket.recv(262144)  # no option of TCP on a unix socket

    def serve(self):
        hop = self.hop
        self.say(f"220 hop.example {'LMTP' if hop.lmtp else 'ESMTP'}")
        sender, recipients = None, []
        while (line := self.until(b"\r\n")) is not None:
            verb = line[:4].upper().decode("ascii", "replace")
            hop.lines.append(line.decode("utf-8", "replace"))
            if verb == ("LHLO" if hop.lmtp else "EHLO"):
                lines = ["hop.example", *self.keywords]
                self.say(*(f"250-{text}" for text in lines[:-1]), f"250 {lines[-1]}")
            elif verb == "MAIL":
                sender, recipients = angle(line), []
                self.say("250 2.1.0 ok")
            elif verb == "RCPT":
                recipient = angle(line)
                reply = hop.next(hop.at_recipient, recipient) or "250 2.1.5 ok"
                recipients += [recipient] * reply.startswith("250")
                self.say(reply)
            elif verb == "DATA":
                if not recipients:
                    self.say("554 5.5.1 no valid recipients")
                    continue
                self.say("354 go ahead")
                hop.content_begins(self)
                replies = {one: hop.next(hop.after_content, one) or "250 2.0.0 taken" for one in recipients}
                content = self.data()
                taken = [one for one in recipients if replies[one].startswith("250")]
                if hop.lmtp or len(taken) == len(recipients):
                    hop.take(sender, taken, content)
                # RFC 2033 section 4.2: LMTP replies once for each recipient.
                self.say(*(replies[one] for one in recipients[: None if hop.lmtp else 1]))
                recipients = []
            elif verb in ("RSET", "NOOP"):
                self.say("250 2.0.0 ok")
            elif verb == "QUIT":
                return self.say("221 2.0.0 bye")
            else:
                self.say("500 5.5.1 no such command")


class Hop:
    """`path`: of a unix socket; without it a port of loopback. `at_recipient` and `after_content`: recipient -> its
    next replies; after
    them, and for None: accepted. `messages`: (sender, recipient, content), one for each recipient."""

    speaks = Session

    def __init__(self, path=None, *, port=0, lmtp=True, at_recipient=None, after_content=None, size=100_000_000):
        self.lmtp, self.path = lmtp, path
        self.keywords = ("PIPELINING", "8BITMIME", "ENHANCEDSTATUSCODES", f"SIZE {size}")
        self.at_recipient, self.after_content = at_recipient or {}, after_content or {}
        self.messages, self.lines, self.errors = [], [], []
        self.lock = threading.Lock()
        if path:
            pathlib.Path(path).unlink(missing_ok=True)
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(str(path))
            os.chmod(path, 0o666)
            self.socket.listen()
        else:
            self.socket = socket.create_server((LOOPBACK, port))
            self.port = self.socket.getsockname()[1]

    def start(self, box):
        box.keep(self.socket)
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def close(self):
        hang_up(self.socket)

    @property
    def address(self):
        """The address in the form of `deliver`."""
        return f"{'lmtp' if self.lmtp else 'smtp'}:{self.path or f'{LOOPBACK}:{self.port}'}"

    def next(self, replies, recipient):
        with self.lock:
            waiting = replies.get(recipient)
            return waiting.pop(0) if waiting else None

    def content_begins(self, session):
        pass

    def take(self, sender, recipients, content):
        with self.lock:
            self.messages += [(sender, one, content) for one in recipients]

    def count(self, recipient):
        with self.lock:
            return sum(message[1] == recipient for message in self.messages)

    def accept(self):
        for sock in connections(self.socket):
            threading.Thread(target=self.session, args=(sock,), daemon=True).start()

    def session(self, sock):
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with sock:
            try:
                self.speaks(sock, self).serve()
            except (OSError, Failed, AssertionError) as error:
                self.errors.append(str(error))


class DurableHop(Hop):
    """Stores each message in a file before it replies."""

    def __init__(self, path, directory, die):
        super().__init__(path)
        self.directory, self.die = pathlib.Path(directory), die

    def content_begins(self, session):
        if self.die is None or len(list(self.directory.glob("*.eml"))) < self.die:
            return
        while len(session.received) < DROP:
            some = session.socket.recv(DROP)
            check(some, "closed before any content")
            session.received += some
        os.kill(os.getpid(), signal.SIGKILL)

    def take(self, sender, recipients, content):
        with self.lock:
            name = self.directory / f"{time.time_ns()}-{os.getpid()}"
            with open(name, "wb") as file:
                file.write(f"{sender} {' '.join(recipients)}\n".encode() + content)
                file.flush()
                os.fsync(file.fileno())
            name.rename(f"{name}.eml")
            directory = os.open(self.directory, os.O_RDONLY)
            os.fsync(directory)
            os.close(directory)


def start_hop(box, path, directory, die=None):
    """The hop as a separate process, ready for connections."""
    path.unlink(missing_ok=True)  # a killed process has left it
    child = box.start("hop.log", sys.executable, __file__, path, directory, *([] if die is None else [die]))
    wait_until(lambda: re.search(rf"(?m)^listening {child.pid}$", box.log("hop.log")), "the hop to listen")
    return child


def main(path, directory, die=None):
    hop = DurableHop(path, directory, None if die is None else int(die))
    print(f"listening {os.getpid()}", flush=True)
    hop.accept()


if __name__ == "__main__":
    main(*sys.argv[1:])
