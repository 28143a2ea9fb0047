import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from student_train.recent import Recent


def test_loads_once_whoever_asks():
    calls, gate = [], threading.Event()

    def load():
        calls.append(1)
        gate.wait(5)
        return "value"

    recent: Recent[str, str] = Recent(capacity=2)
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(recent.get, "key", load) for _ in range(8)]
        gate.set()
        assert {each.result() for each in waiting} == {"value"}
    assert len(calls) == 1


def test_least_recently_used_goes_first():
    loads = []
    recent: Recent[str, str] = Recent(capacity=2)

    def get(key):
        return recent.get(key, lambda: loads.append(key) or key)

    for key in "abaca":
        get(key)
    assert "".join(loads) == "abc"
    get("b")
    assert "".join(loads) == "abcb"


def test_weight_bounds_memory():
    recent: Recent[int, bytes] = Recent(capacity=100, weigh=len)
    for key in range(50):
        recent.get(key, lambda: bytes(30))
    assert recent._weight <= 100
    assert recent.get(99, lambda: bytes(1000)) == bytes(1000)
    assert recent._weight <= 100


def test_errors_reach_everyone_and_are_not_kept():
    recent: Recent[str, str] = Recent(capacity=2)

    def fail():
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        recent.get("key", fail)
    assert recent.get("key", lambda: "back") == "back"


def test_an_entry_put_out_while_loading_is_weighed_once():
    recent: Recent[str, int] = Recent(capacity=3)

    def load_slowly() -> int:
        for name in "bcde":  # these put the entry that is being loaded out
            recent.get(name, lambda: 0)
        return recent.get("a", lambda: 7)

    assert recent.get("a", load_slowly) == 7
    for name in "efghijk":
        recent.get(name, lambda: 0)
    loads = []
    for name in "ijk":
        recent.get(name, lambda: loads.append(1))
    assert not loads, "the bound of three still holds three"
