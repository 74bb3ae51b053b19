"""examples/batching.py: many requests in one batch have the answers of each alone."""

import importlib.util
import io
import json
import os
import re
import sys
import threading
import time
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.llama import alone, jax_batching
from examples.llama.arrivals import Arrivals, Refusal, parse_line
from examples.llama.gguf_model import InputError
from examples.llama.jax_batching import JaxBatcher
from examples.llama.jax_session import JaxLlama
from examples.llama.scheduler import Job, Request, Scheduler
from kvcore.pool import BlockPool
from tests.cases.examples import EXAMPLES, some_prompts

SIZES = {"num_seqs": 4, "num_tokens": 32, "context": 128}


@pytest.fixture(scope="module")
def llama(small):
    return JaxLlama(small)


@pytest.fixture(scope="module")
def batcher(llama):
    return JaxBatcher(llama, memory="1MiB", check=True, **SIZES)


def requests(new=20):
    """Prompts of many lengths, of which some begin alike; some are sampled."""
    *prompts, prefix = some_prompts(1, 40, 70, 60, 16, 50, 33)
    prompts += [[*prefix, *prompt] for prompt in some_prompts(3, 20, 9)]
    sampled = (1, 3, 6)
    return [Request(i, tuple(p), new, 0.7 * (i in sampled), i + 5) for i, p in enumerate(prompts)]


def answer(batcher, pool, requests):
    """Answers them over a cache full of NaN, which come at once, but for the last two."""
    batcher.pool = pool
    batcher.cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), batcher.cache)
    scheduler = Scheduler(pool, **SIZES, stop_ids=batcher.llama.model.config.stop_ids)
    jobs = [scheduler.add(request) for request in requests[:-2]]
    while scheduler.busy:
        pieces = scheduler.schedule()
        scheduler.update(pieces, batcher.run(pieces))
        if scheduler.counts.steps == 12:
            jobs += [scheduler.add(request) for request in requests[-2:]]
    return jobs, scheduler.counts


@pytest.mark.parametrize(("num_blocks", "preempted"), [(64, False), (14, True)])
def test_answers_are_those_of_each_request_alone(num_blocks, preempted, batcher, llama):
    pool = BlockPool(num_blocks, jax_batching.BLOCK_SIZE)
    jobs, counts = answer(batcher, pool, requests())
    assert all(job.finish for job in jobs)
    assert len(jobs) == len(requests())
    assert (counts.preemptions > 0) == preempted
    assert pool.statistics.shared_tokens > 0
    assert pool.num_free == num_blocks
    found = alone.compare(llama, jobs, SIZES["context"])
    assert found.different == ()
    assert found.equal + found.near_ties == len(jobs)
    assert found.near_ties <= 1
    assert found.tokens == sum(len(job.answer) for job in jobs)


def test_programs_are_few_and_compiled_before_the_first_request(small, llama):
    # Of a quantised cache of another layout.
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    other = JaxLlama(small)
    cache = {"memory": "256KiB", "layout": "HND", "kv_cache_dtype": "int8"}
    batcher = JaxBatcher(other, **cache, num_seqs=2, num_tokens=8, context=64)
    assert len(other._programs) == 3
    assert len(compiled) >= 3
    compiled.clear()
    scheduler = Scheduler(batcher.pool, 2, 8, 64)
    jobs = [scheduler.add(Request(i, tuple(p), 5)) for i, p in enumerate(some_prompts(9, 40, 1, 10))]
    shapes = set()
    while scheduler.busy:
        pieces = scheduler.schedule()
        shapes.add(sum(len(piece.tokens) for piece in pieces))
        scheduler.update(pieces, batcher.run(pieces))
    assert len(shapes) > 3
    assert compiled == []
    assert len(other._programs) == 3
    for job in jobs:
        assert len(job.answer) == 5
        assert job.answer[0] == alone.answer_alone(llama, job.request, SIZES["context"])[0][0]


def test_a_checked_step_refuses_a_table_of_two(batcher):
    scheduler = Scheduler(batcher.pool, **SIZES)
    for i, prompt in enumerate(some_prompts(5, 6)):
        scheduler.add(Request(i, tuple(prompt), 3))
    first, second = scheduler.schedule()
    second.sequence.table[:] = first.sequence.table
    wrong = second._replace(slots=[slot % 16 + 16 * second.sequence.table[0] for slot in second.slots])
    with pytest.raises(ValueError, match=r"block_tables\[1, 0\] must be a block that only sequence 1 writes"):
        batcher.run([first, wrong])


def test_a_checked_step_refuses_slots_that_are_not_the_programs(batcher, monkeypatch):
    scheduler = Scheduler(batcher.pool, **SIZES)
    scheduler.add(Request(0, tuple(some_prompts(5)[0]), 3))
    (piece,) = scheduler.schedule()
    monkeypatch.setattr(jax_batching, "check_tables", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"slot_mapping must give the pool's slots, \[7, 7, 7, 7, 7\], got"):
        batcher.run([piece._replace(slots=[7] * 5)])


def test_near_ties_are_told_from_other_answers(llama, monkeypatch):
    request = Request(0, tuple(some_prompts(9)[0]), 6)
    answer, _ = alone.answer_alone(llama, request, 128)
    other = [*answer[:3], answer[3] + 1, *answer[4:]]
    found = np.asarray(alone.scores_after(llama, [*request.prompt, *answer[:3]], request, 128))
    assert found.argmax() == answer[3]
    job = Job(request, [*request.prompt, *other])
    assert alone.compare(llama, [job], 128).different == (0,)
    assert alone.compare(llama, [Job(request, [*request.prompt, *answer[:3]])], 128).different == (0,)
    monkeypatch.setattr(alone, "NEAR", 100.0)
    assert alone.compare(llama, [job], 128).near_ties == 1


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ("1KiB", "memory must hold a block of 16 slots of all layers, got 1KiB"),
        ("much", "memory must be a number of TiB, GiB, MiB or KiB"),
    ],
)
def test_memory_that_holds_no_block(memory, message, llama):
    with pytest.raises(InputError, match=message):
        JaxBatcher(llama, memory=memory, **SIZES)


# --- Arrivals -------------------------------------------------------------------------------------


def test_requests_are_due_at_their_time():
    lines = ['{"prompt": "b", "arrival": 2}', "", '{"prompt": "a", "id": "first"}', '{"prompt": "c", "arrival": 0.01}']
    arrivals = Arrivals(lines, 7)
    (first,) = arrivals.due(0.0)
    assert (first.number, first.id, first.prompt, first.seed, first.max_new_tokens) == (1, "first", "a", 1, 7)
    assert not arrivals.over
    started = time.perf_counter()
    arrivals.wait(0.0)
    assert time.perf_counter() - started >= 0.01
    assert [arrival.prompt for arrival in arrivals.due(0.01)] == ["c"]
    assert [arrival.id for arrival in arrivals.due(5.0)] == [0]
    assert arrivals.over


def test_lines_are_answered_before_the_next_is_written():
    reader, writer = os.pipe()
    with open(reader) as lines, open(writer, "w", buffering=1) as out:
        arrivals = Arrivals(lines, 7, wait=True)
        assert arrivals.due(0.0) == []
        threading.Timer(0.05, out.write, ['{"prompt": "a"}\n']).start()
        arrivals.wait(0.0)
        assert [arrival.prompt for arrival in arrivals.due(0.0)] == ["a"]
        assert not arrivals.over
        out.close()
        arrivals.wait(0.0)
        assert arrivals.over


def test_lines_that_cannot_be_read():
    arrivals = Arrivals(io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"), 7)
    with pytest.raises(InputError, match="requests must be lines of text in UTF-8, got: 'utf-8' codec can't decode"):
        arrivals.due(0.0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "a request must be a JSON object in one line, got 'hello': Expecting value"),
        ("[1]", r"a request must be a JSON object in one line, got '\[1\]'"),
        ("{}", "prompt must be a text, got null"),
        ('{"prompt": 3}', "prompt must be a text, got 3"),
        ('{"prompt": "a", "top_p": 1}', "a request must have no fields but prompt, id, .*, got top_p"),
        ('{"prompt": "a", "id": 1.5}', "id must be a text or an integer, got 1.5"),
        ('{"prompt": "a", "arrival": -1}', "arrival must be 0 or a finite number above, got -1"),
        ('{"prompt": "a", "temperature": NaN}', "temperature must be 0 or a finite number above, got NaN"),
        ('{"prompt": "a", "max_new_tokens": true}', "max_new_tokens must be an integer, got true"),
        ('{"prompt": "a", "seed": 4294967296}', r"seed must be an integer from 0 to 2\^32 - 1, got 4294967296"),
    ],
)
def test_lines_that_are_no_request(line, message):
    with pytest.raises(InputError, match=message):
        parse_line(line, 0, 7)
    (refusal,) = Arrivals(["", line], 7).due(0.0)
    assert isinstance(refusal, Refusal)
    assert re.match(message, refusal.why)


# --- The command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command():
    """examples/batching.py as a module. It finds its own `llama` beside it."""
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("batching_example", EXAMPLES / "batching.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def test_command_streams_and_compares(command, small_file, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    texts = ["he said", "she", "x" * 200, "another one"]
    lines = [{"prompt": text, "id": text[:3], "arrival": 0.01 * i} for i, text in enumerate(texts)]
    path.write_text("\n".join(map(json.dumps, lines)) + "\nnonsense\n")
    options = ["--num-seqs", "2", "--num-tokens", "16", "--context", "64", "--memory", "64KiB", "--max-new-tokens", "9"]
    assert command.main([str(path), "--model", str(small_file), *options, "--check", "--compare"]) == 2
    out, err = capsys.readouterr()
    answers, ends = {}, {}
    for line in map(json.loads, out.splitlines()):
        if "error" in line:
            ends[line["id"]] = line["error"]
            continue
        assert line["id"] not in ends
        answers[line["id"]] = answers.get(line["id"], "") + line["text"]
        if "finish" in line:
            ends[line["id"]] = line["finish"], line["tokens"]
    assert list(answers) == ["he ", "she", "ano"]
    assert {ends[name] for name in answers} <= {("length", 9)} | {("stop", count) for count in range(1, 10)}
    assert ends["xxx"] == "prompt and max_new_tokens must fit a context of 64 tokens, got 200 + 9"
    assert ends[4].startswith("a request must be a JSON object in one line, got 'nonsense'")
    assert all(answers.values())
    assert "requests      3         2 refused" in err
    assert "blocks        8 of 8 are free" in err
    assert re.search(r"equal    +[23] answers, [01] near ties, 0 others", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "requests must be a file that can be read, got 'nowhere.jsonl': No such file or directory"),
        (["FILE", "--num-tokens", "4"], "num_tokens must be at least 16, got 4"),
        (["FILE", "--num-seqs", "0"], "num_seqs must be at least 1, got 0"),
        (["FILE", "--memory", "lots"], "memory must be a number of TiB, GiB, MiB or KiB, as '2GiB' is, got 'lots'"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments, message, command, small_file, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a"}')
    arguments = [str(path) if argument == "FILE" else argument for argument in arguments]
    assert command.main([*arguments, "--model", str(small_file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"batching.py: error: {message}"


def test_memory_that_is_not_there_is_one_line(command, small_file, tmp_path, capsys):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a"}')
    assert command.main([str(path), "--model", str(small_file), "--memory", "1000TiB"]) == 3
    assert "batching.py: error: out of memory: at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a FILE of requests or --simulate must be given"),
        (["x", "--compare", "--kv-cache-dtype", "int8"], "argument --compare: must come with --dtype float32"),
        (["x", "--kv-cache-dtype", "nvfp4"], "invalid choice: 'nvfp4'"),
    ],
)
def test_bad_options_say_why(arguments, message, command, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_command_simulates(command, capsys):
    assert command.main(["--simulate", "300"]) == 0
    assert re.match(r"steps 3\d\d, requests \d+, made \d+, ", capsys.readouterr().err)


def test_help_lists_the_fields_of_a_request(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = capsys.readouterr().out
    for name in command.FIELDS:
        assert re.search(rf"^  {name} ", text, re.MULTILINE)


def test_script_asks_for_the_same_as_generate():
    headers = [
        re.match(r"# /// script\n(.*?)^# ///$", (EXAMPLES / name).read_text(), re.DOTALL | re.MULTILINE)[1]
        for name in ("batching.py", "generate.py")
    ]
    assert headers[0] == headers[1]
    assert tomllib.loads(re.sub(r"^# ?", "", headers[0], flags=re.MULTILINE))["dependencies"]
