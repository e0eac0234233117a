"""One vLLM engine, which measures when it is told to.

    python -m integration.demo_serve.engine DIR [--tokenizer]

Every line on stdin is a JSON list: a method of ``Engine`` and its arguments. Every
answer is a JSON line on stdout after ``ANSWER``; the first one tells of the start.
"""

import gc
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import vllm
from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from integration.demo_serve.protocol import ANSWER

PROMPT, SHORT, LONG = 8, 9, 49  # tokens of a prompt and of two generations


class Memory(threading.Thread):
    """Watches what a model takes, without files that are mapped into memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.loading = 0  # bytes; ``loading`` is the most while loading
        self._loads = True
        load = DefaultModelLoader.load_weights

        def watched(*args: Any, **kwargs: Any) -> None:
            self.before = self._now()
            self.start()
            load(*args, **kwargs)
            self._loads = False
            self.join()

        DefaultModelLoader.load_weights = watched

    def run(self) -> None:
        while self._loads:
            self.loading = max(self.loading, self._now())
            time.sleep(0.002)

    def used(self) -> int:
        """Return the bytes that have been added since loading started."""
        gc.collect()
        return self._now() - self.before

    @staticmethod
    def _now() -> int:
        """Return the bytes of this process."""
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", status)[0])


class Engine:
    """A model on vLLM."""

    def __init__(self, model: str, tokenizer: bool) -> None:
        self.llm = LLM(
            model,
            dtype="bfloat16",
            max_model_len=1024,
            enforce_eager=True,
            enable_prefix_caching=False,
            skip_tokenizer_init=not tokenizer,
        )
        self._generate(1, PROMPT, 4)  # whatever happens only once

    def decode(self, batch: int) -> float:
        """Return tokens per second of some sequences, without their prompts."""
        few = self._generate(batch, PROMPT, SHORT)
        many = self._generate(batch, PROMPT, LONG)
        return batch * (LONG - SHORT) / (many - few)

    def first_token(self, prompt: int) -> float:
        """Return the seconds until the first token after a prompt."""
        return self._generate(1, prompt, 1)

    def ask(self, question: str, tokens: int) -> str:
        """Return the likeliest answer to a question."""
        likeliest = SamplingParams(temperature=0, max_tokens=tokens)
        message: Any = {"role": "user", "content": question}
        (answer,) = self.llm.chat([message], likeliest, use_tqdm=False)
        return str(answer.outputs[0].text)

    def _generate(self, batch: int, prompt: int, tokens: int) -> float:
        """Return the seconds."""
        prompts: Any = [
            {"prompt_token_ids": [5 + (7 * i + 13 * j) % 1000 for j in range(prompt)]}
            for i in range(batch)
        ]
        fixed = SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self.llm.generate(prompts, fixed, use_tqdm=False)
        return time.perf_counter() - start


def answer(content: Any) -> None:
    print(ANSWER + json.dumps(content), flush=True)


def main() -> None:
    memory = Memory()
    start = time.perf_counter()
    engine = Engine(sys.argv[1], "--tokenizer" in sys.argv)
    answer(
        {
            "vllm": vllm.__version__,
            "start": time.perf_counter() - start,  # seconds
            # the KV cache is as large for any weights
            "bytes": memory.used() - (int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) << 30),
            "loading_bytes": memory.loading - memory.before,
        }
    )
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        answer(getattr(engine, method)(*arguments))


if __name__ == "__main__":
    main()
