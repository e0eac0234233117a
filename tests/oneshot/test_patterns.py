import re

import torch

from llmc_attnmask.checkpoint.load import load
from llmc_attnmask.oneshot.patterns import by_pattern, patterns
from llmc_attnmask.oneshot.shipped import MODEL_DIR


def test_patterns_match_the_modules_and_no_others():
    model = load(MODEL_DIR)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    some = [n for n in names if re.search(r"\.[13]\..*(q|down)_proj", n)]
    matches = [p.removeprefix("re:") for p in patterns(some)]
    assert [n for n in names if any(re.match(p, n) for p in matches)] == some


def test_experts_share_a_pattern():
    names = [
        f"layers.0.mlp.experts.{n}.{c}_proj" for n in (0, 1) for c in ("up", "gate")
    ]
    assert patterns(names) == [
        r"re:layers\.0\.mlp\.experts\.\d+\.(up_proj|gate_proj)\b"
    ]


def test_modules_with_one_sparsity_share_patterns():
    found = by_pattern({"layers.0.a": 0.5, "layers.1.b": 0.3, "layers.2.a": 0.5})
    assert found == {
        r"re:layers\.1\.b\b": 0.3,
        r"re:layers\.(0|2)\.a\b": 0.5,
    }
