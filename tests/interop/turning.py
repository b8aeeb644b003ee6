"""A provider whose part of the dialogue after the turn is scripted by the test."""

import queue
import time

from harness import PATIENCE, Failed, Server, Smtp, check, lets_in, serve_each, wait_until

SENDER = "lester@sender.example"


class Turning:
    """Listens, authenticates customers, and counts their calls.

    `mail`: there is mail, so ATRN turns the connection, which `line` returns; `away`: it closes each connection at once.
    """

    def __init__(self, box, *, mail=False, away=False):
        self.mail, self.away = mail, away
        self.times, self.lines, self.done = [], queue.Queue(), 0
        self.box = box
        self.socket, self.port = serve_each(box, self.session)

    def session(self, sock):
        self.times.append(time.monotonic())
        try:
            if not self.away and self.introduced(sock):
                return  # the test uses it
        except (OSError, Failed):
            pass
        sock.close()

    def introduced(self, sock):
        server = Server(sock)
        server.say("220 relay.example.net ODMR")
        while (line := server.until(b"\r\n")) is not None:
            verb = line[:4].upper()
            if lets_in(server, verb):
                pass
            elif verb == b"ATRN":
                self.done += 1
                server.say("250 2.0.0 turning, 1 message" if self.mail else "453 4.3.2 you have no mail")
                if self.mail:
                    self.lines.put(Line(self.box.keep(sock), server.received))
                    return True
            else:
                server.say("221 2.0.0 bye" if verb == b"QUIT" else "502 5.5.1 not implemented")
        return False

    def called(self, count, seconds=PATIENCE):
        wait_until(lambda: self.done >= count, f"call {count} at the provider", seconds=seconds)
        check(self.done == count, f"{self.done} calls, wanted {count}")

    def line(self):
        """The next turned connection, after the customer's greeting."""
        try:
            line = self.lines.get(timeout=PATIENCE)
        except queue.Empty:
            raise Failed(f"no call within {PATIENCE} s") from None
        line.hello()
        return line


class Line(Smtp):
    """A client on an existing connection."""

    def __init__(self, sock, received):
        sock.settimeout(20)
        self.socket, self.received = sock, bytearray(received)

    def knows(self, recipient):
        """Whether that recipient has a mailbox."""
        self.want("250", f"MAIL FROM:<{SENDER}>")
        reply = self.say(f"RCPT TO:<{recipient}>")
        self.want("250", "RSET")
        check(reply[:3] in ("250", "550"), f"{recipient}: {reply}")
        return reply.startswith("250")

    def leave(self):
        self.want("221", "QUIT")
        self.close()
