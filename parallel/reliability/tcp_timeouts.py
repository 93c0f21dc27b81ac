"""Limits TCP connections, so that one to a lost host breaks within a minute, not a quarter hour.

When a cable is cut or a host loses power, nobody closes its connections. Linux retransmits for
about 15 minutes (``net.ipv4.tcp_retries2``), during which gloo, the job's store and the launcher
wait for an answer. So every TCP connection of the process gets a limit for unacknowledged data, and
keep-alive probes while idle. A stopped process loses no connection: its kernel still answers.

Launcher and ranks share one setting, the environment variable ``EARLYFUSE_LOST_HOST_SECONDS``.
Libraries offer no hook where they create sockets, so all open sockets are scanned. Imports only the
standard library: the launcher starts this before its long imports.
"""

import os
import socket
import stat
import threading
import time

SECONDS = "EARLYFUSE_LOST_HOST_SECONDS"
"""Environment variable: seconds that a connection waits for a silent host; 0: system default."""

DEFAULT = 60

_watching = False


def watch() -> None:
    """Limits every connection that this process has or opens, on Linux; safe to call again."""
    global _watching
    seconds = float(os.environ.get(SECONDS, DEFAULT))
    if seconds > 0 and hasattr(socket, "TCP_USER_TIMEOUT") and not _watching:
        _watching = True
        threading.Thread(target=_watch, args=(seconds,), name="lost hosts", daemon=True).start()


def _watch(seconds: float) -> None:
    while True:
        limit_all(seconds)
        time.sleep(seconds / 4)


def limit_all(seconds: float) -> int:
    """Limits all open TCP connections; returns their number."""
    limited = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            limited += _limit(int(name), seconds)
        except OSError:  # closed meanwhile, or not connected
            continue
    return limited


def _limit(descriptor: int, seconds: float) -> bool:
    if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
        return False
    with socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
            return False
        connection.getpeername()  # OSError unless it is connected
        quarter = max(int(seconds / 4), 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, quarter)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, quarter)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))
        return True
