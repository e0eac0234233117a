"""Run the command with a rank 1 that raises or is killed in the second layer.

python tests/support/faulty.py raise|kill prune ... --output DIR
"""

import os
import signal
import sys
import time
from pathlib import Path

from llmc_attnmask.cli import main
from llmc_attnmask.modifiers import attention_pruning


def failing(fault: str, output: Path) -> None:
    learn_masks, calls = attention_pruning.learn_masks, 0

    def learn(*args):
        nonlocal calls
        calls += 1
        if calls == 2 and os.environ["RANK"] == "1":
            (output.parent / "failed").write_text(str(time.monotonic()))
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("no luck with layer 1")
        return learn_masks(*args)

    attention_pruning.learn_masks = learn


if __name__ == "__main__":
    failing(sys.argv.pop(1), Path(sys.argv[-1]))
    main()
