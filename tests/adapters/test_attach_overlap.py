"""Several attach blocks at once: nested, overlapping, in threads, on models that share a part."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from support import tiny_models

import kvpolicy
import kvpolicy_adapters
from kvpolicy_adapters.transformers.cache_argument import as_argument

transformers = pytest.importorskip("transformers", reason="the adapters need transformers")

IMAGE = kvpolicy.RasterLayout(rows=6, cols=5, prefix=3)
TEXT = kvpolicy.TextLayout(sinks=1)
#: Budget, layout, and how to generate.
JOBS = {
    "linear": (14, IMAGE, {}),
    "h2o": (9, TEXT, {"num_beams": 3}),
    "random": (11, TEXT, {}),
    "snapkv": (8, IMAGE, {}),
}


def tokens() -> torch.Tensor:
    return torch.tensor([[5, 9, 2], [7, 1, 30]])


def generate(model, cache=None, **options):
    return model.generate(
        tokens(),
        attention_mask=torch.ones(2, 3, dtype=torch.long),
        **as_argument(cache),
        max_new_tokens=28,
        do_sample=False,
        **options,
    )


def block(model, name):
    budget, layout, _ = JOBS[name]
    policy = tiny_models.policy(name)
    return kvpolicy_adapters.attach(model, policy=policy, budget=budget, layout=layout)


def implementations(*models) -> set[str]:
    return {model.config._attn_implementation for model in models}


def in_threads(*jobs) -> None:
    """Run all jobs at once, each twice over, and raise what one of them raised."""
    failed = []
    start = threading.Barrier(len(jobs))

    def work(job):
        try:
            start.wait()
            for _ in range(2):
                job()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def test_threads_with_caches_of_one_model_and_one_without():
    """Blocks are opened by one thread and used by others; an unattached call runs between them."""
    model = tiny_models.llama()
    plain = generate(model)
    alone = {}
    for name in JOBS:
        with block(model, name) as cache:
            alone[name] = (generate(model, cache, **JOBS[name][2]), cache.stats())
        assert min(cache.stats().evictions) > 0
    together = {}
    with ExitStack() as blocks:
        caches = {name: blocks.enter_context(block(model, name)) for name in JOBS}

        def draw(name):
            caches[name].reset()
            drawn = generate(model, caches[name], **JOBS[name][2])
            together[name] = (drawn, caches[name].stats())

        def draw_without():
            assert torch.equal(generate(model), plain)

        in_threads(draw_without, *(lambda name=name: draw(name) for name in JOBS))
    for name in JOBS:
        assert torch.equal(together[name][0], alone[name][0]), name
        assert together[name][1] == alone[name][1]
    assert implementations(model) == {"sdpa"}


def test_threads_that_open_and_close_blocks_on_models_with_one_configuration():
    first = tiny_models.llama()
    second = transformers.LlamaForCausalLM(first.config).eval()
    assert second.config is first.config
    second.load_state_dict(tiny_models.llama(seed=2).state_dict())
    models = (first, second)
    plain = [generate(model) for model in models]
    alone = {}
    for at, name in enumerate(JOBS):
        with block(models[at % 2], name) as cache:
            alone[name] = generate(models[at % 2], cache, **JOBS[name][2])

    def draw(at, name):
        with block(models[at % 2], name) as cache:
            assert torch.equal(generate(models[at % 2], cache, **JOBS[name][2]), alone[name]), name

    def draw_without():
        assert [torch.equal(*pair) for pair in zip(map(generate, models), plain, strict=True)] == [
            True,
            True,
        ]

    in_threads(
        draw_without, *(lambda at=at, name=name: draw(at, name) for at, name in enumerate(JOBS))
    )
    assert implementations(*models) == {"sdpa"}


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("close_first", [0, 1], ids=["overlapping", "nested"])
@pytest.mark.parametrize("second", ["the same", "its inside", "shares its configuration"])
def test_blocks_may_end_in_any_order(second, close_first, before):
    model = tiny_models.llama(attn_implementation=before)
    others = {
        "the same": lambda: model,
        "its inside": lambda: model.model,
        "shares its configuration": lambda: transformers.LlamaForCausalLM(model.config).eval(),
    }
    other = others[second]()
    logits = {}
    with torch.inference_mode():
        plain = model(tokens()).logits
        with block(model, "h2o") as cache:
            logits = model(tokens().repeat(1, 5), **as_argument(cache)).logits
        stacks = [ExitStack(), ExitStack()]
        caches = [stacks[0].enter_context(block(model, "h2o"))]
        caches.append(stacks[1].enter_context(block(other, "linear")))
        assert torch.equal(model(tokens()).logits, plain)
        stacks[close_first].close()
        if close_first == 0:
            assert other(tokens(), **as_argument(caches[1])) is not None
            assert caches[1].get_seq_length() == 3
            assert torch.equal(model(tokens()).logits, plain)
        else:
            again = model(tokens().repeat(1, 5), **as_argument(caches[0])).logits
            assert torch.equal(again, logits)
        assert implementations(model, other) == {"kvpolicy"}
        stacks[1 - close_first].close()
        assert torch.equal(model(tokens()).logits, plain)
    assert implementations(model, other) == {before}


def test_a_failed_attach_changes_nothing():
    model = tiny_models.llama(attn_implementation="eager")
    with (
        pytest.raises(kvpolicy.BudgetError, match="smallest budget that works is 13"),
        kvpolicy_adapters.attach(
            model, policy=tiny_models.policy("linear"), budget=12, layout=IMAGE
        ),
    ):
        pass
    assert implementations(model) == {"eager"}
