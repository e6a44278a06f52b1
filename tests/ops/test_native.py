"""The CPU kernel, built for this machine: what it computes, when it is used, what can go wrong."""

import json
import os
import re
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_library import forget, needs_compiler, uses
from support.processes import run_code
from typer.testing import CliRunner

import kvpolicy
from kvpolicy.cli import app
from kvpolicy.ops.cpu import build as building
from kvpolicy.ops.cpu import native, trial
from kvpolicy.ops.cpu.build import build
from kvpolicy.testing import check_policy

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def calls(kernel, monkeypatch):
    """How often caches use it."""
    seen = []

    def counted(*arguments):
        seen.append(arguments)
        return kernel(*arguments)

    monkeypatch.setattr(native, "decoder", lambda dtype: counted)
    return seen


def reference(query, keys, values, scale):
    """Softmax attention in float64, and its mass."""
    batch, query_heads, _, dim = query.shape
    heads = keys.shape[1]
    asked = query.double().reshape(batch, heads, query_heads // heads, dim)
    weights = (asked @ keys.double().transpose(2, 3) * scale).softmax(-1)
    return (weights @ values.double()).view(batch, query_heads, 1, -1), weights.mean(
        2, keepdim=True
    )


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    slots=st.integers(1, 70),
    spare=st.integers(0, 5),
    dims=st.sampled_from([(1, 1), (8, 8), (40, 40), (64, 64), (128, 128), (24, 16), (256, 256)]),
    dtype=st.sampled_from(list(DTYPES)),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    data=st.data(),
)
def test_it_writes_and_attends(
    operators, seed, batch, heads, group, slots, spare, dims, dtype, spread, data
):
    """Against float64, on strided tokens, with slots behind those that are held."""
    decode = operators.decode.default
    chance = torch.Generator().manual_seed(seed)
    dim, value_dim = dims
    total = slots + spare

    def drawn(*shape):
        return torch.randn(shape, generator=chance).to(dtype)

    keys, values = drawn(batch, heads, total, dim), drawn(batch, heads, total, value_dim)
    positions = torch.randint(0, 100, (batch, heads, total), generator=chance, dtype=torch.int32)
    # As models give them: heads behind tokens, and a token's heads side by side.
    query = (drawn(batch, 1, heads * group, dim) * spread).transpose(1, 2)
    key = drawn(batch, 1, heads, dim).transpose(1, 2)
    value = drawn(batch, 1, heads, value_dim).transpose(1, 2)
    if data.draw(st.booleans()):
        where = torch.randint(0, slots, (batch, heads, 1), generator=chance)
    else:
        where = torch.tensor([slots - 1]).expand(batch, heads, 1)
    want_keys, want_values, want_positions = keys.clone(), values.clone(), positions.clone()
    want_keys.scatter_(2, where.unsqueeze(-1).expand(-1, -1, -1, dim), key)
    want_values.scatter_(2, where.unsqueeze(-1).expand(-1, -1, -1, value_dim), value)
    want_positions.scatter_(2, where, 77)

    scale = dim**-0.5
    need_mass = data.draw(st.booleans())
    output, mass, finite = decode(
        query, keys, values, positions, where, key, value, 77, slots, scale, need_mass
    )
    assert finite
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)
    assert torch.equal(positions, want_positions)
    expected, expected_mass = reference(query, keys[:, :, :slots], values[:, :, :slots], scale)
    largest = max(float(values.abs().max()), 1.0)
    assert output.dtype == dtype
    assert (output.double() - expected).abs().max() <= DTYPES[dtype] * largest * max(spread, 1)
    if need_mass:
        assert mass.dtype == torch.float32
        assert (mass.double() - expected_mass).abs().max() <= 2e-6 * max(spread, 1)
    else:
        assert mass.numel() == 0


@needs_compiler
@pytest.mark.parametrize("slot", [-5, -1, 6, 10**9])
def test_a_slot_out_of_range_is_refused_before_anything_is_written(operators, slot):
    keys, values = torch.zeros(2, 2, 3, 6, 8)
    positions = torch.arange(6, dtype=torch.int32).repeat(2, 3, 1)
    where = torch.zeros(2, 3, 1, dtype=torch.int64)
    where[1, 2] = slot
    token = torch.ones(2, 3, 1, 8)
    with pytest.raises(IndexError, match=rf"slot {slot} is out of range: there are 6"):
        operators.decode.default(
            token, keys, values, positions, where, token, token, 7, 6, 1.0, True
        )
    assert not keys.any()
    assert positions.max() == 5


@needs_compiler
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    slots=st.integers(1, 40),
    dims=st.sampled_from([(8, 8), (64, 64), (24, 16)]),
    dtype=st.sampled_from(list(DTYPES)),
    shift=st.sampled_from([0.0, -60.0]),
    empty=st.floats(0, 1),
    need_mass=st.booleans(),
)
def test_the_compiled_steps_kernel_knows_empty_slots(
    operators, seed, batch, heads, group, slots, dims, dtype, shift, empty, need_mass
):
    """Against float64 over the slots that hold a token, whatever lies in those that are empty."""
    decode_step = operators.decode_step.default
    chance = torch.Generator().manual_seed(seed)
    dim, value_dim = dims

    def drawn(*shape):
        return torch.randn(shape, generator=chance).to(dtype)

    # With a shift, every token's score is far below what an empty slot's zeros would have.
    query, towards = drawn(batch, heads * group, 1, dim), 0.0
    if shift:
        query, towards = torch.ones_like(query), shift
    keys, key = (drawn(batch, heads, n, dim) + towards / dim for n in (slots, 1))
    values, value = drawn(batch, heads, slots, value_dim), drawn(batch, heads, 1, value_dim)
    positions = torch.arange(slots, dtype=torch.int32).expand(batch, heads, slots).clone()
    gone = torch.rand(batch, heads, slots, generator=chance) < empty
    positions[gone], keys[gone], values[gone] = -1, 0.0, 0.0
    where = torch.randint(0, slots, (batch, heads, 1), generator=chance)
    mass = torch.full((batch, heads, 1, slots), 7.0) if need_mass else None
    output = decode_step(
        query, keys, values, positions, mass, where, key, value, torch.tensor([77]).int(), 1.0
    )
    assert torch.equal(positions.gather(2, where), torch.full_like(where, 77).int())
    assert torch.equal(keys.gather(2, where.unsqueeze(-1).expand(-1, -1, -1, dim)), key)
    asked = query.double().view(batch, heads, group, dim)
    scores = asked @ keys.double().transpose(2, 3)
    scores = scores.masked_fill((positions < 0).unsqueeze(2), -torch.inf)
    weights = scores.softmax(-1)
    expected = (weights @ values.double()).view(batch, heads * group, 1, value_dim)
    largest = max(float(values.abs().max()), 1.0)
    assert (output.double() - expected).abs().max() <= 10 * DTYPES[dtype] * largest
    if mass is not None:
        assert (mass.double() - weights.mean(2, keepdim=True)).abs().max() <= 2e-5
        assert (mass.squeeze(2)[positions < 0] == 0).all()


def stream(policy, *, dtype=torch.float32, reclaim="lazy", **terms):
    layout = kvpolicy.RasterLayout(rows=8, cols=6, prefix=2)
    budget = None if isinstance(policy, kvpolicy.policies.Full) else 32
    cache = kvpolicy.PolicyCache(policy, budget, layout=layout, num_layers=1, reclaim=reclaim)
    chance = torch.Generator().manual_seed(7)
    outputs, held = [], []
    for _ in range(layout.length):
        query = torch.randn(3, 4, 1, 16, generator=chance).to(dtype)
        key, value = (torch.randn(3, 2, 1, 16, generator=chance).to(dtype) for _ in range(2))
        outputs.append(cache.attend(0, query, key, value, **terms))
        held.append(cache.positions(0).sort(-1).values)
    return torch.cat(outputs, 2), held


@needs_compiler
@pytest.mark.parametrize(
    "policy",
    [
        kvpolicy.create(name, **({"anchors": 3} if name in ("linear", "linear2d") else {}))
        for name in kvpolicy.available()
        if name != "compose"
    ],
    ids=lambda policy: policy.key,
)
@pytest.mark.parametrize("reclaim", ["lazy", "eager"])
def test_every_policy_decides_as_without_it(policy, reclaim, calls, monkeypatch):
    output, held = stream(policy, reclaim=reclaim)
    assert len(calls) == 50
    monkeypatch.setattr(native, "decoder", lambda dtype: None)
    plain_output, plain_held = stream(policy, reclaim=reclaim)
    assert all(map(torch.equal, held, plain_held))
    torch.testing.assert_close(output, plain_output, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("policy", ["h2o", "linear/protect=anchors:2+lines:1", "streaming_llm"])
def test_the_invariants_hold_with_it(policy, calls):
    check_policy(kvpolicy.create(policy), examples=15)
    assert calls


@needs_compiler
@pytest.mark.parametrize(
    "terms",
    [
        {"softcap": 20.0},
        {"sinks": torch.zeros(4)},
        {"dtype": torch.float64},
    ],
    ids=["soft cap", "learned sinks", "float64"],
)
def test_it_is_not_used_where_it_does_not_serve(terms, calls):
    stream("h2o", **terms)
    assert not calls


@needs_compiler
def test_gradients_flow_around_it(calls):
    cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(), num_layers=1)
    query = torch.randn(1, 1, 1, 4, requires_grad=True)
    key, value = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4, requires_grad=True)
    cache.attend(0, query, key, value).sum().backward()
    assert value.grad is not None
    assert not calls


@needs_compiler
def test_nan_is_refused(calls):
    cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(), num_layers=1)
    key = torch.randn(1, 1, 1, 4)
    cache.attend(0, key, key, key)
    with pytest.raises(kvpolicy.AttentionError, match="from position 1 is NaN"):
        cache.attend(0, key * float("nan"), key, key)
    assert len(calls) == 2


@needs_compiler
def test_the_command_says_where_it_lies(folder, monkeypatch):
    monkeypatch.setenv("KVPOLICY_KERNELS", str(folder))
    done = CliRunner().invoke(app, ["build-kernel"])
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert Path(lines[0]) == native.library()
    figures = native.measured(native.library())
    assert figures["times_as_fast"].keys() >= {"decode", "lowest", "redundancy", "change_together"}
    assert 0 <= figures["most_rows"] <= 32
    assert lines[1].startswith("times as fast as torch, one thread: ")
    assert lines[2].startswith("left to torch: ")
    assert lines[3].startswith("skinny products: up to ")


def test_it_can_be_turned_off(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_KERNELS", str(tmp_path))
    native.library().write_bytes(b"")
    monkeypatch.setenv("KVPOLICY_NATIVE", "0")
    forget()
    assert native.in_use() is None
    forget()


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder of kernels that is empty, and nothing remembered of another."""
    folder = tmp_path / "kernels"
    folder.mkdir(0o700)
    monkeypatch.setenv("KVPOLICY_KERNELS", str(folder))
    monkeypatch.setenv("KVPOLICY_NATIVE", "1")
    monkeypatch.setattr(native, "SHIPPED", tmp_path / "no wheel")
    forget()
    yield folder
    forget()


def decides():
    """Whether a cache does its work."""
    cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(), num_layers=1)
    for _ in range(12):
        key = torch.randn(1, 1, 1, 4)
        cache.attend(0, key, key, key)
    return cache.stats().evictions[0] == 4


def test_a_damaged_library_steps_aside_with_one_warning(own_folder):
    native.library().write_bytes(b"no library")
    native.library().chmod(0o700)
    with pytest.warns(RuntimeWarning, match=r"cpu-\w+\.so are not used: .*build-kernel") as told:
        assert decides()
    assert len(told) == 1


def put(good, folder):
    """A library and its figures, in a folder."""
    for built in (good, good.with_suffix(".json")):
        shutil.copy(built, folder)
    path = folder / good.name
    path.chmod(0o700)
    return path


posix = pytest.mark.skipif(os.name != "posix", reason="who may write a file is told on POSIX only")


@posix
@pytest.mark.parametrize("mode", [0o720, 0o702], ids=["group", "everybody"])
@pytest.mark.parametrize("place", ["file", "folder", "parent", "figures"])
def test_code_that_others_may_write_is_not_loaded(own_folder, folder, place, mode):
    path = put(folder / native.library().name, own_folder)
    assert native.untrusted(path) is None
    assert native.whole(path)
    lax = {"file": path, "folder": own_folder, "parent": own_folder.parent}
    lax.get(place, path.with_suffix(".json")).chmod(mode)
    words = f"others may write {lax[place]}" if place in lax else "they are not what was built"
    with pytest.warns(RuntimeWarning, match=f"are not used: {words}"):
        assert native.operators() is None


@posix
def test_a_folder_like_tmp_may_hold_it_further_up_but_not_itself(own_folder, folder):
    path = put(folder / native.library().name, own_folder)
    own_folder.parent.chmod(0o1777)
    assert native.untrusted(path) is None
    own_folder.chmod(0o1777)
    assert native.untrusted(path) == f"others may write {own_folder}"


@posix
def test_above_the_home_folder_nobody_looks(own_folder, tmp_path, monkeypatch):
    """As ssh does it: who owns what lies above is for whoever runs the machine."""
    tmp_path.chmod(0o777)
    assert native.untrusted(own_folder) == f"others may write {tmp_path}"
    monkeypatch.setenv("HOME", str(own_folder))
    assert native.untrusted(own_folder) is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives away")
@pytest.mark.parametrize("place", ["file", "folder", "parent"])
def test_code_of_another_user_is_not_loaded(own_folder, folder, place):
    path = put(folder / native.library().name, own_folder)
    given = {"file": path, "folder": own_folder, "parent": own_folder.parent}[place]
    os.chown(given, 12345, -1)
    with pytest.warns(RuntimeWarning, match=f"are not used: {given} belongs to another user"):
        assert native.operators() is None
    os.chown(given, os.geteuid(), -1)


@posix
def test_nothing_is_built_where_it_would_not_be_loaded(own_folder, tmp_path):
    own_folder.chmod(0o775)
    with pytest.raises(
        kvpolicy.KernelError, match=r"no code would be loaded from .*\(chmod go-w\)"
    ):
        build(fake_compiler(tmp_path, "exit 3"))


def test_a_process_keeps_the_library_that_it_has_loaded(own_folder, folder, operators):
    """torch knows an operator once: a second library that brings it would end the process."""
    put(folder / native.library().name, own_folder)
    assert native.operators() is None


def test_a_folder_that_can_not_be_read_holds_nothing(own_folder, monkeypatch):
    def exists(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", exists)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is wrong: there never was a library
        assert native.in_use() is None


def test_an_empty_setting_is_not_the_current_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPOLICY_KERNELS", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.library().parent == tmp_path / ".cache" / "kvpolicy" / "kernels"


def test_without_a_home_a_cache_works_and_building_says_what_to_name(own_folder, monkeypatch):
    def unknown(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", unknown)
    assert native.untrusted(own_folder) is None
    monkeypatch.delenv("KVPOLICY_KERNELS")
    assert decides()
    with pytest.raises(kvpolicy.KVPolicyError, match=r"name one in \$KVPOLICY_KERNELS"):
        build()


def fake_compiler(folder, script):
    compiler = folder / "compiler"
    compiler.write_text("#!/bin/sh\n" + script)
    compiler.chmod(0o755)
    return str(compiler)


def test_what_can_not_be_loaded_is_not_put_in_place(own_folder, tmp_path):
    """A compiler that is content, and gives nothing that a process could load."""
    script = 'while [ "$1" != -o ]; do shift; done\necho no library > "$2"\n'
    with pytest.raises(kvpolicy.KVPolicyError, match=r"of no use here, and is not kept: .*Error"):
        build(fake_compiler(tmp_path, script))
    assert not list(own_folder.iterdir())


@needs_compiler
def test_openmp_is_torchs_own(folder):
    """A second one would have threads of its own, and is called otherwise by each compiler."""
    library = (folder / native.library().name).read_bytes()
    assert b"libtorch_cpu" in library
    assert not re.search(rb"lib(gomp|omp|iomp5)", library)


class OneWrong:
    """The kernels, one of which adds a little to what it gives."""

    def __init__(self, operators, name):
        self.operators, self.name = operators, name

    def __getattr__(self, name):
        right = getattr(self.operators, name)
        if name != self.name:
            return right

        def wrong(*arguments):
            given = right.default(*arguments)
            if name == "key_lengths":  # writes where it is told to
                arguments[1].add_(1)
            elif isinstance(given, tuple):
                return given[0] + 1, *given[1:]
            else:
                return ~given if given.dtype == torch.bool else given + 1
            return given

        return SimpleNamespace(default=wrong)


@needs_compiler
@pytest.mark.parametrize("name", [*trial.cases(torch.float32), "decode", "linear"])
def test_every_kernel_has_to_compute_what_torch_does(operators, monkeypatch, name):
    """What a trial says of a library with one wrong kernel: on that account it is not kept."""
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "kvpolicy_cpu", OneWrong(operators, name))
    monkeypatch.setattr(native, "operators", native.operators)
    with pytest.raises(AssertionError):
        trial.main("a library", measure=False)


@needs_compiler
def test_a_trial_lets_the_right_ones_pass(operators, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native, "operators", native.operators)
    trial.main("a library", measure=False)
    assert json.loads(capsys.readouterr().out) == {"times_as_fast": {}, "most_rows": 0}


def copying(good):
    """A compiler's work, done by a copy of what it made before."""
    return f'while [ "$1" != -o ]; do shift; done\ncp "{good}" "$2"\n'


@pytest.fixture
def untried(monkeypatch):
    """Building without the seconds that measuring takes."""
    report = {"times_as_fast": {"lowest": 2.0}, "most_rows": 4}
    monkeypatch.setattr(building, "_try", lambda path: dict(report))


@needs_compiler
def test_building_again_repairs_what_was_damaged(own_folder, folder, tmp_path, untried):
    """What is there is tried first; and what a build that was killed has left goes."""
    good = folder / native.library().name
    path = put(good, own_folder)
    path.write_bytes(good.read_bytes()[:10_000])
    with pytest.warns(RuntimeWarning, match="they are not what was built"):
        assert native.operators() is None
    (own_folder / "building-killed").mkdir()
    (own_folder / "building-killed" / "kernels.cpp").write_text("half of it")
    assert build(fake_compiler(tmp_path, copying(good))) == path
    assert path.read_bytes() == good.read_bytes()
    assert native.whole(path)
    assert sorted(file.suffix for file in own_folder.iterdir()) == [".json", ".so"]
    assert not path.stat().st_mode & 0o077


KILLED = """
import os
from kvpolicy.ops.cpu.build import build

os.environ["KVPOLICY_KERNELS"] = {folder!r}
build({compiler!r})
"""


@posix
@pytest.mark.parametrize("how", ["KILL", "TERM", "INT"])
def test_a_build_that_is_interrupted_leaves_nothing_behind_and_nothing_running(
    own_folder, tmp_path, how
):
    """A compiler is processes of its own, which nobody else would end."""
    script = f"sleep 300 &\necho $! $$ > {tmp_path}/ids\nkill -{how} $PPID\nwait\n"
    compiler = fake_compiler(tmp_path, script)
    done = run_code(KILLED.format(folder=str(own_folder), compiler=compiler), tmp_path)
    assert done.returncode == (1 if how == "INT" else -getattr(signal, f"SIG{how}"))
    ids = list(map(int, (tmp_path / "ids").read_text().split()))
    assert len(ids) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, ids)) or list(own_folder.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    """Whether there is such a process, and it has not ended without being asked how."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@needs_compiler
@posix
def test_folders_are_private_whatever_the_umask(own_folder, folder, tmp_path, untried, monkeypatch):
    good = folder / native.library().name
    monkeypatch.setenv("KVPOLICY_KERNELS", str(own_folder / "a" / "b"))
    before = os.umask(0)
    try:
        path = build(fake_compiler(tmp_path, copying(good) + 'chmod 777 "$2"\n'))
    finally:
        os.umask(before)
    for made in (path, path.with_suffix(".json"), path.parent, path.parent.parent):
        assert not made.stat().st_mode & 0o077, made
    assert native.whole(path)


@needs_compiler
@posix
def test_two_builds_take_turns_and_the_second_finds_the_first_ones(
    own_folder, folder, tmp_path, untried
):
    good = folder / native.library().name
    compiler = fake_compiler(tmp_path, f'echo x >> "{tmp_path}/calls"\nsleep 0.2\n' + copying(good))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(build, [compiler] * 2)
    assert first == second
    assert len((tmp_path / "calls").read_text().split()) == 2, "compiled and linked once"


def test_what_was_slower_here_is_left_to_torch(own_folder, operators, monkeypatch):
    slow = native.Library(
        own_folder,
        most_rows=8,
        times_as_fast={
            "lowest": 0.9,
            "pool": 1.5,
            "cosines": 1.2,
            "cosines bfloat16": 0.8,
            "decode": 1.2,
            "decode float16": 0.5,
        },
    )
    with monkeypatch.context() as patch:
        patch.setattr(native, "in_use", lambda: slow)
        patch.setattr(native, "operators", lambda: operators)
        patch.setattr(native, "uses", uses)
        _what_was_slower()


def _what_was_slower():
    served = torch.zeros(1)
    assert native.serving("lowest", served) is None
    assert native.serving("pool", served) is not None
    assert native.serving("cosines", served) is not None
    assert native.serving("cosines", served.bfloat16()) is None
    assert native.serving("cosines", served.half()) is not None
    assert native.decoder(torch.float32) is not None
    assert native.decoder(torch.bfloat16) is not None
    assert native.decoder(torch.float16) is None
    assert native.stepper(torch.float16) is None
    assert native.most_rows() == 8


# -- what a wheel brings ---------------------------------------------------------------------------


@pytest.fixture
def wheel(own_folder, folder, tmp_path, monkeypatch):
    """As if the installation had brought kernels; those of the tests stand for both kinds."""
    brought = tmp_path / "built"
    brought.mkdir(exist_ok=True)
    good = folder / native.library().name
    for name in ("x86-64-v3", "x86-64-v4"):
        shutil.copy(good, brought / f"{name}.so")
    said = {
        "torch": torch.__version__.partition("+")[0],
        "sha256": dict.fromkeys(("x86-64-v3", "x86-64-v4"), native.digest(good)),
    }
    (brought / "built.json").write_text(json.dumps(said))
    monkeypatch.setattr(native, "SHIPPED", brought)
    return brought


SHIPPED = """
import os, pathlib, torch, kvpolicy
from kvpolicy.ops.cpu import native

os.environ |= {{"KVPOLICY_NATIVE": "1", "KVPOLICY_KERNELS": "nothing here"}}
native.SHIPPED = pathlib.Path({shipped!r})
native.in_use.cache_clear(), native.operators.cache_clear()
cache = kvpolicy.PolicyCache("h2o", 8, layout=kvpolicy.TextLayout(), num_layers=1)
for _ in range(12):
    key = torch.randn(1, 1, 1, 4)
    cache.attend(0, key, key, key)
assert cache.stats().evictions == (4,)
print(native.in_use(), native.decoder(torch.float32))
"""


@needs_compiler
def test_what_a_wheel_brings_is_used(wheel, tmp_path):
    done = run_code(SHIPPED.format(shipped=str(wheel)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(native.shipped()) in done.stdout
    assert "kvpolicy_cpu.decode" in done.stdout
    assert not done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("capability", "name", "rows"),
    [("AVX512", "x86-64-v4", 16), ("AVX2", "x86-64-v3", 8), ("DEFAULT", None, None)],
)
def test_the_processor_says_which(wheel, monkeypatch, capability, name, rows):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(native, "_load", lambda path: True)
    path = native.shipped()
    assert (path and path.stem) == name
    found = native.in_use()
    assert (found and found.most_rows) == rows
    assert uses("decode", torch.float32)
    assert uses("key_lengths", torch.float16) == (found is None)
    if name == "x86-64-v4":  # a wheel that was built where there is none of these
        said = json.loads((wheel / "built.json").read_text())
        del said["sha256"]["x86-64-v4"]
        (wheel / "built.json").write_text(json.dumps(said))
        assert native.shipped().stem == "x86-64-v3"


@needs_compiler
@pytest.mark.parametrize("case", ["another torch", "cut short", "lost", "no JSON", "no digests"])
def test_what_a_wheel_brings_steps_aside_in_words(wheel, monkeypatch, case):
    path, table = native.shipped(), wheel / "built.json"
    said = json.loads(table.read_text())
    words = "it is damaged"
    match case:
        case "another torch":
            table.write_text(json.dumps(said | {"torch": "2.5.1"}))
            words = f"are for torch 2.5.1, and are not used with {torch.__version__}"
        case "cut short":
            path.write_bytes(path.read_bytes()[:10_000])
        case "lost":
            path.unlink()
        case "no JSON":
            table.write_text("{")
            words = "are not used: JSONDecodeError"
        case "no digests":
            table.write_text(json.dumps({"torch": said["torch"]}))
            words = "are not used: KeyError"
    with pytest.warns(RuntimeWarning, match=re.escape(words) + ".*`kvpolicy build-kernel`") as told:
        assert decides()
    assert len(told) == 1
    assert native.in_use() is None


@needs_compiler
def test_what_was_built_here_comes_first(wheel, own_folder, folder, monkeypatch):
    monkeypatch.setattr(native, "_load", lambda path: True)
    assert native.in_use().path.parent == wheel
    forget()
    path = put(folder / native.library().name, own_folder)
    assert native.in_use().path == path
    forget()
    path.write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match="they are not what was built"):
        assert native.in_use().path.parent == wheel


@needs_compiler
def test_without_a_compiler_what_a_wheel_brings_is_measured(
    wheel, own_folder, untried, monkeypatch
):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    path = build()
    assert path.parent == own_folder
    assert native.digest(path) == native.digest(native.shipped())
    assert native.measured(path)["most_rows"] == 4
    with pytest.raises(kvpolicy.KernelError, match="no-such-compiler"):
        path.unlink()
        build("no-such-compiler")


def test_without_a_compiler_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_KERNELS", str(tmp_path))
    with pytest.raises(kvpolicy.KVPolicyError, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        build("no-such-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(kvpolicy.KVPolicyError, match="works without one"):
        build()
    assert not list(tmp_path.iterdir())


def test_what_a_compiler_says_is_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_KERNELS", str(tmp_path / "kernels"))
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    compiler.chmod(0o755)
    with pytest.raises(kvpolicy.KVPolicyError, match=r"broken failed \(3\):\nout of memory"):
        build(str(compiler))
    assert not list((tmp_path / "kernels").iterdir())


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(2, 3, 1, 16)[..., ::2],  # numbers of a token are not side by side
        torch.zeros(2, 3, 1, 8, dtype=torch.float64),
        torch.zeros(2, 3, 1, 8, dtype=torch.bfloat16),
        torch.zeros(2, 3, 1, 8, device="meta"),
        torch.zeros(2, 3, 1, 8, requires_grad=True),
        torch.nn.Parameter(torch.zeros(2, 3, 1, 8), requires_grad=False),
    ],
    ids=["strided", "float64", "another dtype", "another device", "gradient", "subclass"],
)
def test_what_is_not_left_to_the_kernel(other):
    served = torch.zeros(2, 3, 1, 8)
    assert native.serves(served, served)
    assert not native.serves(served, other)
