"""examples/generate.py as a command: options, messages, exit codes."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import gguf
import jax.numpy as jnp
import pytest
import torch

from examples.llama.chat import as_chat
from examples.llama.command import INTERRUPTED, NO_MEMORY, NO_READER, REFUSED
from examples.llama.gguf_model import InputError, load_model, open_model
from examples.llama.memory import check_host_memory, free_host_memory, ran_out
from tests.cases.examples import EXAMPLES, PROMPTS, TWINS, write_gguf

FIRST_BYTES = Path(__file__).read_bytes()[:4]


def start(*arguments, tmp_path, **variables):
    """Starts the script in a process that at the end says which frameworks it imported."""
    program = (
        # Processes that are started in the background may ignore Ctrl-C, and hand that on.
        "import runpy, signal, sys, atexit; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "loaded = lambda: [name for name in ('jax', 'torch') if name in sys.modules]; "
        "atexit.register(lambda: print('IMPORTED', *loaded(), file=sys.stderr)); "
        f"sys.argv[0] = {str(EXAMPLES / 'generate.py')!r}; sys.path.insert(0, {str(EXAMPLES)!r}); "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | variables,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(*arguments, tmp_path, input=None, **variables):
    """Runs the script to its end."""
    process = start(*arguments, tmp_path=tmp_path, **variables)
    out, err = process.communicate(input, timeout=300)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def test_command_answers_a_question(tmp_path):
    done = command("What is the capital of France?", "--max-new-tokens", "16", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n"
    for word in ("loading", "compiling", "compile", "prefill", "decode", "tokens/s", "MiB", "IMPORTED jax\n"):
        assert word in done.stderr
    assert done.stderr.index("compiling") < done.stderr.index("prefill")


def test_command_streams_real_text(tmp_path):
    done = command("--raw", PROMPTS[0], "--max-new-tokens", "5", tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "The capital of France is Paris.\n\nThe\n"


def test_command_runs_torch_on_a_batch_without_jax(small_file, tmp_path):
    options = ("--framework", "torch", "--batch", "3", "--max-new-tokens", "5", "--layout", "kv-nhd")
    options += ("--kv-cache-dtype", "int4", "--granularity", "head")
    done = command("one", "another", *options, tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert done.returncode == 0, done.stderr
    first, second, third = re.split(r"^\[\d\] ", done.stdout, flags=re.MULTILINE)[1:]
    assert first == third
    assert first.startswith("one")
    assert second.startswith("another")
    assert "of 16 slots, int4, 'layer kv block slot head dim'" in done.stderr
    assert "IMPORTED torch\n" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["x", ""], "a prompt must have at least one token, got an empty one"),
        (
            ["x" * 1000],
            "prompt and max_new_tokens must fit the model's context of 1024 tokens, got 1000 + 128",
        ),
        (
            ["x", "--kv-cache-dtype", "nvfp4", "--layout", "slot block dim head"],
            "layout must end with axis dim for kv_cache_dtype 'nvfp4', got 'layer slot block dim head'",
        ),
        (["x", "--model", "nowhere.gguf"], "model must be a GGUF file, got 'nowhere.gguf', which is no file"),
        (
            ["x", "--model", __file__],
            f"model must be a GGUF file, got {Path(__file__).name}, which starts with {FIRST_BYTES!r}",
        ),
        (
            ["--prompts", "nowhere.txt"],
            "prompts must be a file that can be read, got 'nowhere.txt': No such file or directory",
        ),
    ],
)
def test_bad_requests_say_why_before_weights_are_read(arguments, message, cli, small_file, monkeypatch, capsys):
    monkeypatch.setenv("KV_MODEL", str(small_file))
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    monkeypatch.setattr(cli, "load_framework", None)
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"generate.py: error: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "y", "--batch", "1"], "argument --batch: must be at least the number of prompts, 2, got 1"),
        ([], "a PROMPT must be given, or --prompts a FILE that has one, got none"),
        (["x", "--temperature", "-1"], "argument --temperature: must be 0 or a finite number above, got -1"),
        (["x", "--temperature", "nan"], "argument --temperature: must be 0 or a finite number above, got nan"),
        (["x", "--seed", "4294967296"], "argument --seed: must be from 0 to 2^32 - 1, got 4294967296"),
        (["x", "--layout", "block slot head"], "must name exactly one of the axes dim, dim/x, k+v and latent"),
        (["x", "--layout", "nowhere"], "layout must be one of NHD, HND, "),
        (["x", "--layout", "mla"], "layout must have room for a Llama's values, got 'block slot latent'"),
        (["x", "--kv-cache-dtype", "fp8_ds_mla"], "invalid choice: 'fp8_ds_mla'"),
        (["x", "--granularity", "head"], "must be left out for --kv-cache-dtype auto, got head"),
        (
            ["x", "--kv-cache-dtype", "nvfp4", "--granularity", "token_head"],
            "argument --granularity: must be tensor or head for --kv-cache-dtype nvfp4, got token_head",
        ),
    ],
)
def test_bad_options_say_why(arguments, message, cli, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kv_cache_dtype", "granularity"),
    [("auto", None), ("int4", "token_head"), ("fp8", "token_head"), ("nvfp4", "tensor")],
)
def test_default_granularity(kv_cache_dtype, granularity, cli):
    assert cli.parse(["x", "--kv-cache-dtype", kv_cache_dtype], "").granularity == granularity


def test_prompts_come_from_a_file(cli, small_file, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n  two é \r\nthree", encoding="utf-8")
    assert cli.parse(["--prompts", str(path)], "").prompt == ["one", "  two é ", "three"]
    assert cli.parse(["zero", "--prompts", str(path)], "").prompt == ["zero", "one", "  two é ", "three"]
    path.write_bytes(b"\xff")
    assert cli.main(["--prompts", str(path)]) == 2
    assert "prompts must be a file of text in UTF-8, got" in capsys.readouterr().err
    path.write_text("\n")
    with pytest.raises(SystemExit):
        cli.main(["--prompts", str(path)])


def test_prompts_come_from_standard_input(small_file, tmp_path):
    options = ("--framework", "torch", "--max-new-tokens", "2", "--temperature", "0.9", "--seed", "3")
    done = command("--prompts", "-", *options, tmp_path=tmp_path, input="he\nshe\n", KV_MODEL=str(small_file))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^\[\d\] (he|she)", done.stdout, re.MULTILINE) == ["he", "she"]
    assert "small has no chat template: prompts are continued as they are" in done.stderr


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users') }}", "no users"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.pop() }}", "is unsafe"),
        ("{{ messages + 1 }}", 'can only concatenate list (not "int") to list'),
    ],
)
def test_a_template_that_does_not_work_is_refused(template, message, tmp_path, cli, capsys):
    path = write_gguf(tmp_path / "model.gguf", template=template)
    assert cli.main(["x", "--model", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("generate.py: error: model must have a chat template that works, got: ")
    assert message in line
    assert line.endswith("; --raw goes without")


def test_a_template_may_name_control_tokens_and_none_is_added_twice(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", template="{{ eos_token }}{{ messages[0].content }}{{ bos_token }}")
    assert as_chat(open_model(path), "hi") == "<|end|>hi"


@pytest.mark.parametrize("part", [0, 3, 4, 20, 0.01, 0.3, 0.6, 0.99])
def test_a_file_that_ends_early_is_refused(part, small_file, tmp_path, cli, capsys):
    whole = small_file.read_bytes()
    path = tmp_path / "part.gguf"
    path.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])
    assert cli.main(["x", "--model", str(path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(
        f"generate.py: error: model must be a {'whole ' if part not in (0, 3) else ''}GGUF file, got part.gguf"
    )


@pytest.mark.parametrize("name", ["llama.context_length", "tokenizer.ggml.tokens"])
def test_metadata_that_is_missing_is_named(name, small_file, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file.read_bytes().replace(name.encode(), name.encode()[:-1] + b"_"))
    with pytest.raises(InputError, match=f"model must have the metadata {name}, got none in model.gguf"):
        load_model(path)


@pytest.mark.parametrize("framework", TWINS)
def test_a_batch_that_does_not_fit_is_one_line_before_weights_are_read(framework, cli, small_file, monkeypatch, capsys):
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    monkeypatch.setattr(cli, "free_host_memory", lambda: 2**30)
    arguments = ["x", "--model", str(small_file), "--framework", framework, "--batch", "20000"]
    assert cli.main(arguments) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"generate.py: error: out of memory: at least \d+\.\d GiB are needed and 1.0 GiB are free; "
        "smaller --batch, --max-new-tokens or --kv-cache-dtype take less",
        line,
    )


@pytest.mark.parametrize("framework", TWINS)
def test_what_the_frameworks_say_of_memory_is_one_line(framework, cli, small_file, monkeypatch, capsys):
    def fill(*_):
        if framework == "jax":
            return jnp.zeros((2**20, 2**24)).block_until_ready()
        return torch.empty(2**44)

    monkeypatch.setattr(cli, "open_model", fill)
    assert cli.main(["x", "--model", str(small_file)]) == 3
    assert re.fullmatch(r"generate.py: error: out of memory: .*", capsys.readouterr().err.splitlines()[-1])


def test_other_errors_keep_their_traceback(cli, small_file, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "open_model", fail)
    with pytest.raises(RuntimeError, match="a fault"):
        cli.main(["x", "--model", str(small_file)])


def test_free_memory_is_the_least_of_host_and_container(tmp_path):
    assert free_host_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    assert free_host_memory(tmp_path) == 5000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("1000\n")
    assert free_host_memory(tmp_path) == 5000 * 1024
    (group / "memory.max").write_text("3000\n")
    assert free_host_memory(tmp_path) == 2000
    check_host_memory(2000, 2000)
    check_host_memory(2001, None)
    with pytest.raises(MemoryError) as caught:
        check_host_memory(2001, 2000)
    assert ran_out(caught.value)
    assert not ran_out(RuntimeError("fault"))


def test_interruption_is_one_line(small_file, tmp_path):
    # Sent while it compiles, in a process of its own.
    process = start("x", "--max-new-tokens", "900", "--batch", "64", tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert process.stderr is not None
    for line in process.stderr:
        if "compiling" in line:
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in rest
    assert "generate.py: interrupted\n" in rest


def test_a_reader_that_leaves_is_no_error(small_file, tmp_path):
    process = start("x", "--max-new-tokens", "400", tmp_path=tmp_path, KV_MODEL=str(small_file))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert "Traceback" not in process.stderr.read()


def test_a_gpu_without_jax_triton_is_one_line(cli, small_file, monkeypatch, capsys):
    def fail(*_):
        raise ModuleNotFoundError("jax-triton is not installed", name="jax_triton")

    monkeypatch.setattr(cli, "open_model", fail)
    assert cli.main(["x", "--model", str(small_file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "generate.py: error: jax-triton is not installed"


def test_help_lists_exit_codes(cli, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for code in (0, REFUSED, NO_MEMORY, INTERRUPTED, NO_READER):
        assert re.search(rf"^  {code} ", text, re.MULTILINE)


def test_script_and_project_ask_for_the_same():
    (header,) = re.findall(
        r"^# /// script\n(.*?)^# ///$", (EXAMPLES / "generate.py").read_text(), re.DOTALL | re.MULTILINE
    )
    script = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())
    assert script["dependencies"] == ["jaxkv[jax]", *project["dependency-groups"]["example"]]
    assert script["requires-python"] == project["project"]["requires-python"]
    assert script["tool"]["uv"]["dependency-metadata"] == project["tool"]["uv"]["dependency-metadata"]


@pytest.mark.parametrize("package", ["gguf", "tokenizers"])
def test_a_missing_package_of_the_script_is_one_line(package, tmp_path):
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('hidden', name={package!r})")
    found = subprocess.run(
        [sys.executable, EXAMPLES / "generate.py", "--help"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith(f"generate.py: error: {package} must be installed, got none: uv run examples/")
    assert len(found.stderr.splitlines()) == 1


def test_missing_framework_says_how(cli, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["x", "--framework", "torch"]) == 2
    assert "framework torch must be installed, got none: uv run --with torch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "model must have the architecture 'llama', got 'qwen2' in model.gguf"),
        (
            {"pre": "tekken"},
            "tokenizer.ggml.pre must be one of 'default', 'gpt-2', 'smollm', .*, got 'tekken'",
        ),
        (
            {"without": "blk.1.ffn_up.weight"},
            "model must have the tensor blk.1.ffn_up.weight, got none",
        ),
        (
            {"extra": ["blk.0.attn_q.bias"]},
            "model must be a plain Llama, got tensors of other parts: blk.0.attn_q.bias",
        ),
    ],
)
def test_other_models_are_refused(changes, message, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", **changes)
    with pytest.raises(InputError, match=message):
        load_model(path)
