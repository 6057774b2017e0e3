"""Object-store weather between boto3 and a real S3 server: nothing lost, doubled or torn.

A seeded generator decides for each request; every kind of fault in `weather_proxy.FAULTS` is met.
"""

from __future__ import annotations

import hashlib
import pickle
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from fimo.orchestrator.store import S3Store
from fimo.workers.errors import StoreError
from tests.orchestrator.store.conftest import fresh_s3_store
from tests.support.seaweed import Seaweed, set_environment
from tests.support.weather_proxy import FAULTS, bad_weather

pytestmark = pytest.mark.s3

READ_TIMEOUT_S = 0.8
OBJECTS = 60


def _content(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest() * (50 + number * 7)


class Weather:
    """Each kind of fault in turn, on a seeded third of the requests, while it lasts."""

    def __init__(self, seed: int, kinds: tuple[str, ...], share: float = 0.4) -> None:
        self.rng, self.kinds, self.share = random.Random(seed), kinds, share
        self.fair, self.made = False, 0

    def __call__(self, method: str, path: str) -> str | None:
        if self.fair or self.rng.random() > self.share:
            return None
        self.made += 1
        return self.kinds[self.made % len(self.kinds)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_in_every_weather_nothing_is_lost_doubled_or_torn(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    weather = Weather(seed, FAULTS)
    with bad_weather(s3_environment.ports[0], weather) as proxy:
        set_environment(monkeypatch, s3_environment.environment(f"http://127.0.0.1:{proxy.server_address[1]}"))
        store = fresh_s3_store(patience_s=60, read_timeout_s=READ_TIMEOUT_S)
        # A client each, as the processes of a cluster have: botocore's adaptive rate is a client's own.
        workers = [pickle.loads(pickle.dumps(store)) for _ in range(12)]
        with ThreadPoolExecutor(len(workers)) as pool:
            own = [workers[n % len(workers)] for n in range(OBJECTS)]
            keys = [f"parts/{n:03d}" for n in range(OBJECTS)]
            written = list(pool.map(lambda n: own[n].create(keys[n], _content(n)), range(OBJECTS)))
            refused = list(pool.map(lambda n: own[n].create(keys[n], b"other"), range(0, OBJECTS, 3)))
            read = list(pool.map(lambda n: own[n].get(keys[n]), range(OBJECTS)))
        listed = [entry.key for entry in store.list("parts/")]
        faults: Counter[str] = proxy.faults
        weather.fair = True
        kept = {entry.key: store.get(entry.key) for entry in store.list("")}

    assert kept == {f"parts/{n:03d}": _content(n) for n in range(OBJECTS)}
    assert read == [_content(n) for n in range(OBJECTS)]
    assert listed == sorted(kept)
    assert not any(refused)
    # A write whose answer was lost finds its own object and says so: rare, never wrong.
    lost_answers = faults["reset_after_commit"] + faults["hang_after_commit"] + faults["cut_answer"]
    assert OBJECTS - written.count(True) <= lost_answers
    assert set(faults) == set(FAULTS)
    assert faults.total() >= 60


# botocore's adaptive back-off after throttling, and time-outs, take their time; the weather above has all kinds.
_SLOW = ("slow_down", "hang_before", "hang_after_commit")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in _SLOW else ()) for kind in FAULTS]
)
def test_one_kind_of_fault_twice_in_a_row_is_survived_by_every_operation(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Twice at each of create, create again, get, list and delete."""
    left = Counter[str]()

    def twice(method: str, path: str) -> str | None:
        left[method] -= 1
        return kind if left[method] >= 0 else None

    with bad_weather(s3_environment.ports[0], twice) as proxy:
        set_environment(monkeypatch, s3_environment.environment(f"http://127.0.0.1:{proxy.server_address[1]}"))
        store = fresh_s3_store(patience_s=30, read_timeout_s=READ_TIMEOUT_S)
        left["PUT"] = 2
        store.create("parts/a", b"a" * 5000)
        left["PUT"] = 2
        assert store.create("parts/a", b"b" * 5000) is False
        left["GET"] = 2
        assert store.get("parts/a") == b"a" * 5000
        if kind != "damaged_answer":  # a listing carries no checksum; TCP's and TLS's own must do
            left["GET"] = 2
        assert [(e.key, e.size) for e in store.list("")] == [("parts/a", 5000)]
        left["DELETE"] = 2
        store.delete("parts/a")
        assert list(store.list("")) == []
        assert proxy.faults.total() >= 5


def test_a_lost_answer_is_told_as_exists_and_the_object_is_ours(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter(["reset_after_commit"])
    with bad_weather(s3_environment.ports[0], lambda method, path: next(first, None)) as proxy:
        set_environment(monkeypatch, s3_environment.environment(f"http://127.0.0.1:{proxy.server_address[1]}"))
        store = fresh_s3_store()
        assert store.create("parts/a", b"mine") is False
        assert store.get("parts/a") == b"mine"


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        pytest.param(
            "slow_down",
            r"slow down \(throttling\), still after \d+ s of trying; check the network",
            marks=pytest.mark.slow,
        ),
        ("internal_error", r"reports an internal error, still after \d+ s of trying; check the network"),
        ("conflict", r"writes of the same key conflict, still after"),
        ("hang_before", r"did not answer in time, still after"),
        ("expired", r"credentials have expired: renew them, then run `fimo resume`"),
        ("denied", r"access is denied: give these credentials a policy like those in deploy/aws"),
        ("skewed", r"clock differs .* set it"),
        ("other_region", r"in another region or at another endpoint: set AWS_REGION"),
        ("other_region_unnamed", r"in another region or at another endpoint: set AWS_REGION"),
        ("bare_404", r"HTTP 404 and not as S3 does: check AWS_ENDPOINT_URL"),
        ("not_implemented", r"lacks conditional writes"),
    ],
)
def test_weather_that_does_not_clear_is_one_line_that_says_what_to_do(
    s3_environment: Seaweed, monkeypatch: pytest.MonkeyPatch, answer: str, line: str
) -> None:
    with bad_weather(s3_environment.ports[0], lambda method, path: answer) as proxy:
        set_environment(monkeypatch, s3_environment.environment(f"http://127.0.0.1:{proxy.server_address[1]}"))
        # What fails at once needs no patience, but a busy machine's own hiccups do.
        patience_s = 0.5 if answer in FAULTS else 10.0
        store: S3Store = fresh_s3_store(patience_s=patience_s, read_timeout_s=READ_TIMEOUT_S)
        for operation in (lambda: store.create("k", b"x"), lambda: store.get("k")):
            with pytest.raises(StoreError, match=line) as caught:
                operation()
            assert "\n" not in str(caught.value)
            assert s3_environment.secret_key not in str(caught.value)
            assert s3_environment.access_key not in str(caught.value)
