"""The HTTP of the receiver: POST /webhook, GET /healthz, GET /metrics. Starlette; uvicorn serves it."""

from __future__ import annotations

import time

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from diffdefend_core.webhook.deliveries import MAX_BODY, Deliveries, RefusedError, subject
from diffdefend_core.webhook.metrics import CONTENT_TYPE, Metrics
from diffdefend_core.webhook.queue import WorkQueue


def build_app(deliveries: Deliveries, queue: WorkQueue, metrics: Metrics) -> Starlette:
    """Return the application; the queue is the caller's to start and to stop."""

    async def receive(request: Request) -> Response:
        try:
            answer = _received(deliveries, queue, request, await _body(request))
        except RefusedError as refused:
            metrics.deliveries.labels("refused").inc()
            return JSONResponse({"error": str(refused)}, status_code=refused.status)
        metrics.deliveries.labels(answer).inc()
        return JSONResponse({"answer": answer})

    async def health(request: Request) -> Response:
        return JSONResponse({"alive": queue.alive}, status_code=200 if queue.alive else 503)

    async def measure(request: Request) -> Response:
        return Response(metrics.text(), headers={"content-type": CONTENT_TYPE})

    return Starlette(
        routes=[
            Route("/webhook", receive, methods=["POST"]),
            Route("/healthz", health),
            Route("/metrics", measure),
        ]
    )


def _received(deliveries: Deliveries, queue: WorkQueue, request: Request, body: bytes) -> str:
    """Return `queued`, `ignored` or `duplicate`. Raises RefusedError."""
    now = time.time()
    delivery = deliveries.verify(request.headers, body, now)
    if not deliveries.is_new(delivery, now):
        return "duplicate"
    job = subject(body)
    if job is not None and not queue.put(job):
        raise RefusedError(503, "too many versions wait")
    deliveries.take(delivery, now)
    return "queued" if job is not None else "ignored"


async def _body(request: Request) -> bytes:
    """Return the body. Raises RefusedError at one that is too long, before all of it is read."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise RefusedError(413, f"the body has more than {MAX_BODY} bytes")
    return body
