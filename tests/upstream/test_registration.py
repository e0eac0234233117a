import subprocess
import sys

import pytest


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_package_and_its_conversions_do_not_import_llm_compressor():
    out = python(
        "import sys, llmc_attnmask; llmc_attnmask.pack; llmc_attnmask.inspect\n"
        "print('llmcompressor' in sys.modules, 'transformers' in sys.modules)"
    )
    assert out == "False False\n"


def test_the_package_itself_imports_nothing_slow():
    """Slow imports wait until a name that needs them is used."""
    out = python(
        "import sys, llmc_attnmask\n"
        "heavy = {'torch', 'transformers', 'llmcompressor', 'numpy', 'pydantic'}\n"
        "print(heavy & set(sys.modules))"
    )
    assert out == "set()\n"


def test_after_llm_compressor_the_package_imports_nothing_but_itself():
    out = python(
        "import sys, llmcompressor\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import llmc_attnmask\n"
        "after = {name.partition('.')[0] for name in sys.modules}\n"
        "print(after - before - sys.stdlib_module_names)"
    )
    assert out.splitlines()[-1] == "{'llmc_attnmask'}"


@pytest.mark.parametrize(
    "imports",
    [
        "import llmc_attnmask, llmcompressor",
        "import llmcompressor, llmc_attnmask",
        "import llmc_attnmask\nfrom llmcompressor.modifiers.factory import *",
        "from llmc_attnmask import AttentionMatrixPruningModifier",
    ],
)
def test_recipes_know_the_modifiers_whatever_the_order_of_imports(imports):
    out = python(
        f"{imports}\n"
        "from llmcompressor.recipe import Recipe\n"
        "fields = dict(sparsity=0.5, mask_structure='2:4')\n"
        "names = dict(AttentionMatrixPruningModifier=fields)\n"
        "recipe = Recipe.from_dict(dict(a_stage=dict(b_modifiers=names)))\n"
        "print(type(recipe.modifiers[0]).__module__)"
    )
    assert out.splitlines()[-1] == "llmc_attnmask.modifiers.attention_pruning"
