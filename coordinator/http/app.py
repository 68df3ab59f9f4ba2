"""The FastAPI application: routes, and what every request passes on its way to them."""

from __future__ import annotations

import time

from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from coordinator.coordinator import Coordinator
from coordinator.http.completions import completions_router
from coordinator.http.errors import add_error_handlers
from coordinator.http.metrics import metrics_router
from coordinator.http.request_id import RequestIds
from coordinator.http.service import service_router
from coordinator.settings import CoordinatorSettings


def make_app(
    coordinator: Coordinator, settings: CoordinatorSettings, registry: CollectorRegistry = REGISTRY
) -> FastAPI:
    """The front door of one coordinator, which it does not own. ``registry`` is what ``/metrics`` shows."""
    app = FastAPI(title="Outrider", docs_url=None, redoc_url=None)
    app.include_router(completions_router(coordinator))
    app.include_router(service_router(coordinator, int(time.time())))
    app.include_router(metrics_router(registry))
    add_error_handlers(app)
    app.add_middleware(RequestIds)
    return app
