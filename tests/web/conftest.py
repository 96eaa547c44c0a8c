"""A service of the tiny run, on a free port of this machine."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from imgcap_jax.captioner import Captioner

pytest.importorskip("fastapi", reason="the web page needs fastapi")
uvicorn = pytest.importorskip("uvicorn", reason="the web page needs uvicorn")
pytest.importorskip("prometheus_client", reason="the web page needs prometheus-client")


@dataclass
class Service:
    """A running service."""

    port: int

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 120
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, and body of the answer."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            chunked = "Transfer-Encoding" in (headers or {})
            connection.request(method, path, body, headers or {}, encode_chunked=chunked)
            response = connection.getresponse()
            return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
        finally:
            connection.close()


@contextmanager
def running(captioner: Captioner, **limits: Any) -> Iterator[Service]:
    """Runs a service until the end of the context."""
    from imgcap_jax.web.app import Limits, create_app

    config = uvicorn.Config(create_app(captioner, Limits(**limits), ["127.0.0.1"]), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ends = time.monotonic() + 120
    while not server.started:
        assert time.monotonic() < ends
        assert thread.is_alive()
        time.sleep(0.05)
    try:
        yield Service(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture(scope="session")
def captioner(trained: Path) -> Captioner:
    return Captioner.load(trained, attention=True)


@pytest.fixture(scope="session")
def service(captioner: Captioner) -> Iterator[Service]:
    with running(captioner) as found:
        yield found


@pytest.fixture
def serve(captioner: Captioner) -> Callable[..., Any]:
    """Runs a service with other limits."""
    return lambda **limits: running(captioner, **limits)
