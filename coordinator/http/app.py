"""The FastAPI application: routes, and what every request passes on its way to them."""

from __future__ import annotations

import time

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from coordinator.coordinator import Coordinator
from coordinator.http.chat import chat_router
from coordinator.http.completions import completions_router
from coordinator.http.doorkeeper import BodyLimit, DoorKeeper
from coordinator.http.errors import add_error_handlers
from coordinator.http.generate import generate_router
from coordinator.http.keys import KeyFile
from coordinator.http.limits import Gates, Limits
from coordinator.http.metrics import metrics_router
from coordinator.http.model_name import ModelName
from coordinator.http.page import add_page
from coordinator.http.request_id import HEADER as REQUEST_ID
from coordinator.http.request_id import RequestIds
from coordinator.http.service import service_router
from coordinator.http.tokens import tokens_router
from coordinator.http.trace_context import TraceContexts
from coordinator.settings import CoordinatorSettings


def make_app(coordinator: Coordinator, settings: CoordinatorSettings) -> FastAPI:
    """The front door of one coordinator, which it does not own.

    Raises `InvalidRequest` if the file of API keys cannot be read.
    """
    app = FastAPI(title="Outrider", docs_url=None, redoc_url=None)
    model_name = ModelName(coordinator, settings.served_model_name)
    app.include_router(completions_router(coordinator, model_name))
    app.include_router(chat_router(coordinator, model_name))
    app.include_router(generate_router(coordinator))
    app.include_router(tokens_router(coordinator, model_name))
    app.include_router(service_router(coordinator, model_name, int(time.time())))
    app.include_router(metrics_router(coordinator.metrics.registry))
    add_page(app)
    add_error_handlers(app)
    _add_middleware(app, settings)
    return app


def _add_middleware(app: FastAPI, settings: CoordinatorSettings) -> None:
    """From the inside out: what is added last sees a request first."""
    keys = None if settings.api_keys is None else KeyFile(settings.api_keys)
    app.add_middleware(TraceContexts)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(DoorKeeper, keys=keys, gates=Gates(_limits(settings)))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", REQUEST_ID],
            expose_headers=[REQUEST_ID, "retry-after"],
        )
    app.add_middleware(RequestIds)


def _limits(settings: CoordinatorSettings) -> Limits:
    return Limits(
        requests_per_minute=settings.key_requests_per_minute,
        max_concurrent=settings.key_max_concurrent,
        max_waiting=settings.key_max_waiting,
        max_wait_s=settings.key_max_wait_s,
    )
