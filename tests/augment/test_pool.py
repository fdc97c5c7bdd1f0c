import threading
from itertools import count
from types import SimpleNamespace

import pytest

from thinkmid.augment.annotators import Outcome
from thinkmid.augment.pool import through_pool


def test_no_more_is_read_than_twice_what_can_run_and_every_item_gets_its_own_outcome():
    read, done, most = [], [], [0]

    def items():
        for n in count():
            read.append(n)
            most[0] = max(most[0], len(read) - len(done))
            yield SimpleNamespace(chunk=str(n))

    def annotate(chunks):
        return [Outcome(text=chunk * 2) for chunk in chunks]

    for item, outcome in through_pool(items(), annotate, 3, 2, lambda: len(done) >= 100, lambda: None):
        done.append(item.chunk)
        assert outcome.text == item.chunk * 2
    assert len(set(done)) == len(done) >= 100
    assert most[0] <= 3 * 2 * 2 + 3 * 2 * 2  # in the pool, and ended but not yet yielded
    assert set(done) <= set(map(str, read))


def test_once_stopped_nothing_begins_and_what_runs_is_broken_off_and_comes_out():
    began, broken = [], threading.Event()

    def annotate(chunks):
        began.extend(chunks)
        return [Outcome(failed="closed" if broken.wait(5) else "never told") for _ in chunks]

    items = (SimpleNamespace(chunk=str(n)) for n in count())
    stopped = lambda: len(began) == 2  # noqa: E731
    found = list(through_pool(items, annotate, 1, 2, stopped, broken.set))
    assert sorted(item.chunk for item, _ in found) == began == ["0", "1"]
    assert {outcome.failed for _, outcome in found} == {"closed"}


def test_an_error_of_the_annotator_comes_through():
    def annotate(chunks):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(through_pool(iter([SimpleNamespace(chunk="a")]), annotate, 1, 1, lambda: False, lambda: None))
