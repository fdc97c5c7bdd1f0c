"""Futures for judges that tests make up."""

from dataclasses import dataclass
from typing import Any


@dataclass
class Later:
    """A future that calls work() when it is read, each time."""

    work: Any

    def result(self):
        return self.work()


@dataclass
class Ready:
    """A future whose value is known."""

    value: Any

    def result(self):
        return self.value
