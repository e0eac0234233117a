import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmc_attnmask.masks.structure import MaskStructure


@given(
    group=st.integers(2, 9),
    pruned=st.integers(1, 8),
    rows=st.integers(1, 5),
    groups=st.integers(1, 4),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_every_group_loses_exactly_n_entries(group, pruned, rows, groups, levels, seed):
    pruned = min(pruned, group - 1)
    structure = MaskStructure(pruned, group)
    generator = torch.Generator().manual_seed(seed)
    # few levels: many ties
    scores = torch.randint(levels, (rows, groups * group), generator=generator).float()
    kept = structure.mask(scores, pruned / group)
    assert ((~kept).view(rows, groups, group).sum(-1) == pruned).all()
    by_group = scores.view(-1, group).masked_fill(~kept.view(-1, group), float("inf"))
    lowest_kept = by_group.amin(-1)
    by_group = scores.view(-1, group).masked_fill(kept.view(-1, group), float("-inf"))
    assert (by_group.amax(-1) <= lowest_kept).all()


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0, 0.999),
    levels=st.integers(1, 4),
)
def test_an_unstructured_count_is_exact_even_with_ties(rows, columns, sparsity, levels):
    scores = torch.randint(levels, (rows, columns)).float()
    kept = MaskStructure.parse("0:0").mask(scores, sparsity)
    assert int((~kept).sum()) == round(sparsity * rows * columns)


@given(
    structure=st.sampled_from(["0:0", "2:4", "1:2", "5:8", "16:32", "9:48"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    sparsity=st.floats(0, 0.999),
    levels=st.sampled_from([1, 3, 1000]),
    odd=st.sampled_from([0.0, float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 99),
)
def test_masks_are_those_of_a_stable_sort(
    structure, dtype, sparsity, levels, odd, seed
):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (3, 96), generator=generator).to(dtype)
    scores[scores == 1] = odd  # NaN counts as infinity
    structure = MaskStructure.parse(structure)
    groups = structure.groups(scores)
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    expected = torch.zeros_like(groups, dtype=torch.bool)
    expected.scatter_(-1, order[:, : structure.kept(scores, sparsity)], True)
    assert torch.equal(structure.mask(scores, sparsity), expected.view(3, 96))


def test_ties_go_to_the_first_entry():
    assert (
        MaskStructure.parse("2:4").mask(torch.ones(2, 8), 0.5).tolist()
        == [[True, True, False, False] * 2] * 2
    )


@pytest.mark.parametrize(
    "text", ["2-4", "", "4:4", "5:4", "0:4", "2:4:8", "a:b", "-1:4"]
)
def test_a_wrong_structure_is_refused_with_what_is_expected(text):
    with pytest.raises(ValueError, match=r'expected "N:M" with 0 < N < M'):
        MaskStructure.parse(text)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_sparsity_outside_its_range_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\)"):
        MaskStructure.parse("0:0").check(sparsity)


def test_a_sparsity_that_contradicts_n_of_m_is_refused_with_the_right_value():
    with pytest.raises(ValueError, match=r'contradicts mask_structure "2:4".*0\.5'):
        MaskStructure.parse("2:4").check(0.6)
    MaskStructure.parse("1:3").check(0.3333333)


def test_indivisible_in_features_are_refused():
    with pytest.raises(ValueError, match="6 in-features are not divisible by 4"):
        MaskStructure.parse("2:4").mask(torch.ones(2, 6), 0.5)
