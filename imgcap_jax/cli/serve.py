"""``imgcap serve``: a local web page and a JSON endpoint."""

import argparse
import ipaddress
import socket
from typing import Any

from imgcap_jax.errors import UserError, check_range

_CONNECTIONS = 512


def check(options: argparse.Namespace) -> None:
    """Raises UserError for options out of range, or if the libraries are not installed."""
    for name in ("max_megabytes", "seconds"):
        check_range(f"--{name.replace('_', '-')}", getattr(options, name), above=0)
    check_range("--waiting", options.waiting, at_least=1)
    check_range("--port", options.port, at_least=0, at_most=65535)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"imgcap serve needs {error.name}; run: pip install fastapi uvicorn prometheus-client"
        ) from error


def serve(captioner: Any, options: argparse.Namespace) -> int:
    """Serves until Ctrl-C.

    Raises:
        UserError: the address can't be used.
    """
    import uvicorn

    from imgcap_jax.web.app import Limits, create_app

    listening = _listen(options.host, options.port)
    host, port = listening.getsockname()[:2]
    total = max(Limits.total_megabytes, 4 * options.max_megabytes)
    limits = Limits(options.max_megabytes, total, waiting=options.waiting, seconds=options.seconds)
    local = _is_loopback(options.host)
    own = ["localhost", "127.0.0.1", "[::1]", host] if local else []
    names = [*own, *options.allowed_host] or None
    app = create_app(captioner, limits, names)
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{port}  (Ctrl-C ends it; the first photo waits until the model is compiled)", flush=True)
    if not local:
        print("imgcap: note: everybody who reaches this address can use it", flush=True)
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=_CONNECTIONS, timeout_keep_alive=5, timeout_graceful_shutdown=10
    )
    uvicorn.Server(config).run([listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_CONNECTIONS)
    except OSError as error:
        raise UserError(f"{host}:{port} can't be used ({error.strerror or error}); choose another --port") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
