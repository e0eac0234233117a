import pytest

from llmc_attnmask.checkpoint.linears import served_groups, single_groups


def test_modules_that_servers_fuse_are_one_group():
    layer = "model.layers.3"
    attention = [f"{layer}.self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"{layer}.mlp.{x}_proj" for x in ("up", "gate", "down")]
    assert served_groups([*attention, *mlp]) == {
        f"{layer}.self_attn.q_proj+k_proj+v_proj": attention[:3],
        f"{layer}.self_attn.o_proj": attention[3:],
        f"{layer}.mlp.gate_proj+up_proj": mlp[:2],
        f"{layer}.mlp.down_proj": mlp[2:],
    }


def test_experts_of_a_layer_are_one_group_and_shared_ones_another():
    experts = [
        f"layers.{layer}.mlp.experts.{n}.{x}"
        for layer in (0, 1)
        for n in (0, 11)
        for x in ("gate_proj", "up_proj", "down_proj")
    ]
    shared = "layers.0.mlp.shared_experts.down_proj"
    groups = served_groups([*experts, shared])
    assert list(map(len, groups.values())) == [4, 2, 4, 2, 1]
    assert next(iter(groups)) == "layers.0.mlp.experts.*.gate_proj+up_proj"
    assert list(groups)[-1] == shared


def test_single_groups_have_one_module_and_the_same_of_all_experts():
    modules = ["h.0.up", "h.0.experts.0.up", "h.0.experts.1.up", "h.0.experts.0.down"]
    assert single_groups(modules, alike=()) == {
        "h.0.up": modules[:1],
        "h.0.experts.*.up": modules[1:3],
        "h.0.experts.*.down": modules[3:],
    }


@pytest.mark.parametrize("reverse", [False, True])
def test_single_groups_keep_together_what_is_pruned_alike(reverse):
    modules = [f"h.{layer}.attn.{x}" for layer in (0, 1, 2) for x in "qkvo"]
    q, k, v, o = modules[:4]
    q1, k1, v1, o1 = modules[4:8]
    alike = [[q, k], [k, v], [k1, v1]]
    found = single_groups(modules, alike[::-1] if reverse else alike)
    assert list(found.values()) == [[q, k, v], [o], [q1], [k1, v1], [o1]] + [
        [name] for name in modules[8:]
    ]
    assert list(found)[:2] == ["h.0.attn.q+k+v", "h.0.attn.o"]


def test_a_part_of_what_servers_fuse_is_a_group_of_its_own():
    found = served_groups(["h.0.attn.q_proj", "h.0.attn.k_proj"])
    assert list(found) == ["h.0.attn.q_proj+k_proj"]
