"""Full or read-only disks and unreadable files cause one error; existing files stay.

The disks are real ones, mounted where no other process sees them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llmc_attnmask.checkpoint.convert import to_packed
from llmc_attnmask.oneshot.shipped import MODEL_DIR
from tests.support.checkpoints import decoder, prune_2of4, write

ROOT = Path(__file__).parents[3]
UNSHARED = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]


def possible(script: str) -> bool:
    try:
        return subprocess.run([*UNSHARED, script], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(
    not possible("mount -t tmpfs tmpfs /mnt"), reason="needs unshare and mount"
)


# all commands in one process: imports take longer than the work
COMMANDS = """
import contextlib, io, os, sys
from llmc_attnmask.cli import main
for line in sys.stdin:
    disk, *sys.argv[1:] = line.split()
    os.chdir(disk)
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        try:
            main()
        except SystemExit as ended:
            printed.write(f"exit code {ended.code}")
    print("#", *sys.argv[1:2], os.path.basename(disk))
    print(*[x for x in printed.getvalue().splitlines() if "error:" in x or "exit" in x])
    for folder, _, files in os.walk("."):
        print(*[os.path.join(folder, file) for file in files], sep="\\n")
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> dict[str, tuple[str, list[str]]]:
    """Return what each command prints on its own disk, and the files left there."""
    base = tmp_path_factory.mktemp("disks")
    prune_2of4(MODEL_DIR, base / "dense")  # 3.7 MB
    to_packed(base / "dense", base / "packed")
    arguments = {
        "pack": f"pack {base}/dense out",
        "unpack": f"unpack {base}/packed out",
        "prune": f"prune {MODEL_DIR} --recipe attention_2of4 --num-samples 2 "
        "--max-length 64 --output out",
    }
    script, lines = "", []
    for command, words in arguments.items():
        for kind, option in (("full", "size=1m"), ("read-only", "size=9m")):
            disk = base / command / kind
            disk.mkdir(parents=True)
            script += f"mount -t tmpfs -o {option} tmpfs {disk}\n"
            script += f"mkdir {disk}/before && echo kept > {disk}/before/config.json\n"
            if kind == "read-only":
                script += f"mount -o remount,ro {disk}\n"
            lines.append(f"{disk} {words}")
    done = subprocess.run(
        [*UNSHARED, f"{script}exec {sys.executable} -c '{COMMANDS}'"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for part in done.stdout.split("# ")[1:]:
        name, error, *files = part.splitlines()
        found[name] = error, [file for file in files if file]
    return found


@needs_mounts
@pytest.mark.parametrize("command", ["pack", "unpack", "prune"])
def test_a_full_disk_is_one_error(shown, command):
    error, files = shown[f"{command} full"]
    assert error.startswith("error: [Errno 28] No space left on device: '"), error
    assert error.endswith("exit code 1")
    files.remove("./before/config.json")
    # `prune` keeps the finished layers, from which --resume continues
    kept = [Path(name) for name in files if name.startswith("./out/.progress/")]
    assert len(kept) == len(files) and bool(kept) == (command == "prune"), files
    assert not [path for path in kept if path.name.startswith(".")], "half a file"


@needs_mounts
@pytest.mark.parametrize("command", ["pack", "unpack", "prune"])
def test_a_read_only_disk_is_one_error(shown, command):
    error, files = shown[f"{command} read-only"]
    expected = (
        r"error: output .*out cannot be created: .* is not a writable folder "
        r"exit code 1"
    )
    assert re.fullmatch(expected, error)
    assert files == ["./before/config.json"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_that_belongs_to_another_user_is_refused(tmp_path):
    """Root may write anywhere, so this runs as the user nobody."""
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
            to_packed(dense, theirs / "out")
        except PermissionError as error:
            code = 0 if "cannot be created" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not list(theirs.iterdir())


def test_a_shard_that_is_truncated_while_it_is_read_is_one_error(tmp_path, monkeypatch):
    """As if another process truncated it after its header was checked."""
    dense = write(tmp_path / "dense", decoder(layers=1))
    file = dense / "model.safetensors"

    def cut(checkpoint, output):
        os.truncate(file, file.stat().st_size - 2000)
        return []

    monkeypatch.setattr("llmc_attnmask.checkpoint.convert.copy_others", cut)
    with pytest.raises(
        ValueError, match=r"model\.safetensors ends within .*: truncated"
    ):
        to_packed(dense, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
