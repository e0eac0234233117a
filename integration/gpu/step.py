"""Run one measuring step, and append its figures to OUT/results.jsonl.

    python integration/gpu/step.py NAME --out OUT [--seconds N] [options of the step]

``--list`` lists the steps. Each is a file in ``steps`` and documents its own options
(``NAME --help``). Without a GPU a step says so and measures nothing; ``--cpu`` runs it
with small shapes to find mistakes, and marks its rows as a trial.
"""

import argparse
import importlib
import os
import sys
import time
from pathlib import Path

STARTED = time.monotonic()
# This file's folder would shadow modules of other packages, such as `kernels`.
sys.path[0] = str(Path(__file__).parents[2])

STEPS = {  # name -> module of `steps`, and its function
    "machine": ("machine", "run"),
    "compile": ("compiling", "run"),
    "correct": ("correct", "run"),
    "cusparselt": ("cusparselt_checks", "run"),
    "decode": ("linears", "decode"),
    "prefill": ("linears", "prefill"),
    "blocks": ("linears", "blocks"),
    "attention": ("attention", "run"),
    "prune": ("prune", "run"),
    "profile": ("profile", "run"),
    "vllm": ("vllm_check", "run"),
    "checkpoint": ("checkpoint", "run"),
    "engine": ("engine", "run"),
}
MARGIN = 1.5  # seconds before the limit; from then on, a step starts nothing new


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=not any(name in sys.argv[1:2] for name in STEPS),
    )
    parser.add_argument("name", nargs="?", choices=STEPS)
    parser.add_argument("--list", action="store_true", help="list the steps")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--seconds", type=float, help="time limit of the step")
    parser.add_argument(
        "--cpu", action="store_true", help="try the step with small shapes"
    )
    parser.add_argument("--resume", action="store_true", help="skip recorded cases")
    args, others = parser.parse_known_args()
    if args.list:
        print("\n".join(STEPS))
        sys.exit()
    if args.name is None:
        parser.error("no step is given; --list lists them")
    return args, others


def main() -> None:
    args, others = parse()
    file, function = STEPS[args.name]
    module = importlib.import_module(f"integration.gpu.steps.{file}")
    own = argparse.ArgumentParser(
        prog=f"step.py {args.name}", description=module.__doc__
    )
    if hasattr(module, "options"):
        module.options(own)
    options = own.parse_args(others)

    import torch

    from integration.gpu.context import Context, GpuLostError, known

    if not args.cpu:
        if not torch.cuda.is_available():
            print(f"{args.name} skipped: no CUDA GPU on this machine")
            return
        if os.environ.get("TRITON_INTERPRET") == "1":
            sys.exit("TRITON_INTERPRET is set: kernels would run in the interpreter")
    torch.manual_seed(0)
    limit = float("inf") if args.seconds is None else args.seconds
    context = Context(
        step=args.name,
        folder=args.out,
        device="cpu" if args.cpu else "cuda",
        deadline=STARTED + limit - MARGIN,
        gpu=None if args.cpu else torch.cuda.get_device_name(),
    )
    if args.resume:
        context.done = known(context.rows(), args.name)
    try:
        getattr(module, function)(context, options)
    except GpuLostError as lost:
        if context.left() < 3 * MARGIN:
            sys.exit(f"{args.name}: {lost}; no time is left to restart")
        print(f"{args.name}: {lost}; restarting after this case", flush=True)
        again = [sys.executable, __file__, args.name, "--out", str(args.out)]
        if args.seconds is not None:
            again += ["--seconds", str(limit - (time.monotonic() - STARTED))]
        os.execv(sys.executable, [*again, "--resume", *others])
    context.finish()


if __name__ == "__main__":
    main()
