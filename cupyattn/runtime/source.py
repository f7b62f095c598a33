"""Where kernel sources live, and what a source consists of once its includes are followed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


def kernels_root() -> Path:
    """Return the folder of the kernel sources: inside the wheel, or beside the package in a checkout."""
    candidates = (_PACKAGE / "_kernels_cu", _PACKAGE.parent / "kernels_cu")
    for root in candidates:
        if (root / "include").is_dir():
            return root
    looked = " or ".join(str(path) for path in candidates)
    raise FileNotFoundError(f"the CUDA sources of cupyattn are missing: looked for {looked}")


def get_include() -> str:
    """Return the include folder of cupyattn's device headers, as ``numpy.get_include()`` does for NumPy's.

    Returns
    -------
    str
        Pass it as ``-I`` to NVRTC, nvcc or CuPy, then ``#include <cupyattn/state.cuh>`` and the like.

    Examples
    --------
    >>> options = ("-std=c++17", "-I" + get_include())
    """
    return str(kernels_root() / "include")


@dataclass(frozen=True)
class Source:
    """A ``.cu`` file with the headers it reaches.

    Attributes
    ----------
    path : Path
        Absolute path; compile errors name it.
    text : str
        Its contents.
    headers : tuple of Path
        Every header found, directly or through other headers.
    sha256 : str
        Over the contents of all of them. Paths do not enter, so a checkout and a wheel share builds.
    """

    path: Path
    text: str
    headers: tuple[Path, ...]
    sha256: str


def read_source(path: Path, include_dirs: Iterable[Path] = ()) -> Source:
    """Read a kernel source and every header it includes.

    Headers that are not found (the compiler's own, such as ``<cuda_fp16.h>``) are left to the compiler, whose
    version is part of the cache key. Conditionals are not evaluated: a header under a false ``#if`` counts
    too, which can cost a needless compile but never a stale one.

    Raises
    ------
    FileNotFoundError
        If `path` does not exist.
    """
    path = path.resolve()
    search = tuple(include_dirs)
    text = path.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode())
    headers: dict[Path, None] = {}  # an ordered set
    pending = [(path, text)]
    while pending:
        parent, body = pending.pop()
        for quoted, angled in _INCLUDE.findall(body):
            local = (parent.parent,) if quoted else ()
            found = _find(quoted or angled, (*local, *search))
            if found is None or found in headers:
                continue
            headers[found] = None
            content = found.read_text(encoding="utf-8")
            digest.update(f"\0{quoted or angled}\0{len(content)}\0{content}".encode())
            pending.append((found, content))
    return Source(path, text, tuple(headers), digest.hexdigest())


def _find(name: str, folders: Iterable[Path]) -> Path | None:
    for folder in folders:
        if (candidate := folder / name).is_file():
            return candidate.resolve()
    return None
