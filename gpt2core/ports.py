"""Ports that services listen on."""

from __future__ import annotations

import socket


def taken(host: str, port: int) -> str | None:
    """Why nothing can listen there, None when something can."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError:
            return "ports go from 0 to 65535"
    return None


def refuse_taken(host: str, port: int) -> None:
    """Raises ValueError when nothing can listen there."""
    if why := taken(host, port):
        other = port + 1 if 0 < port < 65535 else 6006
        raise ValueError(f"--port {port}: cannot listen on {host}:{port} ({why}); give another, such as --port {other}")


EVERYWHERE = ("0.0.0.0", "::")  # hosts to listen on at all addresses


def tunnel(port: int, host: str = "127.0.0.1") -> str:
    """The command that brings a port that is listened on here, on `host`, to another machine."""
    reached = "127.0.0.1" if host in EVERYWHERE else host
    return f"ssh -N -L {port}:{reached}:{port} {socket.gethostname()}"
