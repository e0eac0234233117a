"""Generate offline with vLLM, one engine after another; runs in .venv-serving.

    python integration/serving/generate.py JOBS RESULTS

JOBS is a JSON list of {"model": DIR, "options": {...of LLM}, "lora": DIR or null,
"tokens": N}; RESULTS becomes a list of lists with one result per prompt: the tokens,
and the logprobs of the likeliest ones at every step.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

PROMPTS = ["Return the number of", "def read(self):", "The file"]
LOGPROBS = 3


def generate(
    model: str, options: dict[str, Any], lora: str | None, tokens: int
) -> list[Any]:
    engine = LLM(
        model,
        dtype="bfloat16",
        max_model_len=tokens + 122,
        gpu_memory_utilization=0.2,  # of the RAM, which other processes use, too
        enable_lora=lora is not None,
        **({"enforce_eager": True} | options),
    )
    outputs = engine.generate(
        PROMPTS,
        SamplingParams(temperature=0, max_tokens=tokens, logprobs=LOGPROBS),
        lora_request=LoRARequest("adapter", 1, lora) if lora else None,
    )
    results = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [
                {str(token): found.logprob for token, found in step.items()}
                for step in output.outputs[0].logprobs or []
            ],
        }
        for output in outputs
    ]
    engine.llm_engine.engine_core.shutdown()
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()
    return results


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())
    results = [generate(**job) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
