import time

from llmc_attnmask.serving.bench.timing import REPEATS, in_turn


def test_calls_are_timed_in_turn():
    order = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    calls = [lambda: call("slow", 0.02), lambda: call("fast", 0.005)]
    slow, fast = in_turn(calls, "cpu", cache=1024, seconds=0.01)
    assert order == ["slow", "fast"] * (2 + REPEATS[0])
    assert slow >= 20 and fast >= 5


def test_a_long_measurement_ends_after_enough_repeats():
    order = []
    in_turn([lambda: order.append(1)], "cpu", cache=1024, seconds=60)
    assert len(order) == 2 + REPEATS[1]
