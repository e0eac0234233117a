"""Register modifiers with llm-compressor as soon as it is imported.

Importing llm-compressor takes seconds and hundreds of megabytes, which reading and
converting checkpoints do not need.
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


def import_with_llm_compressor(module: str) -> None:
    """Import a module right after llm-compressor, or now if that is already imported.

    :param module: name of the module, which registers what it defines
    """
    if _HOST in sys.modules:
        import_module(module)
    else:
        sys.meta_path.insert(0, _Finder(module))


class _Finder(MetaPathFinder):
    """Finds llm-compressor as usual, and makes loading it import a module, too."""

    def __init__(self, module: str):
        self.module = module

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

                import_module(self.module)
            configure_logger()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
