import time

from llmc_attnmask.serving.timing import REPEATS, Timer


def test_calls_are_timed_in_turn_and_the_cache_is_emptied_before_each():
    timer, order = Timer("cpu", cache=1024), []

    def call(name: str, seconds: float) -> None:
        order.append((name, int(timer.other[0])))
        time.sleep(seconds)

    slow, fast = timer.within(
        [lambda: call("slow", 0.02), lambda: call("fast", 0.005)], 0
    )
    assert slow >= 20 and fast >= 5
    names, emptied = zip(*order, strict=True)
    assert names == ("slow", "fast") * (2 + REPEATS[0])
    assert emptied == (0, 0, *range(1, 1 + 2 * (1 + REPEATS[0])))
    assert len(timer.other) == 2048


def test_the_median_is_returned():
    seconds = iter([0, 0, 0.001, 0.06, 0.02])
    (found,) = Timer("cpu", cache=1).within([lambda: time.sleep(next(seconds))], 0)
    assert 20 <= found < 60


def test_a_long_measurement_ends_after_enough_repeats():
    order = []
    Timer("cpu", cache=1024).within([lambda: order.append(1)], 60)
    assert len(order) == 2 + REPEATS[1]
