"""What others build on changes only on purpose."""

from __future__ import annotations

import difflib

import pytest
from support import public_api

pytest.importorskip("transformers", reason="kvpolicy_adapters needs transformers")


def test_names_and_signatures_are_as_they_were():
    before = public_api.SNAPSHOT.read_text(encoding="utf-8").splitlines()
    now = public_api.lines()
    changed = [
        line
        for line in difflib.unified_diff(before, now, lineterm="", n=0)
        if line[:1] in "+-" and line[:3] not in ("+++", "---")
    ]
    assert not changed, (
        "the public API has changed:\n"
        + "\n".join(changed)
        + f"\nIf that is meant, run `{public_api.COMMAND}`, and say in CHANGELOG.md what a caller "
        "must know; what is removed or takes other arguments breaks callers, and needs a version "
        "that says so."
    )


def test_a_changed_signature_would_be_seen(monkeypatch):
    import kvpolicy

    def attend(query, keys):
        return query

    monkeypatch.setattr(kvpolicy, "attend", attend)
    monkeypatch.setattr(kvpolicy, "__all__", [*kvpolicy.__all__, "Reclaim"], raising=True)
    monkeypatch.setattr(kvpolicy, "Reclaim", "new", raising=False)
    changed = set(public_api.lines()) ^ set(
        public_api.SNAPSHOT.read_text(encoding="utf-8").splitlines()
    )
    assert {"kvpolicy.attend(query, keys)", "kvpolicy.Reclaim: str"} <= changed
