"""Disks that are full or read-only and files that cannot be read: one error, and what
was there before stays as it was.

The disks are real ones, mounted where nobody else sees them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc_attnmask.builtin import MODEL_DIR
from llmc_attnmask.checkpoint.convert import pack
from tests.checkpoint.checkpoints import decoder, prune_2of4, write

ROOT = Path(__file__).parents[2]
UNSHARED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
PRUNE = f"prune {MODEL_DIR} --recipe attention_2of4 --num-samples 2 --max-length 64"


def possible(script: str) -> bool:
    try:
        return subprocess.run([*UNSHARED, script], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not possible("mount -t tmpfs tmpfs /mnt"), reason="needs unshare and mount"
)


def command(mount: str, arguments: str, disk: Path) -> str:
    """Error lines of a command on a disk of its own, which must fail; then the disk's
    files.
    """
    script = f"""
    {mount}
    cd {disk}
    set +e
    {sys.executable} -m llmc_attnmask.cli {arguments}
    echo "exit code $?"
    find . -type f
    """
    done = subprocess.run(
        [*UNSHARED, script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "exit code 1\n" in done.stdout, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    return "\n".join([*errors, *done.stdout.splitlines()[1:]])


def small(disk: Path, size: str) -> str:
    return f"""mount -t tmpfs -o size={size} tmpfs {disk}
    mkdir {disk}/before
    echo kept > {disk}/before/config.json"""


@pytest.fixture
def disk(tmp_path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped model at 2:4, dense and packed: 3.7 and 2.2 MB."""
    folder = tmp_path_factory.mktemp("model")
    prune_2of4(MODEL_DIR, folder / "dense")
    pack(folder / "dense", folder / "packed")
    return folder


@needs_mounts
@pytest.mark.parametrize(
    "arguments",
    ["pack {}/dense out", "unpack {}/packed out", f"{PRUNE} --output out"],
    ids=["pack", "unpack", "prune"],
)
def test_a_disk_that_is_full(disk, folders, arguments):
    shown = command(small(disk, "1m"), arguments.format(folders), disk)
    error, *left = shown.splitlines()
    assert error.startswith("error: [Errno 28] No space left on device: '"), shown
    left.remove("./before/config.json")
    # of `prune` the finished layers, which --resume goes on from
    kept = [Path(name) for name in left if name.startswith("./out/.progress/")]
    assert len(kept) == len(left) and bool(kept) == arguments.startswith("prune"), shown
    assert not [path for path in kept if path.name.startswith(".")], "half a file"


@needs_mounts
@pytest.mark.parametrize(
    "arguments",
    ["pack {}/dense out", f"{PRUNE} --output out"],
    ids=["pack", "prune"],
)
def test_a_disk_that_is_read_only(disk, folders, arguments):
    mount = f"{small(disk, '9m')}\n    mount -o remount,ro {disk}"
    shown = command(mount, arguments.format(folders), disk)
    error, *left = shown.splitlines()
    assert re.match(r"error: output .*out cannot be created: .*written to$", error), (
        shown
    )
    assert left == ["./before/config.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody else")
def test_a_folder_of_somebody_elses_is_refused(tmp_path):
    """Root may write anywhere, so this is tried as nobody."""
    dense = write(tmp_path / "dense", decoder(layers=1))
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o755)
    for path in (tmp_path, *tmp_path.parents):
        if (
            path.stat().st_uid == 0
            and path.is_relative_to("/tmp")
            and path != Path("/tmp")
        ):
            path.chmod(0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            pack(dense, theirs / "out")
        except PermissionError as error:
            code = 0 if "cannot be created" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(theirs.iterdir())


def test_a_shard_that_ends_while_it_is_read_is_one_error(tmp_path, monkeypatch):
    """Cut off after its header was found to be good, as by another process."""
    dense = write(tmp_path / "dense", decoder(layers=1))
    file = dense / "model.safetensors"

    def cut(checkpoint, output):
        os.truncate(file, file.stat().st_size - 2000)
        return []

    monkeypatch.setattr("llmc_attnmask.checkpoint.convert.copy_others", cut)
    with pytest.raises(
        ValueError, match=r"model\.safetensors ends within .*: truncated"
    ):
        pack(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
