"""The web application of ``imgcap serve``: a page, a JSON endpoint, health and metrics. Nothing is written to disk."""

import asyncio
import base64
import math
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import resources
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from imgcap_jax import __version__
from imgcap_jax.captioner import Caption, Captioner
from imgcap_jax.data.image_files import READS, ImageError
from imgcap_jax.decoding.settings import Decoding
from imgcap_jax.web.batches import Batches, BusyError

Style = Literal["best", "fast", "varied", "samples"]
STYLES: dict[str, str] = {
    "best": "the most likely caption",
    "fast": "greedy search",
    "varied": "captions that differ from each other",
    "samples": "captions drawn at random",
}
_ALTERNATIVES = 5
_DECODERS = 2  # photos that are decoded at a time: each needs up to 1 GB
_ASSETS = {"": ("index.html", "text/html"), "app.css": ("app.css", "text/css"), "app.js": ("app.js", "text/javascript")}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        megabytes: the size of a photo's file.
        total_megabytes: the size of all files in memory.
        waiting: photos that are in memory and have no captions yet.
        seconds: from the headers of a request to its answer; then 408 or 504.
    """

    megabytes: float = 20.0
    total_megabytes: float = 256.0
    waiting: int = 128
    seconds: float = 60.0


class Alternative(BaseModel):
    """Another caption of the same photo. score: what the search ranked, or the log-probability of a sample."""

    caption: str
    score: float
    confidence: float | None


class Attention(BaseModel):
    """Where the model looked. maps: base64 of bytes [words,side,side], relative to the largest one of each word.

    part: the part of the photo that the model sees: all of it, or the square in its centre.
    """

    side: int
    maps: str
    part: Literal["all", "centre"]


class Answer(BaseModel):
    """The captions of a photo. confidence: the probability that the caption is right; null: not known."""

    caption: str
    words: list[str]
    log_probs: list[float]
    confidence: float | None
    alternatives: list[Alternative]
    attention: Attention | None
    seconds: float


class Problem(BaseModel):
    """Why there is no caption."""

    detail: str


def captioners_of(captioner: Captioner) -> dict[str, Captioner]:
    """One captioner per style, with the same parameters."""
    own = captioner.decoding
    plain = own.plain(1)
    searches: dict[str, Decoding] = {
        "best": own if own.samples or own.rerank != "none" else replace(own, n_best=min(own.beam, _ALTERNATIVES)),
        "fast": plain,
        "varied": replace(plain, beam=2 * _ALTERNATIVES, groups=_ALTERNATIVES, n_best=_ALTERNATIVES),
        "samples": replace(plain, samples=_ALTERNATIVES, temperature=0.7),
    }
    return {style: captioner.with_decoding(decoding) for style, decoding in searches.items()}


def create_app(captioner: Captioner, limits: Limits | None = None, hosts: list[str] | None = None) -> FastAPI:
    """The application.

    Args:
        captioner: the model.
        limits: None: the default limits.
        hosts: the host names that requests may be for, against DNS rebinding; None: any.
    """
    return _Service(captioner, limits or Limits()).app(hosts)


class _Service:
    def __init__(self, captioner: Captioner, limits: Limits) -> None:
        self._captioners, self._limits = captioners_of(captioner), limits
        self._first = captioner
        self._bytes = 0  # of files in memory
        self._waiting = 0  # photos that are decoded or captioned
        self._closed = False
        self._compiled = {"best"}
        registry = self._registry = CollectorRegistry()
        self._requests = Counter("imgcap_requests", "Photos by the status of the answer", ["status"], registry=registry)
        self._seconds = Histogram(
            "imgcap_seconds",
            "Seconds from the request to its captions",
            buckets=(0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60),
            registry=registry,
        )
        waiting = Gauge("imgcap_waiting", "Photos that wait for their captions", registry=registry)
        waiting.set_function(lambda: self._waiting)
        held = Gauge("imgcap_upload_bytes", "Bytes of uploaded files in memory", registry=registry)
        held.set_function(lambda: self._bytes)

    def app(self, hosts: list[str] | None) -> FastAPI:
        app = FastAPI(
            title="imgcap",
            version=__version__,
            description="Captions of photos.",
            lifespan=self._lifespan,
            docs_url=None,  # their scripts come from other servers
            redoc_url=None,
        )
        if hosts is not None:
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

        @app.middleware("http")
        async def with_headers(request: Request, call_next: Any) -> Response:
            response: Response = await call_next(request)
            for name, value in _HEADERS.items():
                response.headers.setdefault(name, value)
            return response

        for name, (file, kind) in _ASSETS.items():
            app.get(f"/{name}", include_in_schema=False)(_asset(file, kind))
        app.get("/healthz", summary="That the service is ready")(self.health)
        app.get("/metrics", summary="Metrics in the format of Prometheus", response_class=Response)(self.metrics)
        app.get("/api/info", summary="The model, and what can be asked for")(self.info)
        wrong: dict[int | str, dict[str, Any]] = {
            code: {"model": Problem, "description": text}
            for code, text in {
                400: "The body is empty.",
                403: "The request comes from a page of another site.",
                408: "The body did not arrive in time.",
                413: "The file is too large.",
                415: "The photo can't be decoded.",
                503: "Too many photos are waiting; Retry-After says when to try again.",
                504: "The caption was not found in time.",
            }.items()
        }
        body = {
            "requestBody": {
                "required": True,
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
            }
        }
        app.post(
            "/api/caption",
            summary="Captions a photo: the body is its file",
            response_model=Answer,
            responses=wrong,
            openapi_extra=body,
        )(self.caption)
        return app

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self._pool = ThreadPoolExecutor(_DECODERS, "decoder")
        self._batches = Batches(self._captioners, self._limits.waiting)
        side = [run.experiment.data.image_size for run in self._first.runs]
        grey = [np.full((size, size, 3), 127, np.uint8) for size in side]

        def compile_search(style: str, counts: Sequence[int]) -> None:
            for count in counts:
                if not self._closed:
                    list(self._captioners[style].stream([grey] * count))
            self._compiled.add(style)

        def compile_others() -> None:
            for style in self._captioners:
                if style != "best":
                    compile_search(style, (1, 8))

        await run_in_threadpool(compile_search, "best", (1, 8, 32))
        compiling = threading.Thread(target=compile_others, daemon=True)
        compiling.start()
        try:
            yield
        finally:
            self._closed = True
            await run_in_threadpool(self._batches.close)
            self._pool.shutdown()
            await run_in_threadpool(compiling.join)

    async def health(self) -> dict[str, str]:
        """200: connections are accepted when the model is compiled."""
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """Requests by status, seconds, photos that wait."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def info(self) -> dict[str, Any]:
        """The model and its styles."""
        return {
            "model": self._first.names,
            "version": __version__,
            "styles": STYLES,
            "formats": READS,
            "megabytes": self._limits.megabytes,
        }

    async def caption(
        self, request: Request, style: Annotated[Style, Query(description=f"{STYLES}")] = "best"
    ) -> Answer:
        """The captions of the photo in the body of the request."""
        start, status = time.monotonic(), 500
        try:
            _check_origin(request.headers)
            answer = await self._answer(request, style, start)
            status = 200
            self._seconds.observe(answer.seconds)
            return answer
        except HTTPException as error:
            status = error.status_code
            raise
        except asyncio.CancelledError:
            status = 503  # the service ends
            raise
        finally:
            self._requests.labels(status).inc()

    async def _answer(self, request: Request, style: Style, start: float) -> Answer:
        if style not in self._compiled:
            raise HTTPException(503, f"the search {style!r} is being compiled; try again", {"Retry-After": "5"})
        size = 0
        try:
            try:
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + self._limits.seconds):
                    chunks: list[bytes] = []
                    async for chunk in request.stream():
                        size += len(chunk)
                        self._bytes += len(chunk)
                        self._check_size(request.headers, size)
                        chunks.append(chunk)
            except ClientDisconnect:
                raise HTTPException(499, "the client is gone") from None
            except TimeoutError:
                raise HTTPException(408, f"the photo did not arrive in {self._limits.seconds:g} seconds") from None
            if not size:
                raise HTTPException(400, "the body is empty; send the file of a photo")
            photo = b"".join(chunks)
            del chunks
            if self._waiting >= self._limits.waiting:
                raise _busy()
            left = self._limits.seconds - (time.monotonic() - start)
            self._waiting += 1
            try:
                async with asyncio.timeout(max(left, 0.001)):
                    captioner, loop = self._captioners[style], asyncio.get_running_loop()
                    pixels = await loop.run_in_executor(self._pool, captioner.pixels, photo)
                    del photo
                    captions = await self._batches.captions(style, pixels)
            except ImageError as error:
                raise HTTPException(415, f"{error}") from error
            except BusyError:
                raise _busy() from None
            except TimeoutError:
                raise HTTPException(504, f"no caption after {self._limits.seconds:g} seconds; try again") from None
            finally:
                self._waiting -= 1
        finally:
            self._bytes -= size
        best = captions[0]
        return Answer(
            caption=best.text,
            words=list(best.words),
            log_probs=list(best.log_probs),
            confidence=best.confidence,
            alternatives=[
                Alternative(caption=one.text, score=one.score, confidence=one.confidence)
                for one in _different(captions)
            ],
            attention=self._attention(best),
            seconds=time.monotonic() - start,
        )

    def _check_size(self, headers: Mapping[str, str], size: int) -> None:
        announced = headers.get("content-length", "")
        expected = max(size, int(announced) if announced.isdecimal() else 0)
        if expected > self._limits.megabytes * 1e6:
            most = f"{self._limits.megabytes:g} MB"
            raise HTTPException(413, f"the file has more than {most}, the largest size here; send a smaller photo")
        if self._bytes > self._limits.total_megabytes * 1e6:
            raise _busy()

    def _attention(self, caption: Caption) -> Attention | None:
        maps = caption.attention
        side = 0 if maps is None else math.isqrt(maps.shape[-1])
        if maps is None or side * side != maps.shape[-1]:
            return None
        relative = maps / np.maximum(maps.max(axis=-1, keepdims=True), 1e-12)
        levels = (255 * relative).round().astype(np.uint8)
        part: Literal["all", "centre"] = "centre" if self._first.runs[0].experiment.data.resize == "crop" else "all"
        return Attention(side=side, maps=base64.b64encode(levels.tobytes()).decode(), part=part)


def _different(captions: list[Caption]) -> list[Caption]:
    """All captions after the first, each text once."""
    found = {caption.text: caption for caption in reversed(captions)}
    found.pop(captions[0].text)
    return list(reversed(found.values()))


def _busy() -> HTTPException:
    return HTTPException(503, "too many photos are waiting; try again", {"Retry-After": "2"})


def _check_origin(headers: Mapping[str, str]) -> None:
    """Pages of other sites may not use the service of a visitor's machine."""
    origin = headers.get("origin")
    if origin and urlsplit(origin).netloc != headers.get("host"):
        raise HTTPException(403, "the request comes from a page of another site")


def _asset(file: str, kind: str) -> Any:
    content = (resources.files("imgcap_jax.web") / "assets" / file).read_bytes()

    async def read() -> Response:
        return Response(content, media_type=kind)

    return read
