"""Sentences that people rated, as three tasks: films, products and a newspaper.

Each sentence was rated by twenty people from -4 (extremely negative) to 4 (extremely positive).  Source: C.J. Hutto and
E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014.  The data
is in the source archive of the package vaderSentiment (MIT licence).
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import io
import random
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from onelora_compile.examples.downloads import cached, checked

PACKAGE, VERSION = "vaderSentiment", "3.3.2"
ARCHIVE = f"{PACKAGE}-{VERSION}.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_INNER = f"{PACKAGE}-{VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"


@dataclasses.dataclass(frozen=True)
class Part:
    """Sentences, and the class of each: 0 or 1."""

    texts: list[str]
    labels: list[int]

    def first(self, count: int) -> Part:
        """The first of them."""
        return Part(self.texts[:count], self.labels[:count])


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: a word.
        question: what is asked of a sentence.
        answers: of class 0 and class 1.
        train: what adapters are trained on.
        validation: what learning rates are chosen on.
        test: used once, for what is reported.
    """

    name: str
    question: str
    answers: tuple[str, str]
    train: Part
    validation: Part
    test: Part


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a task's sentences are, and what class a mean rating is; None for a sentence that is left out."""

    name: str
    question: str
    answers: tuple[str, str]
    file: str
    label: Callable[[float], int | None]


def _sign(rating: float) -> int | None:
    """Negative or positive; None between, where people do not agree."""
    return None if abs(rating) < 0.5 else int(rating > 0)


def _feeling(rating: float) -> int | None:
    """Neutral or not; None between."""
    return 0 if abs(rating) <= 0.4 else 1 if abs(rating) >= 1.2 else None


SOURCES = (
    Source("films", "Does the critic like the film?", ("no", "yes"), "movieReviewSnippets", _sign),
    Source("products", "Is the customer content?", ("no", "yes"), "amazonReviewSnippets", _sign),
    Source("news", "Does the sentence carry feeling?", ("no", "yes"), "nytEditorialSnippets", _feeling),
)
TRAIN, VALIDATION, TEST = 1600, 300, 500  # sentences of each task; test is what is left where that is less


def load_tasks() -> list[Task]:
    """The three tasks; sentences of one review or article are all in one part.

    The archive is taken from the cache; pip downloads it (2 MB) before.

    Raises:
        OneLoRAError: it can't be had, or is another one.
        OSError: it can't be read.
    """
    with opened() as files:
        return [_task(source, read_rows(files, source)) for source in SOURCES]


@contextlib.contextmanager
def opened() -> Iterator[tarfile.TarFile]:
    """The rated sentences inside the archive; errors as of `load_tasks`."""
    path = cached(ARCHIVE, "the demo needs the sentences", _download)
    with tarfile.open(fileobj=io.BytesIO(checked(path, ARCHIVE, SHA256))) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None
        with tarfile.open(fileobj=inner) as files:
            yield files


def read_rows(files: tarfile.TarFile, source: Source) -> list[tuple[str, float, str]]:
    """The group, the mean rating and the text of each sentence."""
    file = files.extractfile(f"hutto_ICWSM_2014/{source.file}_GroundTruth.txt")
    assert file is not None
    rows = []
    for line in file.read().decode("utf-8", errors="replace").splitlines():
        number, rating, text = line.split("\t", 2)
        rows.append((number.partition("_")[0], float(rating), html.unescape(text).strip()))
    return rows


def _task(source: Source, rows: Sequence[tuple[str, float, str]]) -> Task:
    groups: dict[str, list[tuple[str, int]]] = {}
    for group, rating, text in rows:
        label = source.label(rating)
        if label is not None:
            groups.setdefault(group, []).append((text, label))
    order = sorted(groups)
    random.Random(0).shuffle(order)
    parts: list[Part] = []
    for size in (VALIDATION, TEST, TRAIN):
        chosen: list[tuple[str, int]] = []
        while order and len(chosen) < size:
            chosen += groups[order.pop()]
        random.Random(1).shuffle(chosen)
        parts.append(Part([text for text, _ in chosen], [label for _, label in chosen]).first(size))
    validation, test, train = parts
    return Task(source.name, source.question, source.answers, train, validation, test)


def _download(folder: Path) -> list[str]:
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-binary", PACKAGE]
    return [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
