import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import RUNS, Output, generate


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """The folder that make_checkpoints.py filled, in the other environment."""
    folder = Path(os.environ["LLMC_ATTNMASK_CHECKPOINTS"])
    assert (folder / "bf16-packed").is_dir(), f"{folder} has no checkpoints"
    return folder.absolute()


@pytest.fixture(scope="session")
def outputs(
    checkpoints: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Output]]]:
    """The outputs of all RUNS, two processes at a time: they mostly import and load."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(generate, run, checkpoints, folder / name)
            for name, run in RUNS.items()
        }
