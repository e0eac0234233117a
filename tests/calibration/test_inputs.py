import pytest
import torch

from llmc_attnmask.attention.capture import AttentionReplica
from llmc_attnmask.calibration.inputs import ModuleInputs, UnbatchableArgumentError
from llmc_attnmask.evaluation.attention_error import attention_inputs


def test_a_batch_equals_its_samples_one_by_one(random_llama):
    inputs = attention_inputs(random_llama, torch.randint(0, 64, (3, 9)))
    name, collected = next(iter(inputs.items()))
    replica = AttentionReplica(random_llama.get_submodule(name))
    together = replica(*collected.batch([0, 1, 2], replica.device, replica.dtype))
    for i in range(3):
        alone = replica(*collected.batch([i], replica.device, replica.dtype))
        torch.testing.assert_close(together.query[i : i + 1], alone.query)


def test_equal_masks_and_rotary_tables_are_stored_once(random_llama):
    inputs = attention_inputs(random_llama, torch.randint(0, 64, (4, 9)))
    collected = next(iter(inputs.values()))
    assert len(collected) == len(collected.hidden) == 4
    assert len(collected._others) == 4  # mask, position ids, cosines, sines
    assert not torch.equal(collected.hidden[0], collected.hidden[1])


def test_samples_of_alternating_lengths_still_share_their_masks(random_llama):
    collected = ModuleInputs()
    for length in (5, 7, 5, 7):
        inputs = attention_inputs(random_llama, torch.randint(0, 64, (1, length)))
        sample = next(iter(inputs.values()))
        args, kwargs = sample.batch([0], torch.device("cpu"), torch.float32)
        collected.append(args, kwargs)
    assert len(collected._others) == 2 * 4


def test_batches_from_disk_are_equal_to_those_from_memory_to_the_bit(random_llama):
    module = random_llama.bfloat16().model.layers[0].self_attn
    kept: list[ModuleInputs] = [ModuleInputs("cpu"), ModuleInputs("disk")]
    for inputs in kept:
        module.register_forward_pre_hook(
            lambda _, args, kwargs, inputs=inputs: inputs.append(args, kwargs),
            with_kwargs=True,
        )
    for length in (5, 7, 5):
        tokens = torch.randint(0, 64, (2, length))
        padded = torch.ones_like(tokens)
        padded[0, -1] = 0  # a mask of its own
        random_llama(tokens, attention_mask=padded)
    device = torch.device("cpu")
    groups = [list(inputs.batches(range(6), 3)) for inputs in kept]
    assert groups[0] == groups[1] == [[0, 1, 4], [2, 3], [5]]
    for batch in groups[0]:
        memory, disk = (inputs.batch(batch, device, torch.float32) for inputs in kept)
        leaves = (torch.utils._pytree.tree_leaves(x) for x in (memory, disk))
        for a, b in zip(*leaves, strict=True):
            assert a is b or (torch.equal(a, b) and a.dtype == b.dtype)


def test_an_argument_that_differs_but_has_no_batch_dimension_is_refused():
    inputs = ModuleInputs()
    for i in range(2):
        inputs.append([torch.zeros(1, 5, 2)], {"scales": torch.full((3,), float(i))})
    with pytest.raises(UnbatchableArgumentError, match=r"shape \(3,\) differs"):
        inputs.batch([0, 1], torch.device("cpu"), torch.float32)


def test_batches_use_every_sample_and_never_mix_lengths():
    inputs = ModuleInputs()
    lengths = [5, 7, 5, 5, 7]
    for length in lengths:
        inputs.append([torch.zeros(1, length, 2)], {})
    batches = list(inputs.batches(range(5), 2))
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert max(map(len, batches)) == 2
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
