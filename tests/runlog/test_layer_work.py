from loguru import logger
from torch import nn

from llmc_attnmask import ALPSPruningModifier
from llmc_attnmask.runlog.context import progress_of
from llmc_attnmask.runlog.layer_work import layer_work, restorable


def test_outside_a_run_layers_are_counted_and_nothing_else_begins():
    modifier = ALPSPruningModifier(sparsity=0.5)
    linear = nn.Linear(2, 2)
    sinks = len(logger._core.handlers)
    assert progress_of(modifier) is None and not restorable(modifier, "layer")
    with layer_work(linear, modifier, "layer") as work:
        work.changed = [linear]
    assert modifier.done == {"layer": 1}
    assert len(logger._core.handlers) == sinks
