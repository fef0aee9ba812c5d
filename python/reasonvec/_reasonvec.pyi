"""
The compiled core of reasonvec. The public API is the Python package around it.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import SupportsIndex, final

from typing_extensions import CapsuleType

__all__ = [
    "Checkpoint",
    "Tensor",
    "VectorFolder",
    "apply",
    "copy_whole",
    "corrections",
    "diff",
    "digest_file",
    "digest_tensors",
    "extract",
    "is_debug_build",
    "journal_name",
    "measure",
    "predict",
    "recompress",
    "simd_level",
    "simd_levels",
    "spectrum",
    "svd",
    "svd_memory",
    "values",
    "verify_vector",
    "version",
    "write_whole",
]

@final
class Checkpoint:
    """
    An opened checkpoint: its headers are read and checked, its tensors are not.
    """
    def __contains__(self, name: str, /) -> bool: ...
    def __len__(self, /) -> int: ...
    def __new__(cls, /, path: str | PathLike[str], stem: str = "model") -> Checkpoint:
        """
        Opens a folder of safetensors shards, or one file.
        """
    @property
    def index(self, /) -> str | None:
        """
        Name of the index file, if there is one.
        """
    def metadata(self, /, shard: str) -> list[tuple[str, str]]:
        """
        `__metadata__` of a shard.
        """
    @property
    def notes(self, /) -> list[str]:
        """
        Oddities that were survived.
        """
    @property
    def path(self, /) -> Path:
        """
        The path that was opened.
        """
    def shards(self, /) -> list[str]:
        """
        Names of the shards.
        """
    def tensor(self, /, name: str) -> Tensor:
        """
        One tensor, without a copy.
        """
    def tensors(self, /) -> list[tuple[str, str, list[int], str]]:
        """
        Every tensor as (name, dtype, shape, shard), in the order of shards and bytes.
        """

@final
class Tensor:
    """
    Bytes of a shard (or computed values) with a dtype and a shape.

    `torch.from_dlpack(t)` and `numpy.from_dlpack(t)` share its memory; `memoryview(t)` and
    `numpy.asarray(t)` see it read-only. bf16 stays bf16 in DLPack; in the buffer protocol, which
    has no name for it, its elements are their 16-bit patterns (format "H"). Writing through DLPack
    changes this process's private pages, never the file.
    """
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        /,
        *,
        stream: object | None = None,
        max_version: object | None = None,
        dl_device: tuple[SupportsIndex, SupportsIndex] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType:
        """
        A DLPack capsule that shares this memory.
        """
    def __dlpack_device__(self, /) -> tuple[int, int]:
        """
        The DLPack device: (1, 0), the processor.
        """
    def __len__(self, /) -> int: ...
    def __repr__(self, /) -> str: ...
    @property
    def dtype(self, /) -> str:
        """
        The format's safetensors name: "BF16", "F32", ...
        """
    @property
    def nbytes(self, /) -> int:
        """
        Bytes.
        """
    @property
    def shape(self, /) -> tuple[int, ...]:
        """
        The shape.
        """

@final
class VectorFolder:
    """
    An opened vector folder: its manifest and headers are read and checked.
    """
    def __len__(self, /) -> int: ...
    def __new__(cls, /, path: str | PathLike[str]) -> VectorFolder:
        """
        Opens a folder.
        """
    @property
    def path(self, /) -> Path:
        """
        The path that was opened.
        """
    def tensors(self, /) -> list[tuple[str, str, list[int]]]:
        """
        Every tensor as (name, dtype of the donors, shape).
        """

def apply(
    plan: str,
    operands: Sequence[Checkpoint | VectorFolder],
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """
    Writes the shards of an apply plan. `progress(done, total)` is called with bytes.
    """

def copy_whole(
    source: str | PathLike[str], destination: str | PathLike[str], sync: bool = True
) -> None:
    """
    Copies a file whole or not at all, inside the kernel where it can.
    """

def corrections(
    terms: str,
    name: str,
    elements: SupportsIndex,
    start: SupportsIndex,
    stop: SupportsIndex,
    operands: Sequence[Checkpoint | VectorFolder],
) -> list[tuple[int, float]]:
    """
    What `values` leaves out of stored vectors: places from `start`, and F64 to add there.
    """

def diff(
    a: Checkpoint,
    b: Checkpoint,
    names: Sequence[str],
    settings: str,
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """
    Exact counts of the elements that differ between two checkpoints.
    """

def digest_file(path: str | PathLike[str], algorithm: str) -> str | None:
    """
    The digest of any file, as if it were a tensor of bytes.
    """

def digest_tensors(
    checkpoint: Checkpoint,
    names: Sequence[str],
    algorithm: str,
    settings: str,
    progress: Callable[[int, int], object] | None = None,
) -> list[str | None]:
    """
    The digests of some tensors of a checkpoint.
    """

def extract(
    plan: str,
    operands: Sequence[Checkpoint | VectorFolder],
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """
    Writes a vector folder from an extract plan; its manifest.
    """

def is_debug_build() -> bool:
    """
    Whether the core was compiled without optimisation, and is therefore slow.
    """

def journal_name() -> str:
    """
    The name of the journal that an unfinished run leaves in its output folder.
    """

def measure(
    plan: str,
    operands: Sequence[Checkpoint | VectorFolder],
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """
    Norms, products, counts and largest elements of quantities, in one pass.
    """

def predict(plan: str, operands: Sequence[Checkpoint | VectorFolder]) -> str:
    """
    What an apply plan will read, write and hold, from headers alone.
    """

def recompress(
    u: bytes, v: bytes, rows: SupportsIndex, columns: SupportsIndex, k: SupportsIndex, rank: str
) -> tuple[Tensor, Tensor, Tensor, str]:
    """
    Singular triplets, as `svd` gives them, of a product of thin factors: u is rows x k and v
    columns x k, both F32 as bytes. `rank` is that of an svd plan, but for the noise floor.
    """

def simd_level() -> str:
    """
    The SIMD level in use: the best, or what REASONVEC_SIMD asks for.
    """

def simd_levels() -> list[str]:
    """
    The SIMD levels of this processor, the best last.
    """

def spectrum(
    plan: str,
    operands: Sequence[Checkpoint | VectorFolder],
    progress: Callable[[int, int], object] | None = None,
) -> str:
    """
    Singular values of one matrix of a plan, its sum of squares and its noise floor, as JSON.
    """

def svd(
    plan: str,
    operands: Sequence[Checkpoint | VectorFolder],
    progress: Callable[[int, int], object] | None = None,
    double: bool = False,
) -> tuple[Tensor, Tensor, Tensor, str]:
    """
    Singular triplets of one matrix of a plan: U `[m, r]`, S `[r]` (F64), V^T `[r, n]`, the rest
    as JSON. U and V^T are F32, or F64 if `double`, which is for the smallest ones.
    """

def svd_memory(plan: str) -> tuple[int, int]:
    """
    Bytes of anonymous memory that `svd` takes at least and at most, of a shape and a rank.
    """

def values(
    terms: str,
    name: str,
    elements: SupportsIndex,
    start: SupportsIndex,
    stop: SupportsIndex,
    operands: Sequence[Checkpoint | VectorFolder],
    double: bool = False,
) -> Tensor:
    """
    Elements `start..stop` of a sum of terms, as F32, or as F64 if `double`.
    """

def verify_vector(
    vector: VectorFolder, settings: str, progress: Callable[[int, int], object] | None = None
) -> None:
    """
    Checks every stored part of a vector folder against its manifest's digests.
    """

def version() -> str:
    """
    The version of the compiled core.
    """

def write_whole(path: str | PathLike[str], content: bytes, sync: bool = True) -> None:
    """
    Writes a small file whole or not at all: beside its name, synced, renamed.
    """
