import threading
from itertools import count
from types import SimpleNamespace

import pytest
from misbehave import Stop

from thinkmid.augment.annotators import Outcome
from thinkmid.augment.pool import through_pool


def test_no_more_is_read_than_twice_what_can_run_and_every_item_gets_its_own_outcome():
    read, done, most = [], [], [0]

    def items():
        for n in count():
            read.append(n)
            most[0] = max(most[0], len(read) - len(done))
            yield SimpleNamespace(chunk=str(n))

    def annotate(chunk):
        return Outcome(text=chunk * 2)

    for item, outcome in through_pool(items(), annotate, 6, Stop(lambda: len(done) >= 100), lambda: None):
        done.append(item.chunk)
        assert outcome.text == item.chunk * 2
    assert len(set(done)) == len(done) >= 100
    assert most[0] <= 6 * 2 + 6 * 2  # in the pool, and ended but not yet yielded
    assert set(done) <= set(map(str, read))


def test_once_stopped_nothing_begins_and_what_runs_is_broken_off_and_comes_out():
    began, broken = [], threading.Event()

    def annotate(chunk):
        began.append(chunk)
        return Outcome(failed="closed" if broken.wait(5) else "never told")

    items = (SimpleNamespace(chunk=str(n)) for n in count())
    found = list(through_pool(items, annotate, 2, Stop(lambda: len(began) == 2), broken.set))
    assert sorted(item.chunk for item, _ in found) == began == ["0", "1"]
    assert {outcome.failed for _, outcome in found} == {"closed"}


def test_an_error_of_the_annotator_comes_through():
    def annotate(chunk):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(through_pool(iter([SimpleNamespace(chunk="a")]), annotate, 1, Stop(), lambda: None))
