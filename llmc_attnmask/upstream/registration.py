"""Registers the modifiers with llm-compressor, once that is imported.

Importing llm-compressor takes seconds and hundreds of megabytes, which reading and
converting checkpoints need not pay.
"""

import contextlib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_HOST = "llmcompressor"


def register() -> None:
    """Register now, or right after llm-compressor's own import."""
    if _HOST in sys.modules:
        import_module("llmc_attnmask.modifiers")
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if name != _HOST:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(_HOST)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            # it warns on stdout while it is imported, which would spoil `--json`
            with contextlib.redirect_stdout(sys.stderr):
                execute(module)
                from llmcompressor.logger import configure_logger

                import_module("llmc_attnmask.modifiers")
            configure_logger()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
