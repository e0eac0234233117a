import pytest
import torch

from llmc_attnmask.calibration.inputs import ModuleInputs
from llmc_attnmask.calibration.micro_batches import (
    MicroBatch,
    Sums,
    micro_batch_size,
    micro_batches_of,
    minibatches,
    share,
    train_validation_split,
)


def micro_batches(count: int, size: int = 1) -> list[MicroBatch]:
    return [MicroBatch(i, size, (i,)) for i in range(count)]


def collected(*lengths: int) -> ModuleInputs:
    inputs = ModuleInputs()
    for length in lengths:
        inputs.append([torch.zeros(1, length, 4)], {})
    return inputs


@pytest.mark.parametrize(
    ("total", "length", "size"),
    [
        (128, 2048, 1),
        (128, 1024, 2),
        (128, 256, 8),
        (128, 100, 8),
        (24, 128, 2),
        (8, 64, 1),
        (1, 5, 1),
    ],
)
def test_micro_batches_have_few_tokens_and_there_are_enough_of_them(
    total, length, size
):
    assert micro_batch_size(total, length) == size


def test_every_sample_is_in_one_micro_batch_of_its_own_length():
    inputs = collected(*[16] * 9, 32, *[16] * 8)
    found = micro_batches_of(inputs)
    assert sorted(i for micro_batch in found for i in micro_batch.samples) == list(
        range(18)
    )
    assert [micro_batch.index for micro_batch in found] == list(range(len(found)))
    for micro_batch in found:
        assert micro_batch.size == len(micro_batch.samples)
        assert len({inputs.hidden.shape(i) for i in micro_batch.samples}) == 1


@pytest.mark.parametrize(("batch_size", "size"), [(8, 8), (4, 4), (6, 2), (1, 1)])
def test_the_size_of_a_micro_batch_divides_the_batch_size(batch_size, size):
    found = micro_batches_of(collected(*[16] * 64), batch_size)
    assert {micro_batch.size for micro_batch in found} == {size}


def test_ranks_have_disjoint_shares_of_whole_micro_batches():
    shares = [share(50, 256, rank, 3) for rank in range(3)]
    assert sorted(i for own in shares for i in own) == list(range(50))
    assert shares[1][:5] == [4, 5, 6, 7, 16]  # micro-batches of four, in turn
    alone = share(50, 256, 0, 1)
    assert alone == list(range(50))


def test_fewer_samples_than_ranks_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="too few for 4 processes; give at least 4"):
        share(3, 2048, 0, 4)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_rank_trains_and_validates_equally(world):
    train, validation = train_validation_split(micro_batches(64))
    assert len(validation) == 8
    assert not {m.index for m in train} & {m.index for m in validation}
    for few in (train, validation):
        by_rank = [sum(m.index % world == r for m in few) for r in range(world)]
        assert len(set(by_rank)) == 1


def test_a_few_micro_batches_all_train_and_validate():
    train, validation = train_validation_split(micro_batches(5))
    assert train == validation == micro_batches(5)


def test_an_epoch_has_every_micro_batch_once_and_ranks_have_equal_shares():
    train, _ = train_validation_split(micro_batches(64))
    batches = minibatches(train, 8, torch.Generator().manual_seed(0))
    first, second = ([next(batches) for _ in range(7)] for _ in range(2))
    for epoch in (first, second):
        assert sorted(m.index for b in epoch for m in b) == [m.index for m in train]
        for batch in epoch:
            assert sorted(micro_batch.index % 8 for micro_batch in batch) == list(
                range(8)
            )
    assert first != second
    again = minibatches(train, 8, torch.Generator().manual_seed(0))
    assert [next(again) for _ in range(7)] == first


def test_sums_do_not_depend_on_the_order_of_their_terms():
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(1000, generator=generator) * 3.0**i for i in range(12)]
    totals = []
    for order in (terms, terms[::-1]):
        sums: Sums[str] = Sums()
        for term in order:
            sums.add("x", term)
        totals.append(sums.totals()["x"])
    assert torch.equal(*totals)
    assert totals[0].dtype == torch.float32
    assert not torch.equal(sum(terms), sum(terms[::-1]))  # plain sums depend on it


def test_sums_do_not_change_their_terms():
    term = torch.ones(3, dtype=torch.float64)
    sums: Sums[str] = Sums()
    sums.add("x", term)
    sums.add("x", term)
    assert term.tolist() == [1, 1, 1]
