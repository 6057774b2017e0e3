"""A long listing taken several prefixes at once: what is there is listed, however the server orders its folders."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from fimo.orchestrator.store import paging, s3
from fimo.orchestrator.store.paging import NoAdvanceError, Page, split, take_pages
from fimo.workers.errors import StoreError
from tests.orchestrator.store.conftest import fresh_s3_store
from tests.support.seaweed import Seaweed

PAGE = 5


class Server:
    """`ListObjectsV2` over a set of keys by its definition, pages of `PAGE`, folders' contents before "-" if asked.

    Args:
        before: called with the number of each request before it is answered.
    """

    def __init__(self, keys: Sequence[str], in_folders: bool = False, before: Callable[[int], None] | None = None):
        self.keys, self.before = set(keys), before
        self.requests: list[tuple[str, str | None, str]] = []
        self.order = (lambda key: key.replace("/", "\x01")) if in_folders else (lambda key: key)
        self.lock = threading.Lock()

    def __call__(self, prefix: str, token: str | None, delimiter: str = "") -> Page:
        with self.lock:
            self.requests.append((prefix, token, delimiter))
            if self.before is not None:
                self.before(len(self.requests))
            names = {self.name(key, prefix, delimiter) for key in self.keys if key.startswith(prefix)}
        # A token is the last name of the page before it, as with S3, which lists what comes after.
        rest = [n for n in sorted(names, key=self.order) if token is None or self.order(n) > self.order(token)]
        page, more = rest[:PAGE], len(rest) > PAGE
        return {
            "Contents": [{"Key": name} for name in page if name in self.keys],
            "CommonPrefixes": [{"Prefix": name} for name in page if name not in self.keys],
            "IsTruncated": more,
            **({"NextContinuationToken": page[-1]} if more else {}),
        }

    @staticmethod
    def name(key: str, prefix: str, delimiter: str) -> str:
        end = key.find(delimiter, len(prefix)) if delimiter else -1
        return key if end < 0 else key[: end + 1]

    @property
    def folders_asked(self) -> bool:
        return any(delimiter for _, _, delimiter in self.requests)


def listed(server: Server, prefix: str) -> set[str]:
    found: set[str] = set()
    take_pages(server, prefix, lambda page: found.update(item["Key"] for item in page.get("Contents", ())))
    return found


def parts(seeds: int, sets: int) -> list[str]:
    return [f"sweep/parts/d1/seed-{seed:010d}/{name:016x}.parquet" for seed in range(seeds) for name in range(sets)]


@pytest.fixture
def folders_pay(monkeypatch):
    monkeypatch.setattr(paging, "FOLDER", 2)


SEGMENT = some.text("ab-0é", min_size=1, max_size=3)
KEYS = some.sets(some.lists(SEGMENT, min_size=1, max_size=4).map("/".join), max_size=80)


@settings(max_examples=150, deadline=None)
@given(keys=KEYS, prefix=some.sampled_from(["", "a", "a/", "b/a", "a/b/"]), in_folders=some.booleans())
def test_every_key_under_a_prefix_is_listed_whatever_its_folders(keys, prefix, in_folders):
    # No key is another's folder, as in every store.
    keys = {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paging, "FOLDER", 1)
        patch.setattr(paging, "MOST_PREFIXES", 4)
        assert listed(Server(sorted(keys), in_folders), prefix) == {key for key in keys if key.startswith(prefix)}


@pytest.mark.parametrize("prefix", ["sweep/parts/d1/", "sweep/parts/", "sweep/", "sweep/parts/d1/seed-00000000"])
def test_parts_are_listed_several_seeds_at_once(prefix):
    keys = [*parts(30, 40), "sweep/sweep.json"]
    server = Server(keys)
    assert listed(server, prefix) == {key for key in keys if key.startswith(prefix)}
    assert len({asked for asked, _, delimiter in server.requests if not delimiter}) > (20 if "parts" in prefix else 1)


@pytest.mark.parametrize(
    ("prefix", "keys"),
    [
        ("sweep/", []),
        ("sweep/", parts(1, 1)),
        ("sweep/", parts(2, 5)),
        ("sweep/", parts(60, 1)),
        ("sweep/witnesses/", [f"sweep/witnesses/{i:03d}" for i in range(61)]),
        ("sweep/", ["sweep/0.json", *parts(20, 40)]),
    ],
)
def test_a_short_listing_and_one_without_large_folders_take_a_request_a_page(prefix, keys):
    server = Server(keys)
    assert listed(server, prefix) == set(keys)
    assert len(server.requests) == max(1, -(-len(keys) // PAGE))


def test_more_folders_than_are_worth_asking_for_are_listed_one_after_another(folders_pay):
    keys = parts(PAGE * paging.FOLDER_PAGES + 1, 4)
    server = Server(keys)
    assert listed(server, "sweep/parts/d1/") == set(keys)
    assert {asked for asked, _, _ in server.requests} == {"sweep/parts/d1/"}


def test_a_server_that_names_no_folders_or_not_all_is_listed_one_page_after_another():
    keys = parts(20, 40)

    class Odd(Server):
        def __call__(self, prefix: str, token: str | None, delimiter: str = "") -> Page:
            page = super().__call__(prefix, token, delimiter)
            return {**page, "CommonPrefixes": [], "IsTruncated": False} if delimiter else page

    server = Odd(keys)
    assert listed(server, "sweep/parts/d1/") == set(keys)
    assert server.folders_asked


def test_pages_without_keys_are_passed_over():
    class Sparse(Server):
        def __call__(self, prefix: str, token: str | None, delimiter: str = "") -> Page:
            if token is None or token in "12":
                return {"IsTruncated": True, "NextContinuationToken": str(int(token or 0) + 1)}
            return super().__call__(prefix, None if token == "3" else token, delimiter)

    for keys in (parts(20, 40), []):
        assert listed(Sparse(keys), "sweep/parts/") == set(keys)


def test_what_is_there_throughout_is_listed_while_others_come_and_go():
    stays, goes, comes = parts(20, 40), [], []
    for number, key in enumerate(list(stays)):
        if number % 7 == 3:
            stays.remove(key)
            goes.append(key)
        comes.append(key.replace(".parquet", "x.parquet"))
    comes += [key.replace("seed-00", "seed-99") for key in comes]

    def before(request: int) -> None:
        server.keys.difference_update(goes[: 3 * request])
        server.keys.update(comes[: 10 * request])

    server = Server([*stays, *goes], before=before)
    found = listed(server, "sweep/parts/")
    assert set(stays) <= found <= {*stays, *goes, *comes}
    assert found & set(comes)


def test_an_error_under_one_prefix_is_raised_and_ends_the_others():
    keys = parts(20, 500)

    def before(request: int) -> None:
        prefix, token, _ = server.requests[-1]
        if token is not None and prefix.endswith("seed-0000000007/"):
            raise StoreError("no more")

    server = Server(keys, before=before)
    with pytest.raises(StoreError, match="no more"):
        listed(server, "sweep/parts/d1/")
    assert len(server.requests) < len(keys) / PAGE / 2
    assert not [t for t in threading.enumerate() if t.name.startswith("fimo-list")]


def test_a_server_that_sends_the_same_page_again_is_refused_under_a_prefix_too():
    class Stuck(Server):
        def __call__(self, prefix: str, token: str | None, delimiter: str = "") -> Page:
            page = super().__call__(prefix, token, delimiter)
            return page if "seed" not in prefix else {**page, "IsTruncated": True, "NextContinuationToken": "again"}

    with pytest.raises(NoAdvanceError, match="does not advance"):
        listed(Stuck(parts(20, 40)), "sweep/parts/d1/")


def test_prefixes_hold_every_name_and_none_holds_another():
    for names in (["a", "ab/", "b/"], ["a/", "ab/", "b"], [f"p/{i:03d}/" for i in range(200)], ["é/", "ü/"]):
        found = split(sorted(names))
        assert 1 < len(found) <= paging.MOST_PREFIXES
        assert all(sum(name.startswith(one) for one in found) == 1 for name in names)
    assert split([f"{chr(0x4E00 + i)}/" for i in range(paging.MOST_PREFIXES + 1)]) == []


@pytest.mark.s3
def test_a_real_server_lists_several_prefixes_as_it_lists_one(s3_environment: Seaweed, monkeypatch):
    store = fresh_s3_store()
    keys = [*(f"s/parts/d1/seed-{n:04d}/{name}.parquet" for n in range(12) for name in range(18)), "s/sweep.json"]
    keys += [f"s/parts-2/d1/{name}" for name in range(6)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: store.create(key, key.encode()), keys))
    monkeypatch.setattr(s3, "MOST_LISTED", 7)
    requests: list[str] = []
    plain = s3._list_page
    monkeypatch.setattr(
        s3, "_list_page", lambda client, request: (requests.append(request["Prefix"]), plain(client, request))[1]
    )
    for prefix in ("", "s/", "s/parts", "s/parts/d1/", "s/parts/d1/seed-000"):
        with monkeypatch.context() as serial:
            serial.setattr(paging, "SERIAL_PAGES", 10**6)
            one = list(store.list(prefix))
        requests.clear()
        assert list(store.list(prefix)) == one
        assert [entry.key for entry in one] == sorted(key for key in keys if key.startswith(prefix))
        assert len(set(requests)) > 2, "was not listed in several prefixes"

    def denied(client: object, request: dict[str, str]) -> Page:
        if "ContinuationToken" in request and request["Prefix"].endswith("seed-0007/"):
            error = RuntimeError()
            error.response = {"Error": {"Code": "AccessDenied"}}  # type: ignore[attr-defined]
            raise error
        return plain(client, request)

    monkeypatch.setattr(s3, "_list_page", denied)
    with pytest.raises(StoreError, match="cannot list 's/parts/d1/': access is denied"):
        store.list("s/parts/d1/")


def test_a_time_is_what_botocore_takes_it_for():
    from botocore.utils import parse_timestamp

    for text in (
        *(
            "2026-11-29T09:06:48Z",
            "2026-11-29T09:06:48.000Z",
            "2026-11-29T09:06:48.1Z",
            "2026-11-29T09:06:48.123456789Z",
        ),
        *("2026-11-29T09:06:48+02:00", "Sun, 29 Nov 2026 09:06:48 GMT", "20261129T090648Z", 1.7e9, "1700000000.5"),
    ):
        assert s3._moment(text) == parse_timestamp(text)
    for text in ("2026-02-30T09:06:48Z", "T", "", "yesterday"):
        with pytest.raises(ValueError, match="Invalid timestamp"):
            s3._moment(text)
