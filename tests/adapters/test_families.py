"""attach recognises families by itself, and reads where their images are."""

from __future__ import annotations

import threading
import types
from importlib.metadata import EntryPoint

import pytest
import torch
from support.image_loop import linear, sharpen

import kvpolicy
from kvpolicy import registry
from kvpolicy_adapters import attach
from kvpolicy_adapters.images import families
from kvpolicy_adapters.images.families import FAMILIES, layout_of
from kvpolicy_adapters.images.token_reader import TokenReader
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

GRID = kvpolicy.RasterLayout(rows=2, cols=3, line_break=1, suffix=1)
OPEN, WIDE = 90, 91


class Opens:
    """A header of one token."""

    def grid(self, text):
        if text[-1] == WIDE:
            return GRID.model_copy(update={"cols": 5}), 0
        return (GRID, 0) if text[-1] == OPEN else None


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    sharpen(model)
    return model


def of_config(config) -> types.SimpleNamespace:
    """What stands for a model that is too large to make here."""
    return types.SimpleNamespace(config=config)


# -- which family ----------------------------------------------------------------------------------


def test_text_is_what_is_left():
    gpt = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    for model in (llama(), transformers.GPT2LMHeadModel(gpt)):
        assert layout_of(model) == kvpolicy.TextLayout()


def test_released_configurations():
    janus = layout_of(of_config(transformers.JanusConfig()))
    assert janus == kvpolicy.AfterPrompt(kvpolicy.RasterLayout(rows=24, cols=24))
    names = {"<eoss>": 8196, "<racm3:break>": 8197, "IMGIMGAZ": 4}
    names |= {f"<reserved{n:05d}>": n + 4 for n in range(8799, 8900)}
    chameleon = of_config(transformers.ChameleonConfig(vocabulary_map=names))
    reader = layout_of(chameleon)
    reader.told(0, torch.tensor([[1, 8197, 4]]))
    anole = kvpolicy.RasterLayout(rows=32, cols=32, prefix=2, suffix=1)
    assert reader.at(0, 3, None) == anole
    # 768 x 768 pixels are 24 x 24 patches: 48 lines of 48 tokens and a line break.
    reader = layout_of(chameleon)
    reader.told(0, torch.tensor([[1, 8197, 8804 + 24, 8804 + 24]]))
    lumina = kvpolicy.RasterLayout(rows=48, cols=48, line_break=1, prefix=4, suffix=2)
    assert reader.at(0, 4, None) == lumina
    emu = {"<|image start|>": 10, "<|image token|>": 11, "9": 1, "0": 2, "*": 3}
    reader = layout_of(of_config(transformers.Emu3Config(vocabulary_map=emu)))
    reader.told(0, torch.tensor([[7, 10, 1, 2, 3, 1, 2, 11]]))
    size = kvpolicy.RasterLayout(rows=90, cols=90, line_break=1, prefix=8, suffix=3)
    assert reader.at(0, 8, None) == size


def test_each_attached_cache_has_a_reader_of_its_own():
    names = {"<eoss>": 2, "<racm3:break>": 3}
    model = of_config(transformers.ChameleonConfig(vocabulary_map=names))
    assert layout_of(model) is not layout_of(model)


def test_names_are_listed_and_near_matches_told():
    assert {"chameleon", "emu3", "janus"} <= set(FAMILIES.names())
    with pytest.raises(kvpolicy.UnknownNameError, match="did you mean 'janus'"):
        FAMILIES.get("jannus")


class Strips:
    """A family of another package: every Llama draws strips."""

    def recognises(self, model):
        return model.config.model_type == "llama"

    def layout(self, model):
        return TokenReader(Opens())


class Grabs(Strips):
    """A family that takes every model for one of its own."""

    def recognises(self, model):
        return True


@pytest.fixture
def others(monkeypatch):
    """Give entry points of other packages for the length of a test."""

    def give(**points: str) -> None:
        listed = [EntryPoint(name, value, FAMILIES.group) for name, value in points.items()]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: listed if group == FAMILIES.group else []
        )
        monkeypatch.setattr(FAMILIES, "_items", dict(FAMILIES._items))
        monkeypatch.setattr(families, "STRIPS", Strips(), raising=False)
        monkeypatch.setattr(families, "GRABS", Grabs(), raising=False)

    return give


def test_another_package_joins_through_its_entry_point(others):
    others(strips="kvpolicy_adapters.images.families:STRIPS")
    tokens = torch.tensor([[1, 2, OPEN, 5, 6, 7, 8, 9, 10, 11, 12, 13]])
    model = llama()
    with torch.inference_mode(), attach(model, policy="h2o", budget=4) as cache:
        for token in tokens.split(1, dim=1):
            model(token, **as_argument(cache))
    assert cache.policy_cache.layout == GRID.model_copy(update={"prefix": 3})
    assert cache.stats().peak_tokens == (7, 7)


def test_a_package_that_cannot_be_loaded_is_passed_over_with_a_warning(others):
    others(broken="no_such_package:FAMILY", strips="kvpolicy_adapters.images.families:STRIPS")
    with pytest.warns(RuntimeWarning, match=r"'broken'.*can't be loaded.*passed over"):
        assert isinstance(layout_of(llama()), TokenReader)


def test_shipped_families_are_asked_first(others):
    others(aaa="kvpolicy_adapters.images.families:GRABS")
    assert isinstance(layout_of(llama()), TokenReader)
    config = transformers.JanusConfig()
    assert isinstance(layout_of(of_config(config)), kvpolicy.AfterPrompt)


# -- reading ---------------------------------------------------------------------------------------


def drive(model, cache, tokens, sizes=None):
    parts = tokens.split(sizes or 1, dim=1)
    return torch.cat([model(part, **as_argument(cache)).logits for part in parts], dim=1)


IMAGE = [11, 12, 13, 14, 15, 16, 17, 18]
ONE = torch.tensor([[1, 2, 3, OPEN, *IMAGE, 19]])
TWO = torch.tensor([[1, 2, 3, OPEN, *IMAGE, 19, 4, 5, WIDE, *IMAGE, 21, 22, 23, 24, 19, 6]])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], None),
        ([1, 2, OPEN], (3, 3)),
        ([1, 2, OPEN, 11, 12], (3, 3)),
        ([1, OPEN, *IMAGE], (2, 3)),
        ([1, OPEN, *IMAGE, 19], (2, 3)),
        ([1, OPEN, *IMAGE, 19, 4], None),  # text follows: that image belongs to the prompt
        ([1, OPEN, *IMAGE, 19, 4, OPEN], (13, 3)),
        ([1, OPEN, *IMAGE, WIDE, 4], (11, 5)),
        ([OPEN, *IMAGE[:7], OPEN], (1, 3)),  # a token of an image opens none
    ],
)
def test_what_a_prompt_says(tokens, expected):
    reader = TokenReader(Opens())
    reader.told(0, torch.tensor([tokens] * 2))
    layout = reader.at(0, len(tokens), None)
    if expected is None:
        assert layout is None
    else:
        prefix, cols = expected
        assert layout == GRID.model_copy(update={"prefix": prefix, "cols": cols})


def test_a_sequence_that_goes_on_is_told_piece_by_piece():
    reader = TokenReader(Opens())
    bound, layouts = None, []
    for seen, token in enumerate(TWO[0]):
        reader.told(seen, token.view(1, 1))
        reader.told(seen, token.view(1, 1))  # as the model inside the model does
        bound = reader.at(seen, 1, bound)
        layouts.append(bound)
    first = GRID.model_copy(update={"prefix": 4})
    text = kvpolicy.SequenceLayout(prefix=4, pieces=((4, 4),))
    further = kvpolicy.SequenceLayout(prefix=4, pieces=((4, 4), (16, 6)))
    assert layouts == [None] * 3 + [first] * 10 + [text] * 2 + [further] * 15


@pytest.mark.parametrize("gap", [2, 5])
def test_tokens_that_are_left_out_are_noticed(gap):
    reader = TokenReader(Opens())
    reader.told(0, torch.tensor([[1, 2, 3]]))
    with pytest.raises(kvpolicy.LayoutError, match=f"position 3, but position {gap} was told"):
        reader.told(gap, torch.tensor([[1]]))


def test_tokens_inside_an_image_are_not_looked_at():
    """Reading a token waits for the device; there is nothing to read between size and end."""

    class Closed:
        ndim, shape = 2, (1, 1)

        def __getitem__(self, index):
            raise AssertionError("looked at a token of an image")

    reader = TokenReader(Opens())
    reader.told(0, ONE[:, :4])
    for seen in range(4, 12):
        reader.told(seen, Closed())
    with pytest.raises(AssertionError, match="looked at"):
        reader.told(12, Closed())


def test_a_header_sees_the_text_since_the_image_before():
    texts = []

    class Listens(Opens):
        def grid(self, text):
            texts.append(list(text))
            return super().grid(text)

    reader = TokenReader(Listens())
    reader.told(0, torch.tensor([[1, OPEN, *IMAGE, 19, 4]]))
    assert texts == [[1], [1, OPEN], [19], [19, 4]]


def test_beams_and_batches_that_are_selected_from():
    reader = TokenReader(Opens())
    reader.told(0, torch.tensor([[1, 2], [1, 3]]))
    reader.told(2, torch.tensor([[OPEN]] * 5))
    assert reader.at(2, 1, None) == GRID.model_copy(update={"prefix": 3})


# -- in the block ----------------------------------------------------------------------------------


@pytest.fixture
def strips(others):
    others(strips="kvpolicy_adapters.images.families:STRIPS")
    return llama()


def hooks(model) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_nothing_is_left_on_the_model(strips):
    assert hooks(strips) == 0
    with attach(strips, policy="h2o", budget=4), attach(strips, policy="h2o", budget=4):
        assert hooks(strips) > 0
    assert hooks(strips) == 0
    with (
        pytest.raises(RuntimeError, match="boom"),
        attach(strips, policy="h2o", budget=4),
    ):
        raise RuntimeError("boom")
    assert hooks(strips) == 0
    with attach(strips, policy="h2o", budget=4, layout=kvpolicy.TextLayout()):
        assert hooks(strips) == 0, "a layout that reads no tokens needs no hook"


def test_the_model_inside_may_be_called_by_itself(strips):
    with torch.inference_mode(), attach(strips, policy="h2o", budget=4) as cache:
        for token in ONE.split(1, dim=1):
            strips.model(token, **as_argument(cache))
    assert cache.policy_cache.layout == GRID.model_copy(update={"prefix": 4})


def test_ids_may_come_by_name_or_by_place(strips):
    with torch.inference_mode(), attach(strips, policy="h2o", budget=4) as cache:
        strips(input_ids=ONE[:, :5], **as_argument(cache))
        strips(ONE[:, 5:], **as_argument(cache))
    assert cache.policy_cache.layout == GRID.model_copy(update={"prefix": 4})


def test_calls_without_the_cache_tell_it_nothing(strips):
    with torch.inference_mode(), attach(strips, policy="h2o", budget=4) as cache:
        drive(strips, cache, ONE[:, :4])
        strips(TWO)
        strips(TWO[:, :3], **as_argument(transformers.DynamicCache()))
        drive(strips, cache, ONE[:, 4:])
    assert cache.policy_cache.layout == GRID.model_copy(update={"prefix": 4})


def test_a_cache_that_is_reset_reads_anew(strips):
    with torch.inference_mode(), attach(strips, policy="h2o", budget=4) as cache:
        drive(strips, cache, TWO)
        cache.reset()
        drive(strips, cache, ONE[:, 2:])
    assert cache.policy_cache.layout == GRID.model_copy(update={"prefix": 2})


def test_two_threads_with_two_grids_on_one_model(strips):
    jobs = {"linear": (TWO, 13), "h2o": (ONE, 5), "streaming_llm": (TWO[:, 2:], 7)}

    def score(name):
        tokens, budget = jobs[name]
        policy = linear(1) if name == "linear" else name
        with torch.inference_mode(), attach(strips, policy=policy, budget=budget) as cache:
            return drive(strips, cache, tokens), cache.policy_cache.layout

    alone = {name: score(name) for name in jobs}
    together: dict[str, tuple] = {}
    threads = [
        threading.Thread(target=lambda name=name: together.update({name: score(name)}))
        for name in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together.keys() == alone.keys()
    for name, (logits, layout) in alone.items():
        assert torch.equal(together[name][0], logits), name
        assert together[name][1] == layout
    assert hooks(strips) == 0
