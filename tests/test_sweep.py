"""The sweep over transformers' architectures, and the page that it writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

from kvpolicy_adapters import transformers_cache  # noqa: E402
from kvpolicy_adapters.sweep import __main__ as command  # noqa: E402
from kvpolicy_adapters.sweep.examine import Finding, examine  # noqa: E402
from kvpolicy_adapters.sweep.page import page, row  # noqa: E402
from kvpolicy_adapters.sweep.tiny import architectures, build  # noqa: E402

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
ARCHITECTURES = architectures()
PINNED = re.search(r"transformers ([\d.]+)", PAGE.read_text(encoding="utf-8"))[1]


@pytest.mark.skipif(
    transformers.__version__ != PINNED,
    reason=f"docs/models.md is of transformers {PINNED}; other versions have other architectures",
)
class TestThePage:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_says_what_is_found(self, name):
        assert row(examine(name, ARCHITECTURES[name])) in PAGE.read_text(encoding="utf-8")

    def test_has_a_row_for_every_architecture_and_no_other(self):
        rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(rows) == sorted(ARCHITECTURES)

    def test_counts_what_passes_which_are_eighty_at_least(self):
        text = PAGE.read_text(encoding="utf-8")
        passing = len(re.findall(r"^\| `", text.partition("## What does not")[0], re.MULTILINE))
        assert f"**{passing} of {len(ARCHITECTURES)} architectures pass.**" in text
        assert passing >= 80

    def test_every_failure_has_a_reason_in_words(self):
        reasons = PAGE.read_text(encoding="utf-8").partition("## What does not")[2]
        for line in re.findall(r"^\| `.*", reasons, re.MULTILINE):
            assert len(line.split(" | ")[2]) > 20, line


def test_a_broken_attention_fails(monkeypatch):
    """The sweep sees a cache that hides a token from its queries."""
    whole = transformers_cache.policy_attention

    def forgets(module, query, key, value, mask, **kwargs):
        output, weights = whole(module, query, key, value, mask, **kwargs)
        return output * 0.9, weights

    # The function of this name hides its module.
    monkeypatch.setattr(sys.modules["kvpolicy_adapters.attach"], "policy_attention", forgets)
    finding = examine("LlamaForCausalLM", ("llama",))
    assert not finding.passes
    assert "logits differ" in finding.reason or "other tokens" in finding.reason


def test_a_budget_that_does_not_hold_fails(monkeypatch):
    held = transformers_cache.TransformersCache.positions

    def more(self, layer):
        return torch.cat([held(self, layer)] * 2, dim=-1)

    monkeypatch.setattr(transformers_cache.TransformersCache, "positions", more)
    assert "held 16 tokens with a budget of 8" in examine("LlamaForCausalLM", ("llama",)).reason


def test_models_are_tiny_and_the_same_each_time():
    first, second = build("llama"), build("llama")
    assert sum(weight.numel() for weight in first.parameters()) < 1e5
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_hostile_reason_stays_in_its_cell():
    line = row(Finding("X", ("a|b",), reason="no | <script>`x`</script> [y](z)\n| new row"))
    assert line.count(" | ") == 2
    assert "<script>" not in line
    assert "`x`" not in line
    assert "](" not in line.replace("\\[y](", "")
    assert "\n" not in line


def test_rows_are_sorted_and_none_is_lost():
    findings = [Finding(name, (name,), "4 / 2", "every token", True) for name in ("B", "a", "C")]
    findings += [Finding("z", ("z",), reason="no"), Finding("Y", ("Y",), reason="no")]
    assert re.findall(r"^\| `(\w+)`", page(findings), re.MULTILINE) == ["a", "B", "C", "Y", "z"]


def test_check_tells_a_changed_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "architectures", lambda: {"LlamaForCausalLM": ("llama",)})
    out = tmp_path / "models.md"
    assert command.main(["--out", str(out)]) == 0
    assert command.main(["--out", str(out), "--check"]) == 0
    out.write_text(out.read_text().replace("| 4 / 2 |", "| 4 / 4 |"))
    assert command.main(["--out", str(out), "--check"]) == 1
    assert "+| `LlamaForCausalLM`" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "LamaForCausalLM"], "did you mean 'LlamaForCausalLM'"),
        (["--check"], "--check needs the page"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err
