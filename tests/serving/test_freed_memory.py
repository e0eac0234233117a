import re
from pathlib import Path

import pytest
import torch

from llmc_attnmask.serving import freed_memory

BLOCKS, SIZE = 400, 1 << 20
# freeing a block of this size makes glibc take smaller ones from memory that it keeps
LARGEST = 31 << 20


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_memory_that_is_freed_in_between_goes_back_to_the_system():
    del_me = torch.ones(LARGEST, dtype=torch.uint8)
    del del_me
    blocks = [torch.ones(SIZE, dtype=torch.uint8) for _ in range(BLOCKS)]
    full = resident()
    del blocks[::2]
    freed_memory.give_back()
    assert full - resident() > 0.8 * BLOCKS / 2 * SIZE
    assert all(bool(block.all()) for block in blocks)
