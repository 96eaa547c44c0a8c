"""The web service: captions equal those of the API, limits hold, hostile requests get clear errors."""

import base64
import io
import json
import socket
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from imgcap_jax.captioner import Captioner
from imgcap_jax.data.sources import open_source


@pytest.fixture(scope="module")
def photos(tiny_data: Path) -> list[bytes]:
    return [example.image for example in open_source("scenes", "test", tiny_data)]


def caption(service: Any, photo: bytes, style: str = "best") -> dict[str, Any]:
    status, _, body = service.ask("POST", f"/api/caption?style={style}", photo)
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def refusal(service: Any, photo: Any, headers: dict[str, str] | None = None) -> tuple[int, str]:
    status, _, body = service.ask("POST", "/api/caption", photo, headers)
    return status, json.loads(body)["detail"]


def test_answers_are_the_captions_of_the_api(service: Any, captioner: Captioner, photos: list[bytes]) -> None:
    for photo, expected in zip(photos[:3], captioner(photos[:3]), strict=True):
        found = caption(service, photo)
        assert found["caption"] == expected.text
        assert found["words"] == list(expected.words)
        np.testing.assert_allclose(found["log_probs"], expected.log_probs, atol=1e-4)
        assert found["caption"] not in [one["caption"] for one in found["alternatives"]]
        side = found["attention"]["side"]
        maps = np.frombuffer(base64.b64decode(found["attention"]["maps"]), np.uint8).reshape(-1, side * side)
        assert expected.attention is not None
        relative = expected.attention / expected.attention.max(axis=-1, keepdims=True)
        np.testing.assert_allclose(maps / 255, relative, atol=0.01)
    for style in ("fast", "varied", "samples"):
        ends = time.monotonic() + 120
        while service.ask("POST", f"/api/caption?style={style}", photos[0])[0] == 503:  # it is being compiled
            assert time.monotonic() < ends
            time.sleep(0.2)
        assert caption(service, photos[0], style)["caption"]


def test_concurrent_requests_share_batches_and_each_gets_its_own_captions(
    service: Any, captioner: Captioner, photos: list[bytes]
) -> None:
    expected = [one.text for one in captioner(photos)]
    assert len(set(expected)) > 1
    order = [number % len(photos) for number in range(60)]
    with ThreadPoolExecutor(60) as pool:
        found = list(pool.map(lambda number: caption(service, photos[number])["caption"], order))
    assert found == [expected[number] for number in order]


def test_page_schema_health_and_metrics(service: Any, photos: list[bytes]) -> None:
    status, headers, body = service.ask("GET", "/")
    assert status == 200
    assert b"Drop or paste photos" in body
    assert "script-src 'self'" in headers["content-security-policy"]
    for name in ("app.js", "app.css"):
        assert service.ask("GET", f"/{name}")[0] == 200
    schema = json.loads(service.ask("GET", "/openapi.json")[2])
    endpoint = schema["paths"]["/api/caption"]["post"]
    assert "image/*" in endpoint["requestBody"]["content"]
    assert {"200", "413", "415", "503", "504"} <= set(endpoint["responses"])
    assert service.ask("GET", "/healthz")[0] == 200

    def count() -> float:
        lines = service.ask("GET", "/metrics")[2].decode().splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith('imgcap_requests_total{status="200"}'))

    before = count()
    caption(service, photos[0])
    assert count() == before + 1


def test_pages_of_other_sites_and_other_host_names_are_refused(service: Any, photos: list[bytes]) -> None:
    status, detail = refusal(service, photos[0], {"Origin": "https://example.org"})
    assert (status, detail) == (403, "the request comes from a page of another site")
    assert service.ask("POST", "/api/caption", photos[0], {"Host": "evil.example"})[0] == 400
    own = {"Origin": f"http://127.0.0.1:{service.port}"}
    assert service.ask("POST", "/api/caption", photos[0], own)[0] == 200


def bomb(side: int) -> bytes:
    """A PNG of side x side white pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + side // 8) * 64) for _ in range(side // 64)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_hostile_uploads_get_clear_errors(service: Any, photos: list[bytes]) -> None:
    assert refusal(service, b"") == (400, "the body is empty; send the file of a photo")
    assert refusal(service, b"no photo")[0] == 415
    assert refusal(service, photos[0][: len(photos[0]) // 2])[0] == 415
    status, detail = refusal(service, bomb(64_000))
    assert status == 415
    assert "64000 x 64000 pixels" in detail
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "ICO")
    assert "unknown image format" in refusal(service, picture.getvalue())[1]
    assert service.ask("POST", "/api/caption?style=none", photos[0])[0] == 422
    assert service.ask("GET", "/../setup.cfg")[0] == 404
    assert caption(service, photos[0])["caption"]


def test_too_large_files_are_refused_before_they_are_read(serve: Callable[..., Any], photos: list[bytes]) -> None:
    with serve(megabytes=0.1) as service:
        status, detail = refusal(service, bytes(200_000))
        assert status == 413
        assert "more than 0.1 MB" in detail
        # Without a length, what has arrived counts.
        chunks = iter([bytes(60_000)] * 50)
        status, detail = refusal(service, chunks, {"Transfer-Encoding": "chunked"})
        assert status == 413
        assert caption(service, photos[0])["caption"]


def test_slow_clients_do_not_keep_others_waiting(serve: Callable[..., Any], photos: list[bytes]) -> None:
    with serve(seconds=5.0) as service:
        slow = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(20)]
        for one in slow:
            one.sendall(b"POST /api/caption HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx")
        assert caption(service, photos[0])["caption"]
        for one in slow:
            one.settimeout(20)
            assert b"408" in one.recv(1000)
            one.close()


def test_a_full_queue_says_when_to_try_again(serve: Callable[..., Any], photos: list[bytes]) -> None:
    with serve(waiting=2) as service, ThreadPoolExecutor(80) as pool:
        found = list(pool.map(lambda _: service.ask("POST", "/api/caption", photos[0])[:2], range(160)))
        statuses = [status for status, _ in found]
        assert set(statuses) == {200, 503}
        assert all(headers["retry-after"] == "2" for status, headers in found if status == 503)
        assert caption(service, photos[0])["caption"]


def test_many_uploads_together_do_not_fill_the_memory(serve: Callable[..., Any], photos: list[bytes]) -> None:
    """40 clients send 8 MB each, slowly, and the service holds at most 16 MB of files."""
    with serve(megabytes=10, total_megabytes=16, seconds=20.0) as service:
        before = psutil.Process().memory_info().rss
        answers: list[int] = []

        def send() -> None:
            def parts() -> Any:
                for _ in range(8):
                    yield bytes(1_000_000)
                    time.sleep(0.05)

            try:
                answers.append(refusal(service, parts(), {"Transfer-Encoding": "chunked"})[0])
            except (BrokenPipeError, ConnectionResetError):  # refused before all was sent
                answers.append(503)

        threads = [threading.Thread(target=send) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(answers) <= {415, 503}
        assert 503 in answers
        assert psutil.Process().memory_info().rss - before < 300e6
        assert caption(service, photos[0])["caption"]
        metrics = service.ask("GET", "/metrics")[2].decode()
        assert "imgcap_upload_bytes 0.0" in metrics


def test_nothing_is_written_to_disk(service: Any, photos: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a temporary file")

    for name in ("mkstemp", "TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile"):
        monkeypatch.setattr(tempfile, name, refuse)
    large = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    Image.fromarray(noise).save(large, "PNG")
    assert len(large.getvalue()) > 4e6
    assert caption(service, large.getvalue())["caption"]
    assert refusal(service, large.getvalue()[:3_000_000])[0] == 415


def test_samples_of_the_same_photo_differ(service: Any, photos: list[bytes]) -> None:
    found = [caption(service, photos[0], "samples") for _ in range(4)]
    assert len({str([one["caption"], one["alternatives"]]) for one in found}) > 1


def test_photos_that_are_decoded_count_as_waiting(serve: Callable[..., Any], photos: list[bytes]) -> None:
    """Large pictures take long to decode; others then hear at once that the service is busy."""
    large = io.BytesIO()
    Image.new("RGB", (6000, 5000)).save(large, "PNG")
    with serve(waiting=4) as service, ThreadPoolExecutor(24) as pool:
        sent = [pool.submit(service.ask, "POST", "/api/caption", large.getvalue()) for _ in range(24)]
        statuses = [one.result()[0] for one in sent]
        assert set(statuses) == {200, 503}
        assert caption(service, photos[0])["caption"]
