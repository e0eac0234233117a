"""docs/troubleshooting.md lists every message that a user can see, and no other."""

import re

from tests.support.error_messages import HOLE, ROOT, Message, messages

PAGE = ROOT / "docs" / "troubleshooting.md"
OTHERS = "\n## Messages of other libraries\n"  # and what follows
# only calls with wrong arguments lead to these, no command, recipe or checkpoint
INTERNAL = {
    "module ... has no attribute ...",
    "output_weight > 0 needs the output_projection's weight",
    "the mask is ...; expected torch.bool ..., the shape of the weight",
    "the weight is ...; expected two dimensions",
    "... inputs are not divisible by 4, so there are no groups of four",
    "the bitmask is ...; expected torch.uint8",
    "more than two of four entries are not +0.0",
    "the weight is ... ... on ...; expected a contiguous matrix in bfloat16 or int8",
    "x is ... with ..., for a weight of ...",
    "... inputs; expected at most ... in int8",
    "a sparse CPU kernel has no memory for its activations",
    "... failed its check: ...",  # in the table of the log
    "not 2:4: row ... has ... in a group of four within columns",
    "a ... tensor of shape ... is not a mask for this weight",
    "weight is ...; expected ... for inputs of shape ...",
    "the weight has ... columns; 2:4 kernels need a multiple of",
    "the decode kernel does not support this weight",
    "plans for ... tokens: expected",
    "cuSPARSELt plans for ... are needed while a CUDA graph is captured",
    "no cuSPARSELt plan for ...; call prepare when the model is loaded",
    "scales with a weight of ...: expected both with 8 bits",
    "... weights are not supported; expected",
    "... has no function ...",
    "cannot load ...",
    "at least ... is needed; ... is given",
}


def on_page() -> list[str]:
    """Return the messages in the first column of the page's tables."""
    text, _, _ = PAGE.read_text(encoding="utf-8").partition(OTHERS)
    cells = re.findall(r"^\| (`.*?`)(?: \(warning\))? \|", text, re.MULTILINE)
    return [cell.strip("`") for cell in cells]


def says(entry: str, message: Message) -> bool:
    """Whether an entry, in which ``...`` stands for any text, matches a message."""
    parts = [re.escape(part) for part in entry.split("...")]
    return re.search(".*".join(parts), message.text) is not None


def test_every_message_of_the_code_is_on_the_page():
    entries = [*on_page(), *INTERNAL]
    missing = [m for m in messages() if not any(says(e, m) for e in entries)]
    rows = "\n".join(
        f"  {m.place}\n    | `{m.text.replace(HOLE, '...')}` | WHY | WHAT TO DO |"
        for m in missing
    )
    assert not missing, (
        f"docs/troubleshooting.md does not list {len(missing)} messages; add these "
        "rows, shortened to what a user would search for, under the moment at which "
        f"they appear:\n{rows}\n(or to INTERNAL in this test, if no user can see them)"
    )


def test_the_page_lists_no_message_that_no_longer_exists():
    found = messages()
    gone = [e for e in [*on_page(), *INTERNAL] if not any(says(e, m) for m in found)]
    assert not gone, (
        "no source has messages like these any longer; remove or fix their rows in "
        "docs/troubleshooting.md (or INTERNAL in this test):\n  " + "\n  ".join(gone)
    )


def test_entries_are_long_enough_to_identify_a_message():
    for entry in on_page():
        letters = re.sub(r"[^A-Za-z]", "", entry)
        assert len(letters) >= 9, f"{entry!r} could be anything"


def test_a_message_is_found_wherever_it_is_made(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text(
        'NAME = "the constant"\n'
        "def f(x):\n"
        '    raise ValueError(f"{x!r} is bad for {NAME}; "\n'
        '                     "expected something else")\n'
        "def g(x):\n"
        "    raise KeyError(made(x))\n"
        "def made(x):\n"
        '    return f"made elsewhere for {x}"\n'
        "def h(x):\n"
        '    warnings.warn(f"careful with {x}, please", UserWarning, stacklevel=2)\n'
        "    raise ValueError(f'{x}: {x}')\n"
    )
    assert messages(package) == [
        Message(
            f"{HOLE} is bad for the constant; expected something else",
            "package/module.py:3",
        ),
        Message(f"made elsewhere for {HOLE}", "package/module.py:8"),
        Message(f"careful with {HOLE}, please", "package/module.py:10"),
    ]
