"""Deltas: safetensors files that hold only the rows that training changed (docs/deltas.md)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longact.nn import COMPACT_NAMES, CompactSalientLinear
from longact.rows import check_rows, is_sharded

__all__ = [
    "DeltaInfo",
    "Overlap",
    "changed_rows",
    "compare",
    "load_checkpoint",
    "load_delta",
    "merge_delta",
    "read_info",
    "save",
]

FORMAT_VERSION = 1
#: The one key of the file's metadata: with more of them safetensors writes them in any order, and
#: equal deltas would be different files.
_KEY = "longact_delta"
_NO_DIGEST = "0" * 64
#: The file's own digest in its header, where quotes are escaped as the metadata are text in JSON.
_DIGEST = re.compile(rb'\\"sha256\\":\\"(.{64})\\"')
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART_BYTES = 1 << 26  # of a tensor that are looked at or copied to the CPU at once
_WEIGHT_FILES = [
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack"),
    *("*.gguf", "*.onnx", "*.onnx_data"),
]


@dataclass(frozen=True)
class DeltaInfo:
    """What a delta says of itself."""

    format_version: int
    longact_version: str  # that wrote it
    keep_ratio: float | None  # of the run, where it was given
    model_class: str
    model_type: str | None  # transformers' config.model_type
    fingerprint: str  # sha256 over all that the delta leaves as it is
    parameters: int  # with changed rows
    rows: int
    elements: int  # in these rows
    bytes: int  # of the file
    share: float  # of the elements of all the model's parameters


class Overlap(NamedTuple):
    """How many rows of a parameter are in two deltas, A and B."""

    only_a: int
    only_b: int
    both: int
    other_values: int  # of the rows in both, those whose values differ in any bit


class _Form(NamedTuple):
    dtype: str
    shape: tuple[int, ...]


class _Kept(NamedTuple):
    """What must be found of a tensor of the base."""

    form: _Form
    sha256: str  # of the rows that the delta leaves as they are


class _Delta(NamedTuple):
    """A delta in memory, consistent in itself; names in the model's order."""

    path: Path
    info: DeltaInfo
    rows: dict[str, Tensor]
    values: dict[str, Tensor]
    kept: dict[str, _Kept]  # parameters and persistent buffers

    @property
    def forms(self) -> dict[str, _Form]:
        return {name: kept.form for name, kept in self.kept.items()}


def save(
    model: nn.Module,
    rows: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    keep_ratio: float | None = None,
) -> None:
    """Writes `rows` of the parameters of `model`, as they are now, to a delta.

    The file is there whole or not at all. It holds the values themselves, not differences, so the
    trained model comes back bit for bit. With them goes a fingerprint of everything else: of each
    parameter the dtype, the shape and a sha256 of the rows not in the delta, of each persistent
    buffer likewise. What the base has in the rows that the delta replaces does not matter, and is
    not covered.

    Args:
        model: the trained model, whole (no DTensor), on any device. Tensors go to the CPU in parts.
        rows: name, as in `model.named_parameters()` -> ascending distinct row indices, int32
            `[changed rows]`, on any device. All other rows must be the base's.
        path: of the file, in an existing directory; a file that is there is replaced.
        keep_ratio: of the run, only noted.

    Raises:
        ValueError: a name that is no parameter of the model, rows that it does not have, a model
            whose weights are not in memory.
        NotImplementedError: a sharded parameter.
    """
    safetensors = _safetensors()
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a directory" if path.is_dir() else "lies in a directory that does not exist"
        raise ValueError(f"path={str(path)!r} {what}: name a file in an existing directory")
    parameters, buffers = _tensors_of(model)
    chosen = _chosen_rows(model, rows, parameters)
    tensors = {}
    for name, index in chosen.items():
        param = parameters[name]
        tensors[f"rows/{name}"] = index
        tensors[f"values/{name}"] = param.detach().index_select(0, index.to(param.device)).cpu()

    metadata = {
        "format_version": FORMAT_VERSION,
        "sha256": _NO_DIGEST,
        "longact_version": version("longact"),
        "keep_ratio": keep_ratio,
        "model_class": type(model).__name__,
        "model_type": getattr(getattr(model, "config", None), "model_type", None),
        "parameters": {n: [*_form(t), _digest(t, chosen.get(n))] for n, t in parameters.items()},
        "buffers": {name: [*_form(tensor), _digest(tensor)] for name, tensor in buffers.items()},
    }
    text = json.dumps(metadata, separators=(",", ":"))
    data = safetensors.save(tensors, {_KEY: text})
    found = _digest_of(data)
    assert found is not None
    start, digest = found
    _write(path, data[:start], digest, memoryview(data)[start + len(digest) :])


def load_delta(model: nn.Module, path: str | os.PathLike[str]) -> DeltaInfo:
    """Writes the rows of a delta into the parameters of `model`, in place.

    The file and the model are checked first, all of both: what `model` has in all other rows must
    be what the trained model had. It then equals the trained model bit for bit. (Its own values in
    the rows that are replaced do not matter.) If a copy fails midway, what was written is undone.

    Args:
        model: the base, on any device; its projections may be `longact.nn.SalientLinear`.
        path: of a file that `LongAct.save_delta` wrote.

    Raises:
        ValueError: a file that is damaged, no delta, or of a newer format; another base, or the
            same in another dtype. The model is as it was.
        NotImplementedError: a sharded parameter.
    """
    delta = _read(path)
    _apply(delta, model)
    for name, layer in _compact_layers(model):
        if (rows := delta.rows.get(f"{name}.weight")) is not None:
            layer.replaced(rows)  # so that the delta of a run that goes on is on the same base
    return delta.info


def merge_delta(
    base: str | os.PathLike[str],
    delta: str | os.PathLike[str],
    output: str | os.PathLike[str],
) -> None:
    """Writes the trained model as a checkpoint that plain transformers loads.

    The base is loaded by the transformers class of the trained model, in the dtypes of the delta.
    Files of the base that are neither weights nor its README (tokenizer, chat template, licence)
    are copied.

    Args:
        base: directory of a transformers checkpoint, or its name on the hub.
        delta: a file that `LongAct.save_delta` wrote.
        output: a directory that does not exist or is empty.

    Raises:
        ValueError: as `load_delta`; a model that is no transformers class; an output that is not
            empty. Nothing is written then.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output={str(output)!r} exists and is not empty: name a new directory")
    read = _read(delta)
    dtypes = {name: getattr(torch, form.dtype) for name, form in read.forms.items()}
    model = load_checkpoint(base, read.info.model_class, dtypes)
    _apply(read, model)
    folder = Path(base)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(base), ignore_patterns=_WEIGHT_FILES))
    model.save_pretrained(output)
    _copy_other_files(folder, output)


def read_info(path: str | os.PathLike[str]) -> DeltaInfo:
    """What a delta says of itself, after the checks of the file that `load_delta` makes."""
    return _read(path).info


def changed_rows(base: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> the rows that differ in any bit (so also -0.0 from 0.0, or two NaN), int32,
    ascending, on the CPU. Parameters without such rows are left out.

    Raises:
        ValueError: models that rows cannot turn into each other: other parameters, shapes or
            dtypes, or a difference in a buffer or in a parameter without dimensions.
    """
    before, after = _all_tensors_of(base), _all_tensors_of(trained)
    _, buffers = _tensors_of(trained)
    what = "base and trained model differ"
    _check_forms(
        {name: _form(tensor) for name, tensor in after.items()},
        {name: _form(tensor) for name, tensor in before.items()},
        what,
        ("trained model", "base"),
        "load both with dtype=torch.{}",
    )
    found = {name: _differing_rows(before[name], tensor) for name, tensor in after.items()}
    found = {name: rows for name, rows in found.items() if rows.numel()}
    if rowless := [name for name in found if name in buffers or after[name].dim() == 0]:
        raise ValueError(
            f"{what} in {_some(rowless)}: buffers and parameters without dimensions have no rows "
            "that a delta could hold, keep a checkpoint instead"
        )
    return found


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Overlap]:
    """Parameter name -> which of its rows two deltas share, for the parameters in either.

    Raises:
        ValueError: a file that `read_info` refuses, or deltas of different models.
    """
    first, second = _read(a), _read(b)
    of = (str(first.path), str(second.path))
    _check_forms(first.forms, second.forms, "the deltas are of different models", of)
    none = torch.empty(0, dtype=torch.int32)
    overlaps = {}
    for name in first.kept:
        if name not in first.rows and name not in second.rows:
            continue
        rows_a, rows_b = first.rows.get(name, none), second.rows.get(name, none)
        in_b, in_a = torch.isin(rows_a, rows_b), torch.isin(rows_b, rows_a)
        both, other_values = int(in_b.sum()), 0
        if both:  # ascending in both, so the shared rows stand in the same order
            values_a, values_b = _bits(first.values[name])[in_b], _bits(second.values[name])[in_a]
            other_values = int(_any_in_row(values_a != values_b).sum())
        overlaps[name] = Overlap(rows_a.numel() - both, rows_b.numel() - both, both, other_values)
    return overlaps


def load_checkpoint(
    base: str | os.PathLike[str],
    model_class: str | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> Any:
    """The transformers model of a checkpoint, on the CPU.

    Args:
        base: directory of the checkpoint, or its name on the hub.
        model_class: by default the one that its config names.
        dtypes: of its parameters and buffers, by name; by default what transformers chooses.

    Raises:
        ValueError: no class of transformers, nothing that it can load, or not all the weights.
    """
    name = os.fspath(base)
    if not os.path.isdir(name) and (os.path.isabs(name) or name[:1] == "." or name.count("/") > 1):
        raise ValueError(f"{name!r} is no directory (and no name on the hub): pass the base's")
    # Loaded in the widest dtype and then rounded: the bits that loading in each one gives.
    dtypes = dtypes or {}
    floating = [dtype for dtype in dtypes.values() if dtype.is_floating_point]
    widest = functools.reduce(torch.promote_types, floating) if floating else "auto"
    transformers = _transformers()
    if model_class is None:
        with _loading(base):
            config = transformers.AutoConfig.from_pretrained(base)
        model_class = (config.architectures or ["(none in its config)"])[0]
    kind = getattr(transformers, model_class, None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"model class {model_class} is not one of transformers: build the model and use "
            "longact.load_delta(model, path)"
        )
    load: Any = kind
    with _loading(base):
        model, report = load.from_pretrained(base, dtype=widest, output_loading_info=True)
    if lacking := sorted([*report["missing_keys"], *report["mismatched_keys"]], key=str):
        raise ValueError(
            f"{str(base)!r} lacks weights of a {model_class}, or has them in other shapes: "
            f"{_some([str(key) for key in lacking])}"
        )
    for name, tensor in _all_tensors_of(model).items():
        if tensor.is_floating_point() and tensor.dtype != dtypes.get(name, tensor.dtype):
            tensor.data = tensor.data.to(dtypes[name])
    return model


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f"deltas need safetensors: pip install 'longact[transformers]' ({error})"
        ) from error
    return safetensors.torch


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"checkpoints need transformers: pip install 'longact[transformers]' ({error})"
        ) from error
    return transformers


@contextlib.contextmanager
def _loading(base: str | os.PathLike[str]) -> Iterator[None]:
    """One type for the many that transformers raises."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{str(base)!r} is no checkpoint that transformers can load ({error})"
        ) from error


def _tensors_of(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, tied ones once, and persistent buffers, by name."""
    transient = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    held = {
        id(getattr(layer, name))
        for _, layer in _compact_layers(model)
        for name in COMPACT_NAMES  # copies of rows of the weight
    }
    parameters: dict[str, Tensor] = {
        name: param for name, param in model.named_parameters() if id(param) not in held
    }
    buffers = {name: tensor for name, tensor in model.named_buffers() if name not in transient}
    for name, tensor in {**parameters, **buffers}.items():
        if is_sharded(tensor):
            raise NotImplementedError(
                f"{name} is sharded (a DTensor): gather the weights (torch.distributed.checkpoint."
                "state_dict.get_model_state_dict with full_state_dict=True), load them into the "
                "model built without sharding, and use that"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} is on the meta device: load all of the model into memory, not offloaded"
            )
    return parameters, buffers


def _compact_layers(model: nn.Module) -> list[tuple[str, CompactSalientLinear]]:
    layers = model.named_modules()
    return [(name, layer) for name, layer in layers if isinstance(layer, CompactSalientLinear)]


def _all_tensors_of(model: nn.Module) -> dict[str, Tensor]:
    parameters, buffers = _tensors_of(model)
    return {**parameters, **buffers}


def _chosen_rows(
    model: nn.Module, rows: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Checked, int32 on the CPU; without those that are empty."""
    chosen = {}
    for name, index in rows.items():
        if name not in parameters:
            known = dict(model.named_parameters(remove_duplicate=False)).get(name)
            tied = [other for other, param in parameters.items() if param is known]
            why = f"is tied to {tied[0]}: use that name" if tied else "is no parameter of the model"
            raise ValueError(f"rows has {name!r}, which {why} (model.named_parameters() lists all)")
        here = index.detach().cpu()
        _check_rows(here, tuple(parameters[name].shape), name)
        if here.numel():
            chosen[name] = here.to(torch.int32, copy=True).contiguous()  # not one for two names
    return chosen


def _check_rows(rows: Tensor, shape: tuple[int, ...], name: str) -> None:
    try:
        check_rows(rows, torch.empty(()).expand(shape))  # nothing is allocated
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, rows still in dimension 0: they compare and copy exactly."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.view(_INTEGERS[tensor.element_size()])


def _any_in_row(differs: Tensor) -> Tensor:
    return differs.unsqueeze(-1).flatten(1).any(1)


def _as_rows(bits: Tensor) -> Tensor:
    return bits if bits.dim() else bits.unsqueeze(0)


def _parts(bits: Tensor) -> Iterator[slice]:
    """Slices of rows, small enough to be copied."""
    step = max(1, _PART_BYTES // max(1, prod(bits.shape[1:]) * bits.element_size()))
    return (slice(start, start + step) for start in range(0, bits.shape[0], step))


def _form(tensor: Tensor) -> _Form:
    return _Form(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _digest(tensor: Tensor, replaced: Tensor | None = None) -> str:
    """sha256 of dtype, shape and the bytes of all rows that are not `replaced`."""
    dtype, shape = _form(tensor)
    digest = hashlib.sha256(f"{dtype} {[*shape]}\n".encode())
    bits = _as_rows(_bits(tensor))
    keep = None
    if replaced is not None:
        keep = torch.ones(bits.shape[0], dtype=torch.bool)
        keep[replaced.long()] = False
        keep = keep.to(bits.device)
    for part in _parts(bits):
        rows = bits[part] if keep is None else bits[part][keep[part]]
        digest.update(rows.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _differing_rows(a: Tensor, b: Tensor) -> Tensor:
    bits_a, bits_b = _as_rows(_bits(a)), _as_rows(_bits(b))
    differs = [torch.zeros(0, dtype=torch.bool)]
    for part in _parts(bits_b):
        differs.append(_any_in_row(bits_a[part].to(b.device) != bits_b[part]).cpu())
    return torch.cat(differs).nonzero().squeeze(1).to(torch.int32)


def _some(names: Collection[str]) -> str:
    first = ", ".join([*names][:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _check_forms(
    expected: Mapping[str, _Form],
    actual: Mapping[str, _Form],
    what: str,
    whose: tuple[str, str],
    dtype_remedy: str | None = None,
) -> None:
    """Raises ValueError unless names, shapes and dtypes are the same."""
    pairs = ((expected, actual, whose[0]), (actual, expected, whose[1]))
    only = [
        f"only the {owner} has {_some(names)}"
        for one, other, owner in pairs
        if (names := [name for name in one if name not in other])
    ]
    if only:
        raise ValueError(f"{what}: {', '.join(only)}")
    for field in ("shape", "dtype"):
        values = {
            name: (getattr(expected[name], field), getattr(actual[name], field))
            for name in expected
        }
        differing = [name for name, (one, other) in values.items() if one != other]
        if differing:
            one, other = (str([*v]) if field == "shape" else v for v in values[differing[0]])
            remedy = f": {dtype_remedy.format(one)}" if dtype_remedy and field == "dtype" else ""
            raise ValueError(
                f"{what}: other {field} of {_some(differing)} ({one} in the {whose[0]}, {other} in "
                f"the {whose[1]}){remedy}"
            )


def _apply(delta: _Delta, model: nn.Module) -> None:
    """All checks of the model, then all writes."""
    tensors = _all_tensors_of(model)
    what = f"{delta.path} does not fit this model"
    forms = {name: _form(tensor) for name, tensor in tensors.items()}
    whose = (f"delta's {delta.info.model_class}", "model")
    _check_forms(delta.forms, forms, what, whose, "load the base with dtype=torch.{}")
    differing = [
        name
        for name, kept in delta.kept.items()
        if _digest(tensors[name], delta.rows.get(name)) != kept.sha256
    ]
    if differing:
        raise ValueError(
            f"{what}: {len(differing)} of {len(tensors)} tensors differ from the base in what the "
            f"delta leaves as it is ({_some(differing)}): load what the training started from"
        )

    # Everything that needs memory comes before the first write.
    writes = []
    for name, rows in delta.rows.items():
        bits = _bits(tensors[name])
        index = rows.to(bits.device).long()
        new = _bits(delta.values[name]).to(bits.device)
        writes.append((bits, index, new, bits.index_select(0, index)))
    begun = 0
    try:
        for bits, index, new, _ in writes:
            begun += 1
            bits.index_copy_(0, index, new)
    except BaseException:
        for bits, index, _, old in reversed(writes[:begun]):
            with contextlib.suppress(Exception):  # the write that failed may fail again
                bits.index_copy_(0, index, old)
        raise


def _header(data: bytes) -> bytes:
    """The JSON at the start of a safetensors file, which comes after its length."""
    return data[8 : 8 + int.from_bytes(data[:8], "little")]


def _digest_of(data: bytes) -> tuple[int, bytes] | None:
    """Where a delta has its digest, and what it must be: of the file with zeros in this place."""
    found = [*_DIGEST.finditer(_header(data))]
    if len(found) != 1:
        return None
    start = 8 + found[0].start(1)
    digest = hashlib.sha256(memoryview(data)[:start])
    digest.update(_NO_DIGEST.encode())
    digest.update(memoryview(data)[start + len(_NO_DIGEST) :])
    return start, digest.hexdigest().encode()


def _read(path: str | os.PathLike[str]) -> _Delta:
    """A delta that is intact and consistent in itself, or ValueError."""
    safetensors = _safetensors()
    path = Path(path)
    data = path.read_bytes()
    try:
        metadata = json.loads(_header(data)).get("__metadata__") or {}
    except (ValueError, AttributeError):
        raise ValueError(f"{path} is no safetensors file, or a damaged one") from None
    if _KEY not in metadata:
        raise ValueError(
            f"{path} is a safetensors file but no delta: those come from handle.save_delta(path)"
        )
    found = _digest_of(data)
    is_intact = found is not None and data[found[0] :].startswith(found[1])
    try:
        fields = json.loads(metadata[_KEY])
        format_version = fields["format_version"]
    except (ValueError, TypeError, KeyError):
        is_intact, format_version = False, FORMAT_VERSION
    if format_version != FORMAT_VERSION:
        damaged = "" if is_intact else ", or damaged"
        raise ValueError(
            f"{path} is a delta of format {format_version}{damaged}: this longact reads format "
            f"{FORMAT_VERSION}, update it (pip install -U longact)"
        )
    if not is_intact:
        raise ValueError(f"{path} is damaged (its sha256 is another): copy or save it again")
    try:
        return _parse(path, len(data), fields, safetensors.load(data))
    except Exception as error:  # written so: the digest is right
        raise ValueError(f"{path} is malformed: {error!r}") from error


def _parse(path: Path, size: int, fields: dict[str, Any], tensors: dict[str, Tensor]) -> _Delta:
    parameters, buffers = (
        {
            name: _Kept(_Form(dtype, tuple(shape)), sha256)
            for name, (dtype, shape, sha256) in of.items()
        }
        for of in (fields["parameters"], fields["buffers"])
    )
    kept = {**parameters, **buffers}
    rows = {name: tensors[f"rows/{name}"] for name in parameters if f"rows/{name}" in tensors}
    values = {name: tensors[f"values/{name}"] for name in rows}
    if len(rows) + len(values) != len(tensors):
        known = {f"{kind}/{name}" for name in rows for kind in ("rows", "values")}
        raise ValueError(f"no place for {_some(tensors.keys() - known)}")
    for name, index in rows.items():
        dtype, shape = kept[name].form
        _check_rows(index, shape, name)
        expected = _Form(dtype, (index.numel(), *shape[1:]))
        if index.dtype != torch.int32 or _form(values[name]) != expected:
            raise ValueError(f"{name}: rows or values of another dtype or shape")
    dtypes = {form.dtype for form, _ in kept.values()}
    if unknown := [d for d in dtypes if not isinstance(getattr(torch, d, None), torch.dtype)]:
        raise ValueError(f"this torch has no dtype {_some(unknown)}")
    elements = sum(v.numel() for v in values.values())
    of_all = sum(prod(form.shape) for form, _ in parameters.values())
    listed = json.dumps({name: [*form, sha256] for name, (form, sha256) in sorted(kept.items())})
    info = DeltaInfo(
        format_version=fields["format_version"],
        longact_version=fields["longact_version"],
        keep_ratio=fields["keep_ratio"],
        model_class=fields["model_class"],
        model_type=fields["model_type"],
        fingerprint=hashlib.sha256(listed.encode()).hexdigest(),
        parameters=len(rows),
        rows=sum(index.numel() for index in rows.values()),
        elements=elements,
        bytes=size,
        share=elements / max(1, of_all),
    )
    return _Delta(path, info, rows, values, kept)


def _copy_other_files(folder: Path, output: Path) -> None:
    """What a checkpoint has beside weights, its card and what transformers wrote."""
    for file in folder.iterdir():
        is_weights = any(file.match(pattern) for pattern in _WEIGHT_FILES)
        is_other = not is_weights and not file.name.startswith(".") and file.name != "README.md"
        if file.is_file() and is_other and not (output / file.name).exists():
            shutil.copyfile(file, output / file.name)


def _write(path: Path, *parts: bytes | memoryview) -> None:
    """In one piece: a reader finds what was there before, or all of it."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
