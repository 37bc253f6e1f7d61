"""Reads the text of a PDF or DOCX as one document, by the packages pypdf and python-docx; knows no other format."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lowvram.data.bad_rows import BadRow
from lowvram.data.fields import check_text
from lowvram.data.text_stream import need
from lowvram.errors import DataError, MachineError

# What the packages raise for damaged files beside errors of their own.
_DAMAGES = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
    RecursionError,
)


def pdf_document(file: Path, plain: IO[bytes]) -> Iterator[str | BadRow]:
    """Yield the text of all pages; a scanned page has none.  Raises DataError for a damaged or encrypted file.

    Raises MachineError where it is encrypted without a password and a package that decrypts is missing.
    """
    pypdf = need("pypdf")
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of every fault that it reads past
    try:
        reader = pypdf.PdfReader(plain)
        if reader.is_encrypted and not reader.decrypt(""):
            raise DataError(f"{file} is encrypted.", "It opens with a password alone.", "Save it without one.")
        pages = [page.extract_text() for page in reader.pages]
    except pypdf.errors.DependencyError as error:
        what = f"Reading {file} needs the package cryptography."
        fix = "Type: pip install cryptography"
        raise MachineError(what, "It is encrypted, and that package is not installed.", fix) from error
    except (pypdf.errors.PyPdfError, *_DAMAGES) as error:
        raise DataError(f"{file} is a damaged PDF.", f"{type(error).__name__}: {error}.", "Fetch it anew.") from error
    # NUL stands for letters of fonts without a table of characters.
    text = (
        "\n".join(page.replace("\0", "") for page in pages)
        .encode("utf-16", "surrogatepass")
        .decode("utf-16", "replace")
    )
    if not text.strip():
        raise DataError(f"{file} holds no text.", "Its pages are pictures.", "Recognise its text first (OCR).")
    yield check_text(str(file), "text", text)


def docx_document(file: Path, plain: IO[bytes]) -> Iterator[str | BadRow]:
    """Yield paragraphs and cells of tables, in their order.  Raises DataError for a damaged file."""
    docx = need("docx", "python-docx")
    try:
        document = docx.Document(plain)
        lines = [line for block in document.iter_inner_content() for line in _lines_of(block)]
    except (zipfile.BadZipFile, docx.opc.exceptions.OpcError, SyntaxError, *_DAMAGES) as error:
        raise DataError(f"{file} is a damaged DOCX.", f"{type(error).__name__}: {error}.", "Fetch it anew.") from error
    yield check_text(str(file), "text", "\n".join(lines))


def _lines_of(block: Any) -> Iterator[str]:
    if hasattr(block, "rows"):
        for row in block.rows:
            yield "\t".join(cell.text for cell in row.cells)
    else:
        yield block.text
