"""Generates the gRPC stubs from ``protos/*.proto``: as a hatch build hook, and as a script for ``make protos``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from grpc_tools import protoc

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, outside a build
    BuildHookInterface = object  # type: ignore[assignment, misc]

ROOT = Path(__file__).parent


def generate_stubs(root: Path) -> None:
    """Writes ``*_pb2.py``, ``*_pb2_grpc.py`` and their type stubs beside each ``.proto``.

    The include path is the repository root, so a file's path is its Python package and no import needs repair.
    """
    files = sorted(str(path.relative_to(root)) for path in (root / "protos").glob("*.proto"))
    outputs = [f"--{kind}_out={root}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    status = protoc.main(["protoc", f"-I{root}", *outputs, *files])
    if status != 0:
        raise RuntimeError(f"protoc failed with status {status} on {files}")


class StubsBuildHook(BuildHookInterface):  # type: ignore[misc, type-arg, unused-ignore]
    """Runs before every build, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        generate_stubs(Path(self.root))


if __name__ == "__main__":
    generate_stubs(ROOT)
    sys.exit(0)
