"""The sweep over transformers' architectures, and the page that it writes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

from kvpolicy_adapters.evaluation.sweep import __main__ as command  # noqa: E402
from kvpolicy_adapters.evaluation.sweep.examine import Finding, examine  # noqa: E402
from kvpolicy_adapters.evaluation.sweep.inputs import made_for  # noqa: E402
from kvpolicy_adapters.evaluation.sweep.page import page, row  # noqa: E402
from kvpolicy_adapters.evaluation.sweep.tiny import (  # noqa: E402
    LAYERS,
    VOCAB,
    WINDOW,
    architectures,
    build,
    shrink,
)
from kvpolicy_adapters.transformers import attention, versions  # noqa: E402
from kvpolicy_adapters.transformers import cache as transformers_cache  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs"
#: By the version of transformers that they are of: the newest that was tested, and the lowest.
PAGES = {
    re.search(r"transformers ([\d.]+)", page.read_text(encoding="utf-8"))[1]: page
    for page in (DOCS / "models.md", DOCS / "models-5.17.md")
}
PAGE = PAGES.get(transformers.__version__)
ARCHITECTURES = architectures()


@pytest.mark.skipif(
    PAGE is None,
    reason=f"there are pages of transformers {' and '.join(PAGES)}, whose architectures differ",
)
class TestThePage:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_says_what_is_found(self, name):
        """One by one, so that several processes share them."""
        text = PAGE.read_text(encoding="utf-8")
        finding = examine(name, ARCHITECTURES[name])
        line = row(finding)
        assert line in text
        before = text.partition(line)[0]
        assert ("## What has nothing" in before) is not finding.passes
        assert ("## What is not served" in before) is not (finding.passes or finding.by_design)

    def test_has_a_row_for_every_architecture_and_no_other(self):
        rows = re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
        assert sorted(rows) == sorted(ARCHITECTURES)

    def test_counts_what_passes_which_is_much(self):
        text = PAGE.read_text(encoding="utf-8")
        passing = len(re.findall(r"^\| `", text.partition("## What has nothing")[0], re.MULTILINE))
        assert f"**{passing} of {len(ARCHITECTURES)} architectures pass**" in text
        assert passing >= (140 if PAGE.name == "models.md" else 120)

    def test_every_failure_has_a_reason_in_words(self):
        reasons = PAGE.read_text(encoding="utf-8").partition("## What has nothing")[2]
        for line in re.findall(r"^\| `.*", reasons, re.MULTILINE):
            assert len(line.split(" | ")[2]) > 20, line


def test_the_pages_are_of_the_lowest_and_of_the_newest_that_was_tested():
    lowest = re.search(r"transformers>=([\d.]+)", (DOCS.parent / "pyproject.toml").read_text())[1]
    assert set(PAGES) == {f"{lowest}.0", versions.NEWEST_TESTED}


def test_a_family_is_given_what_it_is_made_for():
    """An image whose tokens see each other changes what comes behind it."""
    model = build("Gemma3ForConditionalGeneration")
    words, ids, extra = made_for(model, torch.full((2, 14), 5))
    assert words == "ids, an image that sees itself"
    with torch.inference_mode():
        sees = model(ids, **extra).logits
        extra["token_type_ids"] = torch.zeros_like(ids)
        assert (model(ids, **extra).logits - sees).abs().max() > 0.01
    assert made_for(build("BertLMHeadModel"), ids)[0] == "ids, token types"
    assert made_for(build("LlamaForCausalLM"), ids)[0] == "ids"


def test_a_prefix_mask_that_is_not_the_users_fails(monkeypatch):
    whole = attention.policy_attention

    def causal(module, query, key, value, mask, **kwargs):
        if mask is not None and mask.dtype != torch.bool:
            mask = None
        return whole(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(sys.modules["kvpolicy_adapters.attach"], "policy_attention", causal)
    assert "a prefix that sees itself" in examine("LlamaForCausalLM", ("llama",)).reason


def test_a_broken_attention_fails(monkeypatch):
    """The sweep sees a cache that hides a token from its queries."""
    whole = attention.policy_attention

    def forgets(module, query, key, value, mask, **kwargs):
        output, weights = whole(module, query, key, value, mask, **kwargs)
        return output * 0.9, weights

    # The function of this name hides its module.
    monkeypatch.setattr(sys.modules["kvpolicy_adapters.attach"], "policy_attention", forgets)
    finding = examine("LlamaForCausalLM", ("llama",))
    assert not finding.passes
    assert finding.reason == "other logits than with its own cache"


def test_a_budget_that_does_not_hold_fails(monkeypatch):
    held = transformers_cache.TransformersCache.positions

    def more(self, layer):
        return torch.cat([held(self, layer)] * 2, dim=-1)

    monkeypatch.setattr(transformers_cache.TransformersCache, "positions", more)
    assert "held 16 tokens with a budget of 8" in examine("LlamaForCausalLM", ("llama",)).reason


def test_models_are_tiny_and_the_same_each_time():
    first, second = build("LlamaForCausalLM"), build("LlamaForCausalLM")
    assert sum(weight.numel() for weight in first.parameters()) < 1e5
    for mine, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_tiny_configuration_groups_heads_and_keeps_small_values():
    config = shrink(transformers.LlamaConfig)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, LAYERS, VOCAB)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert shrink(transformers.MambaConfig).conv_kernel == transformers.MambaConfig().conv_kernel
    assert shrink(transformers.BertConfig).is_decoder
    assert shrink(transformers.Gemma3Config).text_config.hidden_size == 32


def test_every_kind_of_layer_stays():
    kinds = set(transformers.Gemma3TextConfig().layer_types)
    tiny = shrink(transformers.Gemma3TextConfig)
    assert len(tiny.layer_types) == tiny.num_hidden_layers == LAYERS
    assert set(tiny.layer_types) == kinds == {"sliding_attention", "full_attention"}
    assert (tiny.sliding_window, tiny.num_key_value_heads) == (WINDOW, 2)
    assert shrink(transformers.Gemma3TextConfig, 80).sliding_window == 80
    assert shrink(transformers.MixtralConfig, 80).sliding_window == 80  # where it is left open, too


def test_what_one_configuration_wants_besides_is_given():
    tiny = shrink(transformers.BambaConfig)
    assert tiny.mamba_n_heads * tiny.mamba_d_head == tiny.mamba_expand * tiny.hidden_size


def test_layers_that_are_all_windows_are_examined_under_the_policy(monkeypatch):
    """A budget that holds the text leaves them alone: being lossless then would say nothing."""
    whole = attention.policy_attention
    calls = []

    def counts(module, query, key, *args, **kwargs):
        calls.append(module.config.sliding_window)
        output, weights = whole(module, query, key, *args, **kwargs)
        return (output * 0.9 if calls[-1] > WINDOW else output), weights

    monkeypatch.setattr(sys.modules["kvpolicy_adapters.attach"], "policy_attention", counts)
    finding = examine("MistralForCausalLM", ("mistral",))
    assert finding.reason == "other logits than with its own cache"
    assert min(calls) > WINDOW


def test_padding_that_is_seen_fails(monkeypatch):
    whole = attention.policy_attention

    def sees_all(module, query, key, value, mask, **kwargs):
        return whole(module, query, key, value, None, **kwargs)

    monkeypatch.setattr(sys.modules["kvpolicy_adapters.attach"], "policy_attention", sees_all)
    assert "left-padded" in examine("LlamaForCausalLM", ("llama",)).reason


@pytest.mark.parametrize(
    ("name", "by_design"),
    [
        ("DeepseekV3ForCausalLM", True),  # latents
        ("Dots3NoteForCausalLM", True),  # latents, of another size in each layer
        ("MambaForCausalLM", True),  # a state
        ("RoFormerForCausalLM", False),  # keys and values, in attention that can't be watched
        ("Qwen4ExpForCausalLM", False),  # an index beside keys and values
        ("MiniMaxForCausalLM", False),  # keys and values, in a cache class of its own
    ],
)
def test_what_has_nothing_to_evict_is_told_from_what_is_not_served_yet(name, by_design):
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    finding = examine(name, (name,))
    assert (finding.passes, finding.by_design) == (False, by_design)
    assert name not in finding.reason.split(";")[0]
    assert "fails under a policy" not in finding.reason, "attach must refuse it itself"


def test_a_model_that_can_not_be_built_says_so_without_paths(monkeypatch):
    def fails(name):
        raise ValueError("no such size in /home/somebody/models/thing.py\nat all")

    monkeypatch.setattr(sys.modules["kvpolicy_adapters.evaluation.sweep.examine"], "build", fails)
    finding = examine("LlamaForCausalLM", ("llama",))
    assert finding.reason == "can't be built tiny here (ValueError: no such size in ... at all)"


def test_a_hostile_reason_stays_in_its_cell():
    line = row(Finding("X", ("a|b",), reason="no | <script>`x`</script> [y](z)\n| new row"))
    assert line.count(" | ") == 2
    assert "<script>" not in line
    assert "`x`" not in line
    assert "](" not in line.replace("\\[y](", "")
    assert "\n" not in line


def test_rows_are_sorted_and_none_is_lost():
    findings = [Finding(name, (name,), "ids", "4 / 2", "every token") for name in ("B", "a", "C")]
    findings += [Finding("z", ("z",), reason="no"), Finding("Y", ("Y",), reason="no")]
    findings += [Finding("x", ("x",), reason="no", by_design=True)]
    names = re.findall(r"^\| `(\w+)`", page(findings), re.MULTILINE)
    assert names == ["a", "B", "C", "x", "Y", "z"]
    assert "**3 of 6 architectures pass**; 1 have nothing to evict" in page(findings)


def test_check_tells_a_changed_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "architectures", lambda: {"LlamaForCausalLM": ("llama",)})
    out = tmp_path / "models.md"
    assert command.main(["--out", str(out)]) == 0
    assert command.main(["--out", str(out), "--check"]) == 0
    out.write_text(out.read_text().replace("| 4 / 2 |", "| 4 / 4 |"))
    assert command.main(["--out", str(out), "--check"]) == 1
    assert "+| `LlamaForCausalLM`" in capsys.readouterr().out
    assert "| 4 / 4 |" in out.read_text()  # it writes nothing
    out.write_text(out.read_text().replace(transformers.__version__, "4.0.0"))
    with pytest.raises(SystemExit):
        command.main(["--out", str(out), "--check"])
    assert "was not made with torch" in capsys.readouterr().err


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
