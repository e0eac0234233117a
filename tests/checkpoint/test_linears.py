from llmc_attnmask.checkpoint.linears import served_groups


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


def test_other_modules_may_be_grouped_than_those_that_servers_fuse():
    modules = [f"h.0.attn.{x}_proj" for x in "qkv"]
    found = served_groups(modules, fused=[("q_proj", "v_proj")])
    assert list(found) == ["h.0.attn.q_proj+v_proj", "h.0.attn.k_proj"]


def test_a_part_of_what_servers_fuse_is_a_group_of_its_own():
    found = served_groups(["h.0.attn.q_proj", "h.0.attn.k_proj"])
    assert list(found) == ["h.0.attn.q_proj+k_proj"]
