"""What is served and how it is: ``/v1/models``, ``/version``, ``/health``, ``/ready``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from fastapi import APIRouter

from coordinator.coordinator import Coordinator
from coordinator.http.model_name import ModelName, last_part
from coordinator.http.shapes import Json
from rpc.errors import Unavailable


def service_router(coordinator: Coordinator, model_name: ModelName, created: int) -> APIRouter:
    """``created``: when this server started, in seconds since 1970; models have no better date."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Json:
        """The one model that is served."""
        return {"object": "list", "data": [_model(coordinator, model_name.shown(), created)]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Json:
        """The served model, if it has that name."""
        model_name.check(model)
        return _model(coordinator, model_name.shown(), created)

    @router.get("/health")
    async def health() -> Json:
        """The process is alive."""
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> Json:
        """A target worker is up; 503 otherwise."""
        deployment = coordinator.deployment()
        if not deployment.num_targets:
            raise Unavailable("no target worker is up; requests wait for one")
        return {"status": "ready", "num_targets": deployment.num_targets, "num_drafters": deployment.num_drafters}

    @router.get("/version")
    async def show_version() -> Json:
        return {"version": _version()}

    return router


def _model(coordinator: Coordinator, name: str, created: int) -> Json:
    deployment = coordinator.deployment()
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "outrider",
        "max_model_len": deployment.model.max_context,
        "draft_models": [last_part(draft) for draft in deployment.draft_models],
        "policy": deployment.policy,
        "max_k": deployment.max_k,
    }


def _version() -> str:
    try:
        return version("outrider")
    except PackageNotFoundError:
        return "unknown"
