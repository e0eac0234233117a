"""The journal of a run belongs to its model."""

import copy

from torch import nn

from llmc_attnmask.runlog.journal import Entry, entries, note


def test_entries_are_kept_in_order_with_their_model():
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    note(model, "A", "layer.0", error=0.5)
    note(model, "B", "layer.1")
    assert entries(model) == [
        Entry("A", "layer.0", {"error": 0.5}),
        Entry("B", "layer.1", {}),
    ]
    assert entries(other) == []


def test_a_copy_of_the_model_has_its_own_journal():
    model = nn.Linear(2, 2)
    note(model, "A", "layer.0")
    twin = copy.deepcopy(model)
    note(twin, "B", "layer.0")
    assert len(entries(model)) == 1
