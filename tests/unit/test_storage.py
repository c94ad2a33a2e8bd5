"""Errors of disks and stores, told in our words."""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from ftray.errors import RunError
from ftray.storage import StoreSilent, explained, make_folder, reached


@pytest.mark.parametrize(
    ("error", "says", "silent"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left", False),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "no space is left", False),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is left", False),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "no permission", False),
        (OSError(errno.EROFS, "Read-only file system"), "no permission", False),
        (FileNotFoundError("The specified bucket does not exist"), "no such bucket", False),
        (ConnectionRefusedError(), "does not answer", True),
        (TimeoutError(), "does not answer", True),
        (OSError(errno.ESTALE, "Stale file handle"), "again and again", True),
    ],
)
def test_what_a_store_says_is_told(error, says, silent):
    told = explained(error, "s3://someone:secret@bucket/run")
    assert isinstance(told, RunError)
    assert says in told.what
    assert isinstance(told, StoreSilent) == silent
    assert "secret" not in str(told)
    assert told.hint


@pytest.mark.parametrize(
    "error", [FileNotFoundError("x"), ValueError("No space left"), RuntimeError("got 500"), KeyError()]
)
def test_other_errors_are_not_the_stores(error):
    assert explained(error, "s3://bucket/run") is None
    with pytest.raises(type(error)), reached("s3://bucket/run"):
        raise error


def test_around_more_than_the_store_only_what_lasts_is_told():
    with pytest.raises(ConnectionResetError), reached("run", lasting=True):
        raise ConnectionResetError
    with pytest.raises(RunError, match="no space"), reached("run", lasting=True):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_no_bucket_is_made_by_the_way(tmp_path):
    class Made(Exception):
        pass

    class Store:
        protocol = ("s3", "s3a")

        def makedirs(self, path, exist_ok):
            raise Made

    make_folder(Store(), "bucket/folder")
    Store.protocol = ("sftp",)
    with pytest.raises(Made):
        make_folder(Store(), "host/folder")
