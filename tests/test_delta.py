"""Deltas: a file of changed rows gives the trained model back bit for bit, or is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from helpers import assert_same_bits, bits, pick_rows
from models import Q0, tiny_model
from torch import Tensor, nn

import longact
from longact import delta
from longact.delta import changed_rows, load_delta, merge_delta, read_info, save

KINDS = ("empty", "one", "random", "all")


class Net(nn.Module):
    """Every kind of tensor: tied, transposed, 1- and 0-dimensional parameters, buffers, no rows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def values(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.embed = nn.Embedding(7, 6, dtype=dtype)
        self.embed.weight = values(7, 6)
        self.head = nn.Linear(6, 7, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.transposed = nn.Parameter(values(6, 9).detach().t())
        self.bias = values(9)
        self.cube = values(5, 2, 3)
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.nothing = values(4, 0)
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mean", torch.arange(4.0))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


ROWS = {
    "embed.weight": [0, 3, 6],
    "transposed": [1, 2, 8],
    "bias": [4],
    "cube": [0, 4],
    "nothing": [2],
}


def indices(rows: dict[str, list[int]]) -> dict[str, Tensor]:
    return {name: torch.tensor(r, dtype=torch.int32) for name, r in rows.items()}


def fill_rows(model: nn.Module, rows: dict[str, Tensor], seed: int) -> None:
    """Other values in these rows, with -0.0 and, of the floats that have one, a NaN of our own."""
    generator = torch.Generator().manual_seed(seed)
    for name, r in rows.items():
        param = model.get_parameter(name).detach()
        new = torch.randn(r.numel(), *param.shape[1:], generator=generator).to(param.dtype)
        if new.numel() > 1:
            flat = new.view(-1)
            flat[0] = -0.0
            flat[1:2].view(bits(flat).dtype).fill_(
                0x7FC1 if new.element_size() == 2 else 0x7FC12345
            )
        param[r.long()] = new


def trained_from(base: nn.Module, rows: dict[str, Tensor]) -> nn.Module:
    trained = copy.deepcopy(base)
    fill_rows(trained, rows, seed=1)
    return trained


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, by reference."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = tensors_of(actual), tensors_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_same_bits(tensor, theirs[name], name)


class Untouched:
    """Raises ValueError with `match`, and leaves every bit of the model."""

    def __init__(self, model: nn.Module, match: str, error: type[Exception] = ValueError) -> None:
        self.model, self.before = model, copy.deepcopy(model)
        self.raises = pytest.raises(error, match=match)

    def __enter__(self) -> None:
        self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        assert_same_model(self.model, self.before)
        return bool(self.raises.__exit__(*error))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A delta of `Net`."""
    rows = indices(ROWS)
    save(trained_from(Net(), rows), rows, tmp_path / "net.delta", keep_ratio=0.3)
    return tmp_path / "net.delta"


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_trained_model_comes_back_bit_for_bit(
    dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    base = tiny_model("qwen2", initializer_range=0.1).to(dtype)  # with biases
    generator = torch.Generator().manual_seed(0)
    rows = {
        f"{Q0}.{name}": pick_rows(kind, base.get_parameter(f"{Q0}.{name}").shape[0], generator)
        for name in ("weight", "bias")
    }
    trained = trained_from(base, rows)
    save(trained, rows, tmp_path / "delta", keep_ratio=0.3)
    # What the base has in the rows that are replaced does not matter.
    fill_rows(base, rows, seed=2)
    pointers = {name: t.data_ptr() for name, t in tensors_of(base).items()}
    info = load_delta(base, tmp_path / "delta")

    assert_same_model(base, trained)
    assert {name: t.data_ptr() for name, t in tensors_of(base).items()} == pointers
    count = sum(r.numel() for r in rows.values())
    assert (info.rows, info.parameters) == (count, 0 if kind == "empty" else 2)
    assert info.elements == 64 * rows[f"{Q0}.weight"].numel() + rows[f"{Q0}.bias"].numel()
    assert info.share == info.elements / sum(p.numel() for p in base.parameters())
    assert (info.model_class, info.model_type) == ("Qwen2ForCausalLM", "qwen2")
    assert (info.keep_ratio, info.longact_version) == (0.3, longact.__version__)
    assert info.bytes == (tmp_path / "delta").stat().st_size
    assert info == read_info(tmp_path / "delta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_every_kind_of_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    base, rows = Net(dtype), indices(ROWS)
    trained = copy.deepcopy(base)
    if dtype == torch.complex64:
        with torch.no_grad():
            for name, r in rows.items():
                trained.get_parameter(name)[r.long()] += 1j
    else:
        fill_rows(trained, rows, seed=1)
    assert not base.transposed.is_contiguous()
    save(trained, rows, tmp_path / "delta")
    info = load_delta(base, tmp_path / "delta")
    assert_same_model(base, trained)
    assert base.head.weight is base.embed.weight
    assert (info.model_type, info.keep_ratio) == (None, None)
    # embed.weight counts once
    assert info.share == (18 + 18 + 1 + 12) / (42 + 54 + 9 + 30 + 1)


def test_it_loads_into_salient_projections_and_into_frozen_parameters(tmp_path: Path) -> None:
    base = tiny_model()
    rows = {f"{Q0}.weight": torch.tensor([0, 5], dtype=torch.int32)}
    trained = trained_from(base, rows)
    save(trained, rows, tmp_path / "delta")
    base.requires_grad_(False)
    handle = longact.apply(base)
    load_delta(base, tmp_path / "delta")
    assert_same_model(base, trained)
    handle.remove()
    assert_same_model(base, trained)


def test_the_same_delta_is_the_same_file(saved: Path, tmp_path: Path) -> None:
    rows = indices(ROWS)
    # Any integer type, and no entry for what has no rows.
    given = {name: r.long() for name, r in reversed(rows.items())}
    given["scale_of_nothing"] = given.pop("nothing")
    given["nothing"] = given.pop("scale_of_nothing")
    save(trained_from(Net(), rows), given, tmp_path / "again", keep_ratio=0.3)
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize("part_bytes", [1, 20, 1 << 26])
def test_the_file_is_as_documented(
    part_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read without longact, by docs/deltas.md alone; whatever parts the tensors are read in."""
    monkeypatch.setattr(delta, "_PART_BYTES", part_bytes)
    rows = indices(ROWS)
    trained = trained_from(Net(), rows)
    save(trained, rows, tmp_path / "delta")
    data = (tmp_path / "delta").read_bytes()
    with safetensors.safe_open(tmp_path / "delta", "pt") as file:
        fields = json.loads(file.metadata()["longact_delta"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    digest = fields["sha256"].encode()
    assert data.count(digest) == 1
    assert hashlib.sha256(data.replace(digest, b"0" * 64)).hexdigest().encode() == digest
    assert fields["format_version"] == 1
    assert tensors.keys() == {f"{kind}/{name}" for kind in ("rows", "values") for name in rows}
    expected: dict[str, dict[str, Any]] = {"parameters": {}, "buffers": {}}
    for name, tensor in tensors_of(trained).items():
        if name == "cache":
            continue
        replaced = ROWS.get(name, [])
        if name in rows:
            assert_same_bits(tensors[f"rows/{name}"], rows[name], name)
            assert_same_bits(tensors[f"values/{name}"], tensor[replaced], name)
        kept = (
            tensor if tensor.dim() == 0 else tensor[[i not in replaced for i in range(len(tensor))]]
        )
        dtype, shape = str(tensor.dtype).partition(".")[2], [*tensor.shape]
        raw = f"{dtype} {shape}\n".encode() + kept.detach().contiguous().numpy().tobytes()
        kind = "parameters" if isinstance(tensor, nn.Parameter) else "buffers"
        expected[kind][name] = [dtype, shape, hashlib.sha256(raw).hexdigest()]
    assert {kind: fields[kind] for kind in expected} == expected


# Another base


def change(model: nn.Module, name: str, at: tuple[int, ...]) -> None:
    bits_of = tensors_of(model)[name].detach()
    bits_of.view({8: torch.int64, 4: torch.int32}[bits_of.element_size()])[at] ^= 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: change(net, "bias", (5,)), r"1 of 8 tensors differ .*\(bias\): load what"),
        (lambda net: change(net, "embed.weight", (1, 0)), r"\(embed.weight\)"),
        (lambda net: change(net, "transposed", (0, 5)), r"\(transposed\)"),
        (lambda net: change(net, "scale", ()), r"\(scale\)"),
        (lambda net: change(net, "mean", (3,)), r"\(mean\)"),
        (lambda net: change(net, "count", ()), r"\(count\)"),
        (
            lambda net: [change(net, n, at) for n, at in (("scale", ()), ("cube", (1, 0, 0)))],
            r"2 of 8 tensors .*\(cube, scale\)",
        ),
        (lambda net: net.bfloat16(), r"other dtype of .* and 4 more .*with dtype=torch.float32$"),
        (
            lambda net: setattr(net, "bias", nn.Parameter(torch.zeros(8))),
            r"other shape of bias \(\[9\] in the delta's Net, \[8\] in the model\)",
        ),
        (lambda net: delattr(net, "cube"), "only the delta's Net has cube$"),
        (
            lambda net: setattr(
                net.head, "weight", nn.Parameter(net.embed.weight.detach().clone())
            ),
            "only the model has head.weight$",
        ),
        (lambda net: net.register_buffer("more", torch.zeros(1)), "only the model has more$"),
    ],
)
def test_another_base_is_refused(spoil: Callable[[Net], Any], message: str, saved: Path) -> None:
    net = Net()
    spoil(net)
    with Untouched(net, message):
        load_delta(net, saved)


def test_what_the_delta_replaces_is_not_checked_nor_is_a_transient_buffer(saved: Path) -> None:
    net = Net()
    change(net, "embed.weight", (3, 1))
    net.cache += 1
    load_delta(net, saved)
    expected = trained_from(Net(), indices(ROWS))
    expected.cache += 1
    assert_same_model(net, expected)


# Damaged and foreign files


def test_any_changed_byte_is_refused(saved: Path) -> None:
    data, net = saved.read_bytes(), Net()
    header = int.from_bytes(data[:8], "little")
    if data[8 + header - 1 : 8 + header] != b" ":  # no padding yet: one character more brings some
        save(trained_from(Net(), indices(ROWS)), indices(ROWS), saved, keep_ratio=0.31)
        data = saved.read_bytes()
        header = int.from_bytes(data[:8], "little")
    assert data[8 + header - 1 : 8 + header] == b" "
    digest = data.index(b'\\"sha256\\":\\"') + 13
    all_bits = {*range(8), *range(digest, digest + 64)}  # the others are under the digest
    with Untouched(net, "the end"):
        for at in range(len(data)):
            for bit in [1 << i for i in range(8)] if at in all_bits else [1 << (at % 8)]:
                damaged = bytearray(data)
                damaged[at] ^= bit
                saved.write_bytes(damaged)
                with pytest.raises(ValueError, match=r"damaged|no delta"):
                    load_delta(net, saved)
        raise ValueError("the end")


def test_a_cut_or_extended_file_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    net = Net()
    with Untouched(net, "the end"):
        for other in (*(data[:end] for end in range(0, len(data), 7)), data[:-1], data + b"\0"):
            saved.write_bytes(other)
            with pytest.raises(ValueError, match="damaged"):
                load_delta(net, saved)
        raise ValueError("the end")


def seal(path: Path, tensors: dict[str, Tensor], fields: dict[str, Any]) -> None:
    """A file with the right digest, whatever it says."""
    text = json.dumps({**fields, "sha256": "0" * 64}, separators=(",", ":"))
    data = safetensors.torch.save(tensors, {"longact_delta": text})
    digest = hashlib.sha256(data).hexdigest()
    path.write_bytes(data.replace(b'sha256\\":\\"' + b"0" * 64, b'sha256\\":\\"' + digest.encode()))


def test_a_newer_format_is_refused_with_the_remedy(saved: Path) -> None:
    seal(saved, {}, {"format_version": 2})
    with Untouched(net := Net(), r"of format 2: this longact reads format 1, update it"):
        load_delta(net, saved)
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="of format 2, or damaged: "):
        read_info(saved)


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda t, f: t.update({"rows/bias": torch.tensor([9], dtype=torch.int32)}), "has index 9"),
        (lambda t, f: t.update({"rows/bias": torch.tensor([-1], dtype=torch.int32)}), "index -1"),
        (
            lambda t, f: t.update({"rows/cube": torch.tensor([4, 0], dtype=torch.int32)}),
            "cube: rows has 4 before 0",
        ),
        (
            lambda t, f: t.update({"rows/cube": torch.tensor([4, 4], dtype=torch.int32)}),
            "cube: rows has 4 twice",
        ),
        (
            lambda t, f: t.update({"rows/bias": torch.tensor([4])}),
            "bias: rows or values of another",
        ),
        (lambda t, f: t.update({"values/bias": torch.zeros(2)}), "bias: rows or values of another"),
        (lambda t, f: t.update({"values/bias": torch.zeros(1).half()}), "bias: rows or values"),
        (lambda t, f: t.update({"values/cube": torch.zeros(2, 6)}), "cube: rows or values"),
        (lambda t, f: t.pop("values/bias"), "values/bias"),
        (lambda t, f: t.pop("rows/bias"), "no place for values/bias"),
        (lambda t, f: t.update({"more": torch.zeros(1)}), "no place for more"),
        (
            lambda t, f: t.update(
                {"rows/mean": torch.zeros(1, dtype=torch.int32), "values/mean": torch.zeros(1)}
            ),
            "no place for .*mean",
        ),
        (lambda t, f: f["parameters"].pop("bias"), "no place for .*bias"),
        (lambda t, f: f["parameters"].update(bias=["float7", [9], ""]), "malformed"),
        (lambda t, f: f["buffers"].update(mean=["nn", [4], ""]), "has no dtype nn"),
        (lambda t, f: f.pop("buffers"), "malformed.*buffers"),
        (lambda t, f: f.pop("model_class"), "malformed.*model_class"),
    ],
)
def test_a_whole_file_that_makes_no_sense_is_refused(
    forge: Callable[[dict[str, Tensor], dict[str, Any]], Any], message: str, saved: Path
) -> None:
    with safetensors.safe_open(saved, "pt") as file:
        fields = json.loads(file.metadata()["longact_delta"])
    tensors = safetensors.torch.load_file(saved)
    seal(saved, tensors, fields)
    load_delta(Net(), saved)
    forge(tensors, fields)
    seal(saved, tensors, fields)
    with Untouched(net := Net(), message):
        load_delta(net, saved)


def test_other_files_are_refused_with_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file({"a": torch.zeros(2)}, path, metadata)
        with pytest.raises(ValueError, match="file is a safetensors file but no delta"):
            read_info(path)
    for data in (b"", b"hello", b"\x02" + bytes(7) + b"[]", b"\xff" * 64):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="file is no safetensors file, or a damaged one"):
            read_info(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read_info(tmp_path / "absent")


# Writing


def test_a_copy_that_fails_midway_is_undone(tmp_path: Path) -> None:
    class Stuck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.zeros(3, 2))
            # Its rows share memory, so they cannot be written: torch raises at the copy.
            self.second = nn.Parameter(torch.ones(1, 2).expand(3, 2))
            self.third = nn.Parameter(torch.zeros(3))

    net = Stuck()
    rows = indices({"first": [0, 2], "second": [1], "third": [1]})
    trained = copy.deepcopy(net)
    with torch.no_grad():
        trained.first[[0, 2]] = 7
        trained.third[1] = 7
    save(trained, rows, tmp_path / "delta")
    with Untouched(net, "single memory location", RuntimeError):
        load_delta(net, tmp_path / "delta")
    net.second = nn.Parameter(torch.ones(3, 2))
    load_delta(net, tmp_path / "delta")
    assert net.first[:, 0].tolist() == [7, 0, 7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"biass": [0]}, "'biass', which is no parameter of the model"),
        ({"mean": [0]}, "'mean', which is no parameter"),
        ({"head.weight": [0]}, "'head.weight', which is tied to embed.weight: use that name"),
        ({"bias": [9]}, "bias: rows has index 9: param has rows 0 to 8"),
        ({"bias": [3, 3]}, "bias: rows has 3 twice"),
        ({"scale": [0]}, "scale: param has no rows"),
    ],
)
def test_rows_that_the_model_does_not_have_are_refused(
    rows: dict[str, list[int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save(Net(), indices(rows), tmp_path / "delta")
    assert not any(tmp_path.iterdir())


def test_paths_and_weights_that_cannot_be_saved_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a directory: name a file"):
        save(Net(), {}, tmp_path)
    with pytest.raises(ValueError, match="in a directory that does not exist: name a file"):
        save(Net(), {}, tmp_path / "absent" / "delta")
    with pytest.raises(ValueError, match="transposed is on the meta device"):
        save(Net().to("meta"), {}, tmp_path / "delta")


def test_a_write_that_fails_leaves_the_old_file(saved: Path) -> None:
    before = saved.read_bytes()
    net, rows = nn.Linear(30, 30), {"weight": torch.arange(30, dtype=torch.int32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # Python ignores the signal
    try:
        with pytest.raises(OSError, match="File too large"):
            save(net, rows, saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [*saved.parent.iterdir()] == [saved]


def test_sharded_parameters_are_refused(saved: Path) -> None:
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = Net()
        net.bias = nn.Parameter(distribute_tensor(net.bias.detach(), init_device_mesh("cpu", (1,))))
        with pytest.raises(NotImplementedError, match=r"bias is sharded .*full_state_dict"):
            load_delta(net, saved)
        with pytest.raises(NotImplementedError, match=r"bias is sharded .*full_state_dict"):
            save(net, {}, saved)
    finally:
        dist.destroy_process_group()


def test_safetensors_and_transformers_are_asked_for_when_needed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        with pytest.raises(ImportError, match=r"pip install 'longact\[transformers\]'"):
            merge_delta("base", saved, tmp_path / "out")
        patch.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ImportError, match=r"pip install 'longact\[transformers\]'"):
            read_info(saved)
    code = "import sys, longact.delta; print({'safetensors', 'transformers'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


# What changed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part_bytes", [1, 1 << 26])
def test_changed_rows_are_those_that_differ_in_any_bit(
    dtype: torch.dtype, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delta, "_PART_BYTES", part_bytes)
    base = Net(dtype)
    with torch.no_grad():
        base.cube[1, 0, 0], base.bias[2], base.bias[3] = 0.0, torch.nan, torch.nan
    trained = copy.deepcopy(base)
    assert changed_rows(base, trained) == {}
    with torch.no_grad():
        trained.cube[1, 0, 0] = -0.0
        trained.transposed[8, 0] += 1
        trained.embed.weight[6, 5] += 1
        trained.embed.weight[0, 5] += 1
    bits_of = trained.bias.detach().view(bits(trained.bias).dtype)
    bits_of[2] ^= 1  # another NaN
    found = changed_rows(base, trained)
    assert {name: rows.tolist() for name, rows in found.items()} == {
        "embed.weight": [0, 6], "transposed": [8], "bias": [2], "cube": [1],
    }  # fmt: skip
    assert all(rows.dtype == torch.int32 for rows in found.values())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: change(net, "scale", ()), "differ in scale: buffers and parameters without"),
        (lambda net: change(net, "mean", (0,)), "differ in mean: buffers"),
        (lambda net: delattr(net, "cube"), "only the base has cube"),
        (lambda net: net.half(), "load both with dtype=torch.float16"),
    ],
)
def test_what_rows_cannot_turn_into_each_other_is_refused(
    spoil: Callable[[Net], Any], message: str
) -> None:
    trained = Net()
    spoil(trained)
    with pytest.raises(ValueError, match=message):
        changed_rows(Net(), trained)


# Checkpoints and the command line


def llama_rows() -> dict[str, Tensor]:
    """Most of the elements that a tiny model has are in its embedding and MLPs."""
    return indices({f"{Q0}.weight": [0, 5, 63], "model.layers.1.mlp.up_proj.weight": [7]})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 base with a tokenizer and other files, and the delta of training it in fp32."""
    from trainers import tiny_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    base = tiny_model().bfloat16()
    base.save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    for name in ("LICENSE", "README.md", "pytorch_model.bin", ".gitattributes"):
        (folder / "base" / name).write_text(name)
    trained = trained_from(base.float(), llama_rows())
    save(trained, llama_rows(), folder / "delta", keep_ratio=0.3)
    torch.save(trained.state_dict(), folder / "trained.pt")
    return folder


PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
transformers.AutoTokenizer.from_pretrained(sys.argv[1])
state, trained = model.state_dict(), torch.load(sys.argv[2])
assert state.keys() == trained.keys()
for name, tensor in trained.items():
    assert state[name].dtype == tensor.dtype, name
    assert torch.equal(state[name].view(torch.int32), tensor.view(torch.int32)), name
assert "longact" not in sys.modules
print("same bits")
"""


def plain_transformers(merged: Path, trained: Path) -> str:
    command = [sys.executable, "-c", PLAIN, str(merged), str(trained)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_merged_checkpoint_needs_no_longact(checkpoint: Path, tmp_path: Path) -> None:
    merge_delta(checkpoint / "base", checkpoint / "delta", tmp_path / "merged")
    assert plain_transformers(tmp_path / "merged", checkpoint / "trained.pt") == "same bits\n"
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "LICENSE",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_each_parameter_is_merged_in_its_own_dtype(tmp_path: Path) -> None:
    """As transformers does for modules that it keeps in fp32, here by hand."""
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    kept = base.model.layers[0].self_attn.k_proj.weight.detach().clone()
    base.bfloat16().model.layers[0].self_attn.k_proj.weight = nn.Parameter(kept)
    trained = trained_from(base, llama_rows())
    save(trained, llama_rows(), tmp_path / "delta")
    merge_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "merged")
    merged = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in trained.state_dict().items():
        assert_same_bits(merged[name], tensor, name)


def test_merging_is_refused_before_anything_is_written(
    checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    base, output = checkpoint / "base", tmp_path / "out"
    output.mkdir()
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    for refused, message in [
        ((base, checkpoint / "delta", base), "exists and is not empty"),
        ((base, checkpoint / "delta", saved), "exists and is not empty"),
        ((base, saved, output), "model class Net is not one of transformers"),
        ((tmp_path / "other", checkpoint / "delta", output), "of 21 tensors differ from the base"),
        (
            (tmp_path / "absent", checkpoint / "delta", output),
            "is no directory",
        ),
        ((tmp_path / "short", checkpoint / "delta", output), "lacks weights of a LlamaForCausalLM"),
    ]:
        with pytest.raises(ValueError, match=message):
            merge_delta(*refused)
    assert not any(output.iterdir())


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`python -m longact delta` with these arguments -> exit code, output, errors."""
    from longact.__main__ import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["longact", "delta", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return run


def cells(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


def test_info(run: Callable[..., tuple[int, str, str]], saved: Path) -> None:
    code, output, _ = run("info", saved)
    assert code == 0
    assert f"{saved.stat().st_size:,} bytes, intact" in output
    assert "model        Net\nkeep ratio   0.3\n" in output
    assert "changed      10 rows of 5 parameters: 49 elements, 36.03% of the model's" in output
    assert read_info(saved).fingerprint in output


def test_diff_of_checkpoints_finds_the_rows_and_writes_the_delta(
    run: Callable[..., tuple[int, str, str]], checkpoint: Path, tmp_path: Path
) -> None:
    merge_delta(checkpoint / "base", checkpoint / "delta", tmp_path / "trained")
    code, output, _ = run(
        "diff", checkpoint / "base", tmp_path / "trained", "--output", tmp_path / "d"
    )
    assert code == 0
    assert cells(output)[:3] == [
        ["parameter", "changed", "rows", "of", "share"],
        [f"{Q0}.weight", "3", "64", "4.7%"],
        ["model.layers.1.mlp.up_proj.weight", "1", "96", "1.0%"],
    ]
    assert "2 of 21 parameters, 256 of 69,952 elements (0.37%) in rows that differ" in output
    assert "more than half" not in output
    # All but the keep ratio, which a diff cannot know.
    first, second = read_info(checkpoint / "delta"), read_info(tmp_path / "d")
    assert (second.fingerprint, second.rows) == (first.fingerprint, first.rows)
    model = tiny_model().bfloat16().float()
    load_delta(model, tmp_path / "d")
    for name, tensor in torch.load(checkpoint / "trained.pt").items():
        assert_same_bits(model.state_dict()[name], tensor, name)


def test_diff_says_when_most_changed_and_when_nothing_did(
    run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    tiny_model().save_pretrained(a)
    tiny_model(seed=1).save_pretrained(b)
    code, output, _ = run("diff", a, b, "--output", tmp_path / "d")
    assert code == 0
    assert "more than half of the elements changed" in output
    model = tiny_model()
    load_delta(model, tmp_path / "d")
    assert_same_model(model, tiny_model(seed=1))
    assert run("diff", a, a)[1] == (
        "0 of 21 parameters, 0 of 69,952 elements (0.00%) in rows that differ\n"
    )


def test_diff_of_deltas(
    run: Callable[..., tuple[int, str, str]], saved: Path, tmp_path: Path
) -> None:
    other = {**ROWS, "cube": [0, 2, 3, 4], "bias": [5, 6]}
    del other["nothing"], other["transposed"]
    trained = trained_from(Net(), indices(ROWS))
    with torch.no_grad():
        trained.cube[0] += 1
        trained.embed.weight[3, 0] = 5.0
        trained.embed.weight[6, 0] = 5.0
    save(trained, indices(other), tmp_path / "other")
    code, output, _ = run("diff", saved, tmp_path / "other")
    assert code == 0
    assert cells(output) == [
        *cells("parameter  rows only in A  only in B  in both  with other values"),
        ["transposed", "3", "0", "0", "0"],
        ["bias", "1", "2", "0", "0"],
        ["cube", "0", "2", "2", "1"],
        ["nothing", "1", "0", "0", "0"],
        ["embed.weight", "0", "0", "3", "2"],
        ["all", "5", "4", "5", "3"],
    ]  # fmt: skip


def test_mistakes_are_one_line_and_exit_code_2(
    run: Callable[..., tuple[int, str, str]], saved: Path, checkpoint: Path, tmp_path: Path
) -> None:
    net = Net()
    net.bias = nn.Parameter(torch.zeros(3))
    save(net, {}, tmp_path / "other")
    (tmp_path / "empty").mkdir()
    base = checkpoint / "base"
    for arguments, message in [
        (("info", tmp_path / "absent"), "longact delta info: [Errno 2] No such file or directory"),
        (("info", base / "model.safetensors"), "is a safetensors file but no delta"),
        (("info", tmp_path), "Is a directory"),
        (("apply", base, checkpoint / "delta", base), "exists and is not empty"),
        (("apply", tmp_path / "empty", checkpoint / "delta", tmp_path / "o"), "is no checkpoint"),
        (("diff", saved, tmp_path / "absent"), "absent does not exist"),
        (("diff", saved, base), "one of A and B is a directory"),
        (("diff", saved, saved, "--output", tmp_path / "o"), "--output is for two checkpoint"),
        (("diff", saved, tmp_path / "other"), "the deltas are of different models: other shape of"),
        (("diff", base, tmp_path / "empty"), "is no checkpoint that transformers can load"),
    ]:
        code, _, error = run(*arguments)
        assert code == 2, arguments
        # transformers may warn before it
        assert message in error.splitlines()[-1], error
        assert "Traceback" not in error
    assert not (tmp_path / "o").exists()
    assert run()[0] == 2


@pytest.mark.slow
def test_apply_takes_a_base_from_the_hub(checkpoint: Path, tmp_path: Path) -> None:
    """From its cache, as there may be no network."""
    commit, cached = "0" * 40, tmp_path / "hub" / "models--tiny--llama"
    shutil.copytree(checkpoint / "base", cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "longact", "delta", "apply", "tiny/llama"]
    output = subprocess.run(
        [*command, str(checkpoint / "delta"), str(tmp_path / "merged")],
        capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip
    # DeepSpeed, where it is installed, has its say before.
    assert f"\nwrote {tmp_path / 'merged'}: tiny/llama with the rows of" in f"\n{output}"
    merge_delta(checkpoint / "base", checkpoint / "delta", tmp_path / "local")
    files = {file.name: file.read_bytes() for file in (tmp_path / "local").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == files
