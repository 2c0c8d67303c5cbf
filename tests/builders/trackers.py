"""Stand-ins for the libraries of experiment trackers."""

import sys
from types import ModuleType, SimpleNamespace

from lorascope.sae.journal import CLOCK_FIELDS, read_journal


def timeless(path):
    return [
        {name: value for name, value in line.items() if name not in CLOCK_FIELDS}
        for line in read_journal(path)
    ]


class FakeWandb(ModuleType):
    """Records what it is given; raises at `fails`: init, log (the third), or finish."""

    def __init__(self, fails=None, error=None):
        super().__init__("wandb")
        self.fails, self.error = fails, error or RuntimeError("no\nnetwork")
        self.given, self.metrics, self.logged, self.finished = None, {}, [], []

    def init(self, **given):
        self._maybe("init")
        self.given = given
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        if len(self.logged) == 2:
            self._maybe("log")
        self.logged.append(values)

    def finish(self, exit_code=None):
        self._maybe("finish")
        self.finished.append(exit_code)

    def _maybe(self, place):
        if place == self.fails:
            raise self.error


def fake_tensorboard(monkeypatch):
    """Put a writer that records into the place of torch's."""
    seen = {"given": None, "scalars": [], "texts": [], "closed": 0}

    class SummaryWriter:
        def __init__(self, **given):
            seen["given"] = given

        def add_text(self, name, text, step):
            seen["texts"].append((name, text, step))

        def add_scalar(self, name, value, step):
            seen["scalars"].append((name, value, step))

        def close(self):
            seen["closed"] += 1

    fake = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return seen
