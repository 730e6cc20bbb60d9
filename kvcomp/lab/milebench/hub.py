"""Downloading one archive with the functions of `huggingface_hub`, so that a download that was cut off goes on.

`hf_hub_download` of `huggingface_hub` 2 starts a file anew in every process, so its pieces are put together here: the
unfinished file keeps its name, and the next call asks for what is missing.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from kvcomp.core.errors import InputError
from kvcomp.lab.milebench.archives import REPOSITORY, Archive
from kvcomp.lab.milebench.extraction import Meter


def download_from_hub(archive: Archive, folder: Path, meter: Meter, endpoint: str | None = None) -> Path:
    """Return the path of a whole archive. It is checked only later; but where the hub tells a checksum, that one now.

    Args:
        archive: which one.
        folder: where it goes.
        meter: told of the progress.
        endpoint: of the hub; None for what `HF_ENDPOINT` or the library says.

    Raises:
        InputError: the hub cannot be reached, or does not have it, or has another file under its name.
    """
    path = folder / archive.name
    if path.exists():
        return path
    try:
        _download(archive, path, meter, endpoint)
    except InputError:
        raise
    except Exception as error:  # the library passes on errors of whichever HTTP library it uses
        reason = " ".join(str(error).split())
        raise InputError(
            f"{archive.name} cannot be downloaded from the dataset {REPOSITORY}: {reason}; the same call again goes on "
            "where this one stopped"
        ) from error
    return path


def _download(archive: Archive, path: Path, meter: Meter, endpoint: str | None) -> None:
    url = hf_hub_url(REPOSITORY, archive.name, repo_type="dataset", endpoint=endpoint)
    metadata = get_hf_file_metadata(url, endpoint=endpoint)
    etag = metadata.etag or ""
    if re.fullmatch("[0-9a-f]{64}", etag) and not etag.startswith(archive.sha256):
        raise InputError(
            f"{archive.name} must have a SHA-256 that begins with {archive.sha256}, and the hub's has {etag}; it was "
            "changed there since"
        )
    unfinished = path.with_name(f"{path.name}.{re.sub('[^0-9A-Za-z]', '', etag)[:16]}.unfinished")
    with unfinished.open("ab") as file:
        http_get(
            url,
            file,
            resume_size=file.tell(),
            headers=build_hf_headers(),
            expected_size=metadata.size,
            tqdm_class=_make_bar(f"downloading {archive.name}", meter),
        )
    unfinished.rename(path)


def _make_bar(what: str, meter: Meter) -> type[tqdm]:
    """Return a class that tells the meter what a progress bar would show."""

    class Bar(tqdm):  # type: ignore[misc]
        """Shows nothing itself."""

        monitor_interval = 0  # no thread that watches a bar nobody sees

        def __init__(self, *args: Any, **options: Any) -> None:
            always = {"file": io.StringIO(), "disable": False, "mininterval": 0, "miniters": 1}
            super().__init__(*args, **options | always)  # type: ignore[no-untyped-call]

        def display(self, *args: Any, **options: Any) -> None:
            meter(what, int(self.n), None if self.total is None else int(self.total))

    return Bar
