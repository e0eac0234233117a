"""The shipped model with a chat template, which it has not been trained on."""

import shutil
from pathlib import Path

from llmc_attnmask.oneshot.shipped import MODEL_DIR

# starts each dialog with the bos token itself, as many templates do
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}{{ message['role'] }}: \
{{ message['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
MARK = "<|end|>"


def chat_model(folder: Path) -> Path:
    """Copy the shipped model into a folder and give it a chat template."""
    shutil.copytree(MODEL_DIR, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
