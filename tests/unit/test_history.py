"""Checker of histories: it accepts a correct history and names each kind of contradiction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.stress.history import Operation, find_contradictions, find_overtaken

SUBMIT = Operation("submit", 1, 2, "key a", (("a", "queued"),))
RUNNING = Operation("view", 3, 4, "a", (("a", "running"),))
QUEUED = Operation("view", 5, 6, "a", (("a", "queued"),))
LISTED = Operation("list", 5, 6, "", (("a", "queued"),))
DONE = Operation("view", 7, 8, "a", (("a", "done"),), content="a.png")
IMAGE = Operation("image", 9, 10, "a.png", content="sha")
WEBHOOK = Operation("webhook", 9, 9, "a", (("a", "done"),))
CORRECT = [SUBMIT, RUNNING, QUEUED, LISTED, DONE, IMAGE, WEBHOOK]


def test_correct_history_is_accepted():
    assert find_contradictions(CORRECT) == []
    # the answer of a repeated request is the same job, and overlapping answers have any order
    repeated = replace(SUBMIT, sent_at=3, answered_at=9)
    overlapping = replace(RUNNING, sent_at=7.5, answered_at=8.5)
    assert find_contradictions([*CORRECT, repeated, overlapping]) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (replace(SUBMIT, jobs=(("b", "done"),)), "became the jobs"),
        (replace(SUBMIT, key="key b"), "has the keys"),
        (replace(QUEUED, jobs=(), is_missing=True), "is missing"),
        (replace(LISTED, jobs=(("b", "done"),)), "missing in a list"),
        (replace(IMAGE, content="", is_missing=True), "a.png is missing"),
        (replace(RUNNING, sent_at=9, answered_at=10), "was done, and later running"),
        (replace(DONE, sent_at=9, jobs=(("a", "failed"),)), "was done, and later failed"),
        (replace(IMAGE, content="other"), "two results"),
        (replace(QUEUED, kind="cancel"), "waits after its cancel"),
    ],
)
def test_contradiction_is_named(wrong: Operation, words: str):
    assert any(words in message for message in find_contradictions([*CORRECT, wrong]))


def test_job_without_an_end_or_webhook_is_named():
    assert find_contradictions([SUBMIT, RUNNING, replace(WEBHOOK, jobs=())]) == [
        "job a never finished"
    ]
    assert find_contradictions([SUBMIT, DONE]) == ["job a posted no webhook"]


def test_overtaken_jobs_are_named():
    operations = [
        operation
        for number, job in enumerate("abcd")
        for operation in (
            Operation("submit", number, number + 0.5, f"key {job}", ((job, "queued"),)),
            Operation("view", 10, 11, job, ((job, "done"),), started_at=20 - number),
        )
    ]
    assert find_overtaken(operations, since=-1, limit=2) == ["job a was overtaken by 3 jobs"]
    assert find_overtaken(operations, since=0.1, limit=2) == []
