"""What ``kvpolicy draw`` draws with: each family, with the real class at a tiny size."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from support.tiny_image_models import EMU3_HEADER, chameleon, emu3, janus
from test_vqgan import RUNS, checkpoint_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

import kvpolicy
from kvpolicy.errors import AttentionError, ParameterError
from kvpolicy.lab.draw.image_model import ModelSource, Sampler
from kvpolicy.lab.draw.items import Item
from kvpolicy.lab.run.subject import Setting, layout_under
from kvpolicy_adapters.evaluation.drawing.chameleon import ChameleonImages
from kvpolicy_adapters.evaluation.drawing.checkpoint import open_checkpoint
from kvpolicy_adapters.evaluation.drawing.emu3 import Emu3Images
from kvpolicy_adapters.evaluation.drawing.fashion import FashionImages, FashionLPDImages
from kvpolicy_adapters.evaluation.drawing.janus import JanusImages
from kvpolicy_adapters.evaluation.drawing.llamagen import LlamaGenImages
from kvpolicy_adapters.evaluation.drawing.lpd import LPDImages
from kvpolicy_adapters.images.llamagen import LlamaGen, LlamaGenConfig
from kvpolicy_adapters.images.llamagen.captions import StoredCaptions, T5Captions, pad_left
from kvpolicy_adapters.images.lpd import LPD, LPDConfig
from kvpolicy_adapters.images.sampling import RowSampler
from kvpolicy_adapters.images.vqgan_checkpoint import read_vqgan

PROMPTS = ("a fox", "a red fox in the snow", "a red hat")


def items(*prompts):
    return [Item(f"{row}.png", row, 0, prompt) for row, prompt in enumerate(prompts)]


def setting(policy="linear", budget="1/2", decoder="sequential"):
    return Setting(kvpolicy.create(policy), budget, kvpolicy.Decoder.parse(decoder))


def words(text, **options):
    """A tokenizer of a dozen words."""
    ids = [5 + sum(map(ord, word)) % 7 for word in text.split()]
    return SimpleNamespace(input_ids=ids)


def agrees(model, wanted, *, budget):
    """Draw together and one by one: the same pictures, and the budget held in every cache."""
    for item in wanted:
        model.check(item, Sampler())
    together = model.draw(wanted, setting(budget=str(budget)), Sampler(), seed=3)
    assert together.images.dtype == np.uint8
    assert len({image.tobytes() for image in together.images}) == len(wanted)
    for stats in together.stats:
        assert min(stats.evictions) > 0
        assert set(stats.budgets) == {budget}
    alone = model.draw(wanted[1:2], setting(budget=str(budget)), Sampler(), seed=3)
    same_picture(alone.images[0], together.images[1])
    fast = setting(budget=str(budget), decoder="sjd:window=4")
    twice = [model.draw(wanted[:1], fast, Sampler(), seed=3) for _ in range(2)]
    assert (twice[0].images == twice[1].images).all()
    assert twice[0].images[0].shape == together.images[0].shape
    return together


def agrees_with_transformers(made, wanted, length):
    """The caches of transformers draw what our full one draws, and cost what they should."""
    full = setting("full", None)
    ours = made("kvpolicy").draw(wanted, full, Sampler(), seed=3)
    for kind in ("dynamic", "static"):
        model = made(kind)
        assert model.cache == kind
        drawn = model.draw(wanted, full, Sampler(), seed=3)
        for one, other in zip(ours.images, drawn.images, strict=True):
            same_picture(one, other)
        for stats, own in zip(drawn.stats, ours.stats, strict=True):
            assert (stats.seen, stats.peak_tokens) == (own.seen, own.peak_tokens)
            assert sum(stats.evictions) == 0
        # The last token is drawn and never fed: a static cache has room for it, too.
        seen = length - (kind == "dynamic")
        assert drawn.stats[0].bytes / ours.stats[0].bytes == pytest.approx(seen / length, abs=0.02)
        with pytest.raises(ParameterError, match=f"cache={kind}: .* evicts nothing.*, not linear"):
            model.draw(wanted, setting(), Sampler(), 0)
        with pytest.raises(ParameterError, match=f"cache={kind}: .* --decoder sequential, not sjd"):
            model.draw(wanted, setting("full", None, "sjd:window=4"), Sampler(), 0)
    with pytest.raises(ParameterError, match=r"'statik' is not served .* did you mean 'static'"):
        made("statik")


def same_picture(one, other):
    """The same codes; a decoder's sums may round otherwise in another batch, by one level."""
    apart = np.abs(one.astype(int) - other.astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.01


@pytest.fixture(scope="module")
def vqgan():
    return read_vqgan(checkpoint_of(RUNS[0]))


# --- LlamaGen ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamagen_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llamagen")
    torch.manual_seed(0)
    config = LlamaGenConfig(
        grid_size=16,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_classes=10,
    )
    state = LlamaGen(config).state_dict()
    state["output.weight"] = torch.randn_like(state["output.weight"])
    torch.save({"model": state}, folder / "c2i_tiny_256.pt")
    torch.save(checkpoint_of(RUNS[0]), folder / "vq.pt")
    return folder


def llamagen_source(folder, **changes):
    fields = {"options": (("heads", 4),), "vq": str(folder / "vq.pt")} | changes
    return ModelSource("llamagen", str(folder / "c2i_tiny_256.pt"), **fields)


def test_llamagen(llamagen_files):
    model = LlamaGenImages(llamagen_source(llamagen_files))
    wanted = [Item(f"{row}.png", row, 0) for row in (1, 2, 9)]
    drawn = agrees(model, wanted, budget=128)
    assert drawn.images.shape == (3, 32, 32, 3)
    other = model.draw(wanted[1:2], setting(), Sampler(), seed=4).images[0]
    assert np.abs(other.astype(int) - drawn.images[1]).max() > 50
    full = model.draw(wanted[:1], setting("full", None), Sampler(), seed=3)
    assert max(full.stats[0].evictions) == 0
    half = LlamaGenImages(llamagen_source(llamagen_files, options=(("heads", 4), ("size", 8))))
    assert half.draw(wanted[:1], setting(), Sampler(cfg=1.0), 0).images.shape == (1, 8, 8, 3)

    def made(cache):
        options = (("heads", 4), ("cache", cache))
        return LlamaGenImages(llamagen_source(llamagen_files, options=options))

    agrees_with_transformers(made, wanted[:1], 257)
    with pytest.raises(ParameterError, match="10 is not one of llamagen's 0 to 9"):
        model.check(Item("a.png", 10, 0), Sampler())
    with pytest.raises(ParameterError, match="--classes"):
        model.check(Item("a.png", 0, 0, "a fox"), Sampler())


def test_files_of_llamagen_that_do_not_go_together(llamagen_files, tmp_path):
    folder = llamagen_files
    with pytest.raises(ParameterError, match="--vq is missing"):
        LlamaGenImages(llamagen_source(folder, vq=None))
    with pytest.raises(ParameterError, match=r"c2i_tiny_256\.pt holds no VQGAN"):
        LlamaGenImages(llamagen_source(folder, vq=str(folder / "c2i_tiny_256.pt")))
    weights = checkpoint_of(RUNS[0])["model"]
    weights["quantize.embedding.weight"] = torch.randn(32, 4)
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ParameterError, match=r"32 codes, but .* draws 64"):
        LlamaGenImages(llamagen_source(folder, vq=str(tmp_path / "other.pt")))
    with pytest.raises(ParameterError, match="no option 'gird'; did you mean 'grid'"):
        LlamaGenImages(llamagen_source(folder, options=(("gird", 4),)))
    unnamed = tmp_path / "model.pt"
    unnamed.write_bytes((folder / "c2i_tiny_256.pt").read_bytes())
    with pytest.raises(ParameterError, match="grid=16"):
        LlamaGenImages(ModelSource("llamagen", str(unnamed), vq=str(folder / "vq.pt")))
    with pytest.raises(ParameterError, match="float32"):
        LlamaGenImages(llamagen_source(folder, dtype="float23"))


@pytest.fixture(scope="module")
def caption_files(tmp_path_factory):
    """A LlamaGen of captions, a T5 with a tokenizer of a few words, and what it makes of three."""
    folder = tmp_path_factory.mktemp("captions")
    torch.manual_seed(0)
    config = LlamaGenConfig(
        condition="t2i",
        caption_length=7,
        caption_size=16,
        grid_size=16,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = LlamaGen(config)
    torch.nn.init.normal_(model.output.weight, std=1.0)
    torch.save({"model": model.state_dict()}, folder / "t2i_tiny_256.pt")
    torch.save(checkpoint_of(RUNS[0]), folder / "vq.pt")
    known = ["<pad>", "</s>", "<unk>", *sorted({word for text in PROMPTS for word in text.split()})]
    words = Tokenizer(WordLevel({word: id for id, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    tokenizer.save_pretrained(folder / "t5")
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(known), d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    t5.save_pretrained(folder / "t5")
    (folder / "stored").mkdir()
    ready = T5Captions(str(folder / "t5"), size=16, longest=7, device="cpu", dtype=torch.float32)
    for row, prompt in enumerate(PROMPTS):
        shape = [1] if row == 1 else []  # as the authors' script writes it
        found = ready.embed(row, prompt).numpy()
        np.save(folder / "stored" / f"{row:05d}.npy", found.reshape(*shape, *found.shape))
    return folder


def caption_source(folder, *options, **changes):
    fields = {"options": (("heads", 4), *options), "vq": str(folder / "vq.pt")} | changes
    return ModelSource("llamagen", str(folder / "t2i_tiny_256.pt"), **fields)


def test_llamagen_of_captions(caption_files):
    model = LlamaGenImages(caption_source(caption_files, ("t5", str(caption_files / "t5"))))
    drawn = agrees(model, items(*PROMPTS), budget=128)
    assert drawn.images.shape == (3, 32, 32, 3)
    assert drawn.stats[0].peak_tokens[0] == 7 + 128
    stored = LlamaGenImages(
        caption_source(caption_files, ("captions", str(caption_files / "stored")))
    )
    half = setting(budget="128")
    same = stored.draw(items(*PROMPTS), half, Sampler(), seed=3)
    same_picture(same.images[1], drawn.images[1])
    loud = model.draw(items("A Fox "), half, Sampler(), seed=3)
    same_picture(loud.images[0], drawn.images[0])
    with pytest.raises(ParameterError, match="8 tokens long; the model takes captions of 7"):
        model.check(items("fox " * 7)[0], Sampler())
    with pytest.raises(ParameterError, match="prompts, not classes"):
        model.check(Item("a.png", 0, 0), Sampler())


def test_captions_are_padded_on_the_left():
    embeddings, mask = pad_left([torch.ones(2, 4), torch.full((3, 4), 2.0)], 3)
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert embeddings[..., 0].tolist() == [[0, 1, 1], [2, 2, 2]]


def test_captions_that_can_not_be_used(caption_files, tmp_path, llamagen_files):
    for options in ((), (("t5", "a"), ("captions", "b"))):
        with pytest.raises(ParameterError, match="t5=FOLDER"):
            LlamaGenImages(caption_source(caption_files, *options))
    with pytest.raises(ParameterError, match="draws classes; t5 is not wanted"):
        LlamaGenImages(llamagen_source(llamagen_files, options=(("heads", 4), ("t5", "a"))))
    with pytest.raises(ParameterError, match="no T5 could be opened"):
        LlamaGenImages(caption_source(caption_files, ("t5", str(tmp_path))))
    with pytest.raises(ParameterError, match="no such folder"):
        LlamaGenImages(caption_source(caption_files, ("captions", str(tmp_path / "none"))))
    with pytest.raises(ParameterError, match="embeddings of 16 numbers"):
        T5Captions(str(caption_files / "t5"), size=8, longest=7, device="cpu", dtype=torch.float32)
    stored = StoredCaptions(str(tmp_path), size=16, longest=7)
    with pytest.raises(ParameterError, match=r"00000\.npy is missing"):
        stored.check(0, "a fox")
    for wrong, said in (
        (np.zeros((3, 8), np.float32), r"float32 \[3, 8\]"),
        (np.zeros((8, 16), np.float32), "1 to 7 tokens"),
        (np.zeros((3, 16), np.int64), "expected floats"),
        (np.full((3, 16), np.nan, np.float32), "not finite"),
        (np.array([{}]), "no array of numpy"),
    ):
        np.save(tmp_path / "00000.npy", wrong)
        with pytest.raises(ParameterError, match=said):
            stored.check(0, "a fox")


# --- The families of transformers ------------------------------------------------------------


def test_janus():
    class Processor:
        def apply_chat_template(self, messages, add_generation_prompt):
            assert add_generation_prompt
            return messages[0]["content"][0]["text"]

        def __call__(self, text, generation_mode, return_tensors):
            assert generation_mode == "image"
            return {"input_ids": torch.tensor([[1, *words(text).input_ids, 3]])}

    images = JanusImages(janus(), Processor(), size=12)
    drawn = agrees(images, items(*PROMPTS), budget=32)
    assert drawn.images.shape == (3, 12, 12, 3)
    guided = images.draw(items("a fox"), setting(budget="32"), Sampler(cfg=1.0), 3).images
    assert (guided[0] != drawn.images[0]).any()  # guidance did something
    agrees_with_transformers(
        lambda cache: JanusImages(janus(), Processor(), size=12, cache=cache), items(*PROMPTS), 71
    )
    long = Item("a.png", 0, 0, "very " * 63)
    with pytest.raises(ParameterError, match="65 tokens long; the model has room for 64 before"):
        images.check(long, Sampler())
    with pytest.raises(ParameterError, match="--prompts"):
        images.check(Item("a.png", 0, 0), Sampler())


@pytest.mark.parametrize("pixels", [160, None], ids=["lumina-mgpt", "anole"])
def test_chameleon(pixels, vqgan):
    model = chameleon(sizes=pixels is not None)
    tokenizer = words
    tokenizer.bos_token_id = 0
    images = ChameleonImages(model, tokenizer, vqgan, pixels=pixels, size=16)
    drawn = agrees(images, items(*PROMPTS), budget=50)
    assert drawn.images.shape == (3, 16, 16, 3)
    assert len(drawn.stats) == (2 if pixels else 1)
    if pixels:
        agrees_with_transformers(
            lambda cache: ChameleonImages(
                model, tokenizer, vqgan, pixels=pixels, size=16, cache=cache
            ),
            items(*PROMPTS),
            119,
        )
        with pytest.raises(ParameterError, match="no token for this size"):
            ChameleonImages(model, tokenizer, vqgan, pixels=161)
    else:
        with pytest.raises(ParameterError, match="without guidance"):
            images.check(items("a fox")[0], Sampler(cfg=4.0))


def test_emu3():
    def processor(text, return_for_image_generation, return_tensors):
        assert return_for_image_generation
        ids = [1, *(15 for _ in text[0].split()), *EMU3_HEADER]
        return {"input_ids": torch.tensor([ids])}

    images = Emu3Images(emu3(), processor, size=24)
    drawn = agrees(images, items(*PROMPTS), budget=44)
    assert drawn.images.shape == (3, 24, 24, 3)
    assert len(drawn.stats) == 2


def test_a_checkpoint_of_something_else(tmp_path):
    from transformers import LlamaConfig

    with pytest.raises(ParameterError, match="no image model"):
        open_checkpoint(ModelSource("checkpoint", str(tmp_path / "nowhere")))
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ParameterError, match="type 'llama', which draws no images"):
        open_checkpoint(ModelSource("checkpoint", str(tmp_path)))


# --- fashion-ar --------------------------------------------------------------------------------


@pytest.mark.slow
def test_fashion_ar():
    model = FashionImages(ModelSource("fashion-ar"))
    wanted = [Item("a.png", 1, 0), Item("b.png", 0, 0, "bag"), Item("c.png", 1, 1)]
    drawn = model.draw(wanted, setting("linear", "1/6"), Sampler(), seed=0)
    assert drawn.images.shape == (3, 28, 28)
    assert max(drawn.stats[0].peak_tokens) == 131
    alone = model.draw(wanted[1:2], setting("linear", "1/6"), Sampler(), seed=0)
    assert (alone.images[0] == drawn.images[1]).all()
    pixels = torch.from_numpy(drawn.images // 17).long().flatten(1)
    seen = model._zoo.classify(pixels)  # which sees some trousers as a dress
    assert (seen == torch.tensor([1, 8, 1])).sum() >= 2
    with pytest.raises(ParameterError, match="knows no 'bga'; did you mean 'bag'"):
        model.check(Item("a.png", 0, 0, "bga"), Sampler())
    with pytest.raises(ParameterError, match="without guidance"):
        model.check(wanted[0], Sampler(cfg=2.0))
    with pytest.raises(ParameterError, match="vq="):
        FashionImages(ModelSource("fashion-ar", vq="vqgan.ckpt"))


def test_fashion_lpd():
    """In groups, with guidance; and row by row, each image with numbers of its own."""
    model = FashionLPDImages(ModelSource("fashion-lpd"))
    wanted = [Item("a.png", 1, 0), Item("b.png", 0, 0, "bag")]
    fast = setting("near", "1/4", "lpd:passes=12")
    drawn = [model.draw(wanted, fast, Sampler(cfg=cfg), seed=0) for cfg in (None, 1.0, 3.0)]
    assert drawn[0].images.shape == (2, 28, 28)
    assert set(drawn[0].stats[0].peak_tokens) == {197}
    assert (drawn[0].images == drawn[1].images).all()
    assert (drawn[0].images != drawn[2].images).any()
    assert set(drawn[2].stats[0].peak_tokens) == {197}
    model.check(wanted[0], Sampler(cfg=3.0))
    with pytest.raises(ParameterError, match="fashion-lpd knows no 'bga'; did you mean 'bag'"):
        model.check(Item("a.png", 0, 0, "bga"), Sampler())
    with pytest.raises(ParameterError, match=r"decoder 'sjd' asks for what comes behind"):
        layout_under(model, kvpolicy.Decoder.parse("sjd"))
    with pytest.raises(ParameterError, match="fashion-lpd ships with its weights; vq="):
        FashionLPDImages(ModelSource("fashion-lpd", vq="vqgan.ckpt"))


# --- LPD ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lpd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lpd")
    torch.manual_seed(0)
    config = LPDConfig(
        grid_size=16,
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_classes=10,
    )
    state = LPD(config).state_dict()
    state["head.weight"] = torch.randn_like(state["head.weight"])
    state["class_emb.weight"] *= 50  # so that it matters whether there is a class
    torch.save({"model": state, "epoch": 3}, folder / "lpd_tiny_256.pth")
    torch.save(checkpoint_of(RUNS[0]), folder / "vq.pt")
    return folder


def lpd_source(folder, *options, **changes):
    fields = {"options": (("heads", 4), *options), "vq": str(folder / "vq.pt")} | changes
    return ModelSource("lpd", str(folder / "lpd_tiny_256.pth"), **fields)


def test_lpd(lpd_files):
    model = LPDImages(lpd_source(lpd_files))
    wanted = [Item(f"{row}.png", row, 0) for row in (1, 2, 9)]
    fast = setting("near", "1/4", "lpd:passes=20")
    drawn = model.draw(wanted, fast, Sampler(cfg=400.0), seed=3)
    assert drawn.images.shape == (3, 32, 32, 3)
    assert set(drawn.stats[0].peak_tokens) == {65}
    assert (drawn.images == model.draw(wanted, fast, Sampler(cfg=400.0), seed=3).images).all()
    without = model.draw(wanted, fast, Sampler(), seed=3).images
    flat = LPDImages(lpd_source(lpd_files, ("schedule", "constant")))
    constant = flat.draw(wanted, fast, Sampler(cfg=400.0), seed=3).images
    assert len({images.tobytes() for images in (drawn.images, without, constant)}) == 3
    assert layout_under(model, fast.decoder) == fast.decoder.ordered(model.layout)
    with pytest.raises(ParameterError, match=r"LPD draws in groups.*lpd:passes=20"):
        layout_under(model, kvpolicy.Sequential())
    with pytest.raises(ParameterError, match="10 is not one of lpd's 0 to 9"):
        model.check(Item("a.png", 10, 0), Sampler())


def test_files_of_lpd_that_do_not_go_together(lpd_files, tmp_path):
    for words, source in (
        ("say which checkpoint", ModelSource("lpd", vq="vq.pt")),
        ("--vq is missing", lpd_source(lpd_files, vq=None)),
        ("neither linear nor constant", lpd_source(lpd_files, ("schedule", "cosine"))),
        ("no option 'grid'", lpd_source(lpd_files, ("grid", 16))),
    ):
        with pytest.raises(ParameterError, match=words):
            LPDImages(source)
    weights = torch.load(lpd_files / "lpd_tiny_256.pth", weights_only=True)["model"]
    weights |= {name: weights[name][:40] for name in ("head.weight", "token_emb.weight")}
    torch.save(weights, tmp_path / "lpd_tiny_256.pth")
    source = lpd_source(tmp_path, vq=str(lpd_files / "vq.pt"))
    with pytest.raises(ParameterError, match=r"has 64 codes, but .* draws 40"):
        LPDImages(source)


# --- The sampler -------------------------------------------------------------------------------


def test_tokens_are_drawn_with_their_probabilities():
    chances = (torch.arange(1000, dtype=torch.float64)[:, None] + 0.5) / 1000
    logits = torch.tensor([0.1, 0.0, 0.2, 0.7]).log().expand(1000, 4)
    scores = RowSampler(chances)(torch.zeros(1000, 1), logits)
    assert torch.isinf(scores).sum(1).eq(3).all()
    assert scores.argmax(1).bincount(minlength=4).tolist() == [100, 0, 200, 700]
    limited = RowSampler(chances, kvpolicy.Sampling(top_k=2))(torch.zeros(1000, 1), logits).argmax(
        1
    )
    assert limited.bincount(minlength=4).tolist() == [0, 0, 222, 778]
    likeliest = RowSampler(chances, kvpolicy.Sampling(temperature=0))(
        torch.zeros(1000, 1), logits
    ).argmax(1)
    assert likeliest.unique().tolist() == [3]
    almost = torch.full((1, 1), 1 - 2.0**-48, dtype=torch.float64)
    last = RowSampler(almost)(torch.zeros(1, 1), torch.tensor([[1.0, 2.0, -torch.inf]]))
    assert last.argmax(1).item() == 1


def test_a_sampler_is_for_one_generation_of_its_rows():
    sampler = RowSampler(torch.zeros(2, 1, dtype=torch.float64))
    with pytest.raises(ParameterError, match="3 rows"):
        sampler(torch.zeros(3, 1), torch.zeros(3, 4))
    sampler(torch.zeros(2, 1), torch.zeros(2, 4))
    with pytest.raises(ParameterError, match="token 1"):
        sampler(torch.zeros(2, 1), torch.zeros(2, 4))
    with pytest.raises(AttentionError, match="NaN"):
        RowSampler(torch.zeros(1, 1))(torch.zeros(1, 1), torch.full((1, 4), torch.nan))
