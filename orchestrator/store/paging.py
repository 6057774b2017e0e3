"""All pages of a long S3 listing, several folders' at once: a server takes as long for a page as fimo does to read it.

Invariant: an object that is there from the beginning to the end is in a page. It lies under a prefix that the server
has named, and each prefix is listed to its end. Only `Prefix`, `Delimiter` and `ContinuationToken` are used, which
mean the same on servers that keep folders and list "a/b" before "a-b". An object may be in several pages.

A listing of two pages or fewer takes the requests that it would take anyway; so does one that is not in folders of many
objects each, a page after another.

Not here: requests and how they fail (`s3.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import commonprefix
from typing import Any, Protocol

from fimo.workers.errors import StoreError

Page = Mapping[str, Any]
"""As `ListObjectsV2` answers."""

AT_ONCE = 4
"""Requests under way: reading their answers fills one core from three or four on."""
SERIAL_PAGES = 2
FOLDER = 10
"""Objects in a folder, on average, from which folders are few beside the objects that they hold."""
FOLDER_PAGES = 10
MOST_PREFIXES = 32
DEEPEST = 4


class NoAdvanceError(StoreError):
    """A server sends the same page again and again."""


class Ask(Protocol):
    """One page of the objects whose key starts with a prefix, or of the folders there if there is a delimiter."""

    def __call__(self, under: str, token: str | None, delimiter: str = "", /) -> Page:
        """The page; raises StoreError."""


def take_pages(ask: Ask, prefix: str, take: Callable[[Page], None]) -> None:
    """Call `take` with every page under a prefix, in no order, from several threads.

    Raises:
        NoAdvanceError: the listing does not advance; and what `ask` raises.
    """
    keys: list[str] = []
    token: str | None = None
    for _ in range(SERIAL_PAGES):
        page = ask(prefix, token)
        take(page)
        keys += [item["Key"] for item in page.get("Contents", ())]
        token = following(page, token)
        if token is None:
            return
    prefixes = _prefixes(ask, prefix, keys)
    if prefixes:
        _take_together(ask, prefixes, take)
    else:
        _take_rest(ask, prefix, token, take, threading.Event())


def following(page: Page, token: str | None) -> str | None:
    """What to ask for the next page with; None after the last.

    Raises:
        NoAdvanceError: the server would send the same page again.
    """
    if not page.get("IsTruncated"):
        return None
    after: str | None = page.get("NextContinuationToken")
    if not after or after == token:
        raise NoAdvanceError("the server's listing does not advance; is this an S3 endpoint?")
    return after


def _take_rest(ask: Ask, prefix: str, token: str | None, take: Callable[[Page], None], stop: threading.Event) -> None:
    while not stop.is_set():
        page = ask(prefix, token)
        take(page)
        token = following(page, token)
        if token is None:
            return


def _take_together(ask: Ask, prefixes: Sequence[str], take: Callable[[Page], None]) -> None:
    """Every prefix to its end; the first error ends them all."""
    stop = threading.Event()
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="fimo-list") as threads:
        running = [threads.submit(_take_rest, ask, prefix, None, take, stop) for prefix in prefixes]
        try:
            for one in running:
                one.result()
        finally:
            stop.set()


def _prefixes(ask: Ask, prefix: str, keys: Sequence[str]) -> list[str]:
    """Prefixes, none within another, under which all objects lie; none if that does not pay.

    Args:
        keys: of the pages listed so far, which tell how many objects a folder has.
    """
    for _ in range(DEEPEST):
        if not _pays(keys, prefix):
            return []
        names = _names(ask, prefix)
        # Not if it has been seen that the server names too few.
        if names is None or not _folders(keys, prefix) <= set(names):
            return []
        if len(names) > 1:
            return split(names)
        [prefix] = names
    return []


def _folders(keys: Sequence[str], prefix: str) -> set[str]:
    """The folders right under a prefix that hold keys; "" among them if a key lies there itself."""
    return {key[: key.find("/", len(prefix)) + 1] for key in keys}


def _pays(keys: Sequence[str], prefix: str) -> bool:
    """Whether folders hold many objects each, where the keys first lie in several; told before any is asked for."""
    folders = _folders(keys, prefix)
    if not keys or "" in folders:
        return False
    while len(folders) == 1 and "" not in folders:
        folders = _folders(keys, folders.pop())
    # If all keys lie in one folder, it holds as many as that at least.
    return folders == {""} or ("" not in folders and len(folders) * FOLDER <= len(keys))


def _names(ask: Ask, prefix: str) -> list[str] | None:
    """The folders and objects right under a prefix; None if they are too many, or the server knows no folders."""
    names: set[str] = set()
    token: str | None = None
    for _ in range(FOLDER_PAGES):
        page = ask(prefix, token, "/")
        names |= {folder["Prefix"] for folder in page.get("CommonPrefixes", ())}
        names |= {item["Key"] for item in page.get("Contents", ())}
        token = following(page, token)
        if token is None:
            return sorted(names)
    return None


def split(names: Sequence[str]) -> list[str]:
    """At most `MOST_PREFIXES` prefixes, none within another, one of which each name starts with; sorted names."""
    found: list[str] = []
    shared = len(commonprefix([names[0], names[-1]]))  # noqa: RUF071  (keys are text, folders or not)
    for length in range(shared + 1, len(names[-1]) + 1):
        cut: list[str] = []
        for name in sorted({name[:length] for name in names}):
            if not cut or not name.startswith(cut[-1]):
                cut.append(name)
        if len(cut) > MOST_PREFIXES:
            break
        found = cut
    return found if len(found) > 1 else []
