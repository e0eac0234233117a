import logging

from llmc_attnmask.serving.table import KernelTable, Row


def _row(reason: str) -> Row:
    return Row("qkv_proj", "64 x 64", "packed", "dense", reason)


def test_layers_are_counted_and_logged_together(caplog):
    table = KernelTable()
    for layer in ("a", "b", "c"):
        table.expect(layer)
    logging.getLogger("vllm.llmc_attnmask").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, "vllm.llmc_attnmask"):
        table.add("a", _row("small"))
        table.add("b", _row("small"))
        assert not caplog.records
        table.add("c", _row("odd"))
    logging.getLogger("vllm.llmc_attnmask").removeHandler(caplog.handler)
    _, _, odd, small = caplog.records[0].getMessage().splitlines()
    assert " ".join(odd.split()) == "1 qkv_proj 64 x 64 packed dense odd"
    assert " ".join(small.split()) == "2 qkv_proj 64 x 64 packed dense small"
