"""Mutates a model's files and runs the command line on them: each run must end in one line, within seconds.

    python tools/fuzz.py --seconds 30 [--seed 0]

Headers, an index, configurations, a tokenizer, a report, a manifest, statistics, a journal of a comparison, the state
of an unfinished run, packed files and the header of a GGUF file are changed at random. A run may succeed, or end with
status 2 and one line (``verify`` with 1 for a fault that it finds). A traceback, an internal error, a run of more than
ten seconds, or an input that changed is a finding: its bytes are kept in ``build/fuzz/``, and the exit status is 1.
Each run is a process of its own, forked from one that has imported everything, with at most 4 GB of memory more than
that.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "python_tests"))

from bad_inputs import arguments  # noqa: E402
from folders import prune, save_dense  # noqa: E402
from program import positive  # noqa: E402

from ace_ext.cli import main as cli  # noqa: E402
from ace_ext.packed.packing import pack  # noqa: E402

SECONDS, MEMORY = 10, 4 * 2**30
LOUD = ("verify", "unpack")
"""Verbs that have no ``--quiet``."""
TARGETS: dict[str, list[tuple[str, dict[str, object]]]] = {
    "dense/model.safetensors": [("run", {}), ("plan", {}), ("eval", {})],
    "dense/config.json": [("plan", {}), ("eval", {})],
    "dense/tokenizer.json": [("plan", {})],
    "dense/tokenizer_config.json": [("plan", {})],
    "sharded/model.safetensors.index.json": [("run", {"model": "sharded"}), ("eval", {"model": "sharded"})],
    "out/ace_report.json": [("verify", {}), ("heal", {"tokens": 16})],
    "out/ace_manifest.json": [("run", {"output": "out", "overwrite": True})],
    "s.zip": [("run", {"stats": "s.zip", "method": "wanda"})],
    "results/runs.jsonl": [("compare", {"output": "results"})],
    ".new.unfinished/state.json": [("run", {"resume": True})],
    "packed/model.packed.safetensors": [
        ("eval", {"model": "packed"}),
        ("verify", {"": "packed"}),
        ("unpack", {}),
        ("run", {"model": "packed"}),
    ],
    "archive/model.packed.safetensors": [("unpack", {"": "archive"}), ("eval", {"model": "archive"})],
    "packed/config.json": [("eval", {"model": "packed"}), ("unpack", {})],
    "m.gguf": [("plan", {"model": "m.gguf"})],
}
"""The file that is changed, and the runs that read it."""


def make_place(place: Path) -> None:
    """Sound files of every kind."""
    dense = save_dense(place / "dense")
    save_dense(place / "sharded", max_shard_size="20KB")
    prune(dense, place / "out", method="magnitude")
    prune(dense, place / "other", {"save_stats": place / "s.zip"}, method="collect(order=block) + wanda")
    shutil.rmtree(place / "other")
    for codec, folder in (("bitmap", "packed"), ("archive", "archive")):
        pack(place / "out", place / folder, codec)
    (place / "results").mkdir()
    first = '{"format": 1, "settings": {"model": "dense", "dtype": "auto"}}'  # of a version without checksums
    (place / "results" / "runs.jsonl").write_text(first + "\n")
    unfinished = place / ".new.unfinished"
    (unfinished / "model").mkdir(parents=True)
    state = {"format": 1, "fingerprint": {}, "finished": 0, "side": 0, "hidden": {}, "notes": {}, "blocks": []}
    state["sums"] = {"rest": {}, "blocks": {}}
    (unfinished / "state.json").write_bytes(signed(json.dumps(state).encode()))
    (place / "m.gguf").write_bytes(gguf_header())


def gguf_header() -> bytes:
    """That of a GGUF file with a text, an array of texts and one of numbers, and a tensor whose numbers are missing."""

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", len(value)) + value

    words = struct.pack("<IIQ", 9, 8, 3) + text(b"a") + text(b"the") + text(b"fox")
    scores = struct.pack("<IIQ3f", 9, 6, 3, 0.0, -1.0, -2.0)
    keys = [text(b"general.architecture") + struct.pack("<I", 8) + text(b"llama")]
    keys += [text(b"tokenizer.ggml.tokens") + words, text(b"tokenizer.ggml.scores") + scores]
    tensor = text(b"output_norm.weight") + struct.pack("<IQIQ", 1, 32, 0, 0)
    return b"GGUF" + struct.pack("<IQQ", 3, 1, len(keys)) + b"".join(keys) + tensor


def signed(data: bytes) -> bytes:
    """A state of a run with the checksum that fits it, so that what it holds is looked at; as it is, if it is no
    object."""
    try:
        state = json.loads(data)
        state.pop("sha256", None)
        state["sha256"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
        return json.dumps(state).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        return data


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(found) + 1) if rng.random() < 0.3 else rng.randrange(min(len(found), 2000) + 1)
        kind = rng.randrange(6)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del found[at : at + rng.choice((1, 8, 100, len(found)))]
        elif kind == 2:
            found[at:at] = rng.choice(
                (b"\0", b"null", b"-1", b"[", b'"', b"9" * 30, b"1e400", b"\xff\xff\xff\xff", b"{}")
            )
        elif kind == 3:
            found[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**62, 2**64 - 1)))
        elif kind == 4:
            part = bytes(found[at : at + rng.randrange(1, 200)])
            found[at:at] = part
        else:
            start = found.find(b":", at)
            if start >= 0:
                end = min((p for p in (found.find(b",", start), found.find(b"}", start)) if p > 0), default=len(found))
                found[start + 1 : end] = rng.choice((b"null", b"-1", b'"x"', b"[]", b"{}", b"1e99", b"9" * 20, b"true"))
    return bytes(found)


def hashes(place: Path, but: Path) -> str:
    """A hash of all files of a place, except one and what a successful run writes."""
    digest = hashlib.sha256()
    written = (place / "new", place / ".new.unfinished", place / "out", place / "results")
    for path in sorted(place.rglob("*")):
        if path.is_file() and path != but and not any(top in path.parents for top in written):
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def run(place: Path, verb: str, options: dict[str, object]) -> str | None:
    """What is wrong with one run, None if nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.chdir(place)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        out, error = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                status: object = cli.main(arguments(verb, {**options, **({} if verb in LOUD else {"quiet": True})}))
            except SystemExit as end:
                status = end.code
            except BaseException as found:
                status = repr(found)
        os.write(writer, json.dumps([status, error.getvalue()[-2000:]]).encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reader)
            return f"took more than {SECONDS} s"
        time.sleep(0.005)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    if not answer:
        return "the process died"
    status, error = json.loads(answer)
    if status == 0 or (verb == "verify" and status == 1 and not error):
        return None
    if status == 2 and error.count("\n") == 1 and "internal error" not in error:
        return None
    return f"status {status}: {error[-600:]}"


def main(argv: list[str] | None = None) -> int:
    """Runs for some seconds; returns the exit status."""
    parser = argparse.ArgumentParser(description="mutate a model's files and run the command line on them")
    parser.add_argument("--seconds", type=positive, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    rng = random.Random(args.seed)
    found = done = 0
    with tempfile.TemporaryDirectory() as folder:
        sound, place = Path(folder, "sound"), Path(folder, "place")
        make_place(sound)
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            name = rng.choice(list(TARGETS))
            verb, options = rng.choice(TARGETS[name])
            shutil.copytree(sound, place)
            data = mutate((sound / name).read_bytes(), rng)
            if name.endswith("state.json") and rng.random() < 0.8:
                data = signed(data)
            (place / name).write_bytes(data)
            before = hashes(place, place / name)
            wrong = run(place, verb, options)
            if wrong is None and ((place / name).exists() and verb in ("plan", "eval", "verify")):
                wrong = None if (place / name).read_bytes() == data else "the input changed"
            if wrong is None and hashes(place, place / name) != before:
                wrong = "another input changed"
            shutil.rmtree(place)
            done += 1
            if wrong is not None:
                found += 1
                kept = ROOT / "build" / "fuzz" / f"{args.seed}-{done}-{verb}-{Path(name).name}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_bytes(data)
                print(f"{verb} {options} with {name} = {kept}: {wrong}", flush=True)
    print(f"{done} runs, {found} findings, seed {args.seed}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
