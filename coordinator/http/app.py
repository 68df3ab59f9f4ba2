"""The FastAPI application: routes, and what every request passes on its way to them."""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from coordinator.coordinator import Coordinator
from coordinator.http.chat import chat_router
from coordinator.http.completions import completions_router
from coordinator.http.errors import add_error_handlers
from coordinator.http.generate import generate_router
from coordinator.http.metrics import metrics_router
from coordinator.http.model_name import ModelName
from coordinator.http.request_id import RequestIds
from coordinator.http.service import service_router
from coordinator.http.tokens import tokens_router
from coordinator.settings import CoordinatorSettings


def make_app(
    coordinator: Coordinator, settings: CoordinatorSettings, registry: CollectorRegistry = REGISTRY
) -> FastAPI:
    """The front door of one coordinator, which it does not own. ``registry`` is what ``/metrics`` shows."""
    app = FastAPI(title="Outrider", docs_url=None, redoc_url=None)
    model_name = ModelName(coordinator, settings.served_model_name)
    app.include_router(completions_router(coordinator, model_name))
    app.include_router(chat_router(coordinator, model_name))
    app.include_router(generate_router(coordinator))
    app.include_router(tokens_router(coordinator, model_name))
    app.include_router(service_router(coordinator, model_name, int(time.time())))
    app.include_router(metrics_router(registry))
    add_error_handlers(app)
    app.add_middleware(RequestIds)
    return app
