"""Fuzz for a given time, print executions and findings, and keep failing inputs.

    python -m tests.fuzz.run --minutes 10

Each target runs in its own process, which may use two gigabytes more than it starts
with, and 20 seconds per input. A finding is stored with its traceback under ``--out``;
``--replay FILE`` runs it again.
"""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase

_SPARE = 2 << 30  # bytes
_SECONDS = 20  # per input
_START = 60  # seconds for imports
_ROUND = 200  # executions between looks at the clock


class Hang(BaseException):
    """An input takes too long. Readers may convert an Exception, but not this."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--target", nargs="+", help="by default all, one after another")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"))
    parser.add_argument("--replay", type=Path, help="a stored input")
    args = parser.parse_args()
    # a word of a command line may be taken for a model's name: do not look it up
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.replay:
        replay(args.replay)
        return
    from tests.fuzz.targets import TARGETS

    names = args.target or list(TARGETS)
    args.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    executions = findings = 0
    for name in names:
        seconds = args.minutes * 60 / len(names)
        with context.Pool(1) as pool:
            result = pool.apply_async(fuzz, (name, seconds, args.seed, args.out))
            try:
                done, found = result.get(seconds + 2 * _SECONDS + _START)
            except multiprocessing.TimeoutError:
                print(f"FINDING {current(args.out, name)}: hangs outside Python")
                done, found = 0, 1
        print(f"{name}: {done} executions in {seconds:.0f} s, {found} findings")
        executions, findings = executions + done, findings + found
    print(f"{executions} executions, {findings} findings")
    raise SystemExit(bool(findings))


def fuzz(name: str, seconds: float, seed: int, out: Path) -> tuple[int, int]:
    """Run one target for a time.

    :return: number of executions and of different findings
    """
    from tests.fuzz.targets import TARGETS

    strategy, target = TARGETS[name]
    limit_memory()
    executions = 0
    failed: tuple[Any, BaseException] | None = None

    def once(case: Any) -> None:
        nonlocal executions, failed
        executions += 1
        write(case, current(out, name))
        signal.alarm(_SECONDS)
        try:
            target(case)
        except (Exception, Hang) as error:
            failed = case, error  # the last failing case is the smallest
            raise
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, _hang)
    settings = hypothesis.settings(
        max_examples=_ROUND,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    known: set[str] = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seed += 1
        run = hypothesis.seed(seed)(settings(hypothesis.given(strategy)(once)))
        try:
            run()
        except (Exception, Hang) as error:
            case, error = failed or (None, error)
            place = _place(error)
            if place in known:
                continue
            known.add(place)
            file = out / f"{name}-{len(known)}.json"
            write(case, file)
            trace = "".join(traceback.format_exception(error))
            file.with_suffix(".txt").write_text(trace)
            print(f"FINDING {file}: {place}: {str(error)[:200]!r}", flush=True)
    return executions, len(known)


def current(out: Path, name: str) -> Path:
    """Return the file of the running input, for failures that leave no traceback."""
    return out / f"{name}-0.json"


def write(case: Any, file: Path) -> None:
    target = file.name.partition("-")[0]
    file.write_text(json.dumps({"target": target, "case": _spelled(case)}))


def limit_memory() -> None:
    """Limit the memory that this process may take from now on."""
    status = Path("/proc/self/statm").read_text().split()
    size = int(status[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + _SPARE, size + _SPARE))


def replay(file: Path) -> None:
    from tests.fuzz.targets import TARGETS

    stored = json.loads(file.read_text())
    TARGETS[stored["target"]][1](_unspelled(stored["case"]))


def _hang(*_: object) -> None:
    raise Hang(f"more than {_SECONDS} s")


def _place(error: BaseException) -> str:
    """Identify a finding by its error and the last of this package's lines."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "llmc_attnmask" in f.filename] or list(frames)
    where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
    return f"{type(error).__name__} at {where}"


def _spelled(case: Any) -> Any:
    if isinstance(case, bytes):
        return {"bytes": case.decode("latin-1")}
    if isinstance(case, dict):
        return {key: _spelled(value) for key, value in case.items()}
    return case


def _unspelled(case: Any) -> Any:
    if isinstance(case, dict):
        if set(case) == {"bytes"}:
            return case["bytes"].encode("latin-1")
        return {key: _unspelled(value) for key, value in case.items()}
    return case


if __name__ == "__main__":
    main()
