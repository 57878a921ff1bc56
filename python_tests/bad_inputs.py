"""The catalogue of bad inputs: for each a name, the command line, and what it does to a copy of a sound place before.

A case is ``(name, verb, options, damage)``. ``verb`` is ``run``, ``plan``, ``eval``, ``verify``, ``heal`` or
``compare``; ``options`` replace those of :func:`arguments` or are added; ``damage(place)`` changes files or the
environment first. Names without a folder are relative to the place.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

Case = tuple[str, str, dict[str, object], Callable[[Path], object] | None]

DEFAULTS: dict[str, dict[str, object]] = {
    "run": {"model": "dense", "output": "new", "calibration": "text.txt", "nsamples": 4, "seqlen": 8},
    "plan": {"model": "dense", "calibration": "text.txt", "nsamples": 4, "seqlen": 8},
    "eval": {"model": "dense", "text": "text.txt", "seqlen": 8},
    "verify": {"": "out"},
    "unpack": {"": "packed", "output": "new"},
    "heal": {"": "out", "output": "new", "tokens": 64, "seqlen": 8},
    "compare": {"model": "dense", "methods": "wanda", "texts": "text.txt", "calibration": "text.txt"},
}
"""What a sound call of each verb is given; the empty name stands for the positional argument."""


def arguments(verb: str, options: dict[str, object]) -> list[str]:
    """The command line. A value of None leaves an option out, True gives it without a value."""
    found = [verb]
    for name, value in {**DEFAULTS[verb], **options}.items():
        if value is None:
            continue
        flag = [] if name == "" else [f"--{name}"]
        found += flag if value is True else [*flag, str(value)] if name == "" else [f"{flag[0]}={value}"]
    return found


NO_NUMBERS = ["", " ", "x", "-", "1e", "0x10", "1,5", "NaN", "½", "²", "None", "[]", "--"]
NOT_WHOLE = [*NO_NUMBERS, "1.5", "inf", "nan", "-inf", "1e3"]
TOO_SMALL = ["0", "-1", "-9999999999999999999", f"-{'9' * 400}"]
TOO_LARGE = [str(2**31), str(2**63), str(10**12), str(10**30), "9" * 400]
PATTERNS = [
    "",
    ":",
    "2",
    "2:",
    ":4",
    "4:2",
    "0:4",
    "4:4",
    "2:4:8",
    "-2:4",
    "2.0:4",
    "²:4",
    "a:b",
    "2:0",
    " 2 : 5 ",
    "1:7",
]
PATTERNS += [f"2:{'9' * 5000}", f"{'9' * 5000}:4", "2;4", "２:5", "2:1000000000000"]
NOWHERE = ["nowhere", "./nowhere", "/nowhere/at/all", "org/name/more", "~nobody/x", "x" * 300, "a/" * 3000, "..", "."]
NOWHERE += [
    "text.txt",
    "out/model.safetensors",
    "/dev/null",
    "/proc/self/mem",
    "pipe",
    "loop",
    "dangling",
    "nowhere.gguf",
]
NO_TEXT = [
    "nowhere.txt",
    "x" * 300,
    "/dev/null",
    ".",
    "",
    "dense/config.json",
    "pipe",
    "loop",
    "dangling",
    "a\nb",
    "~nobody/x",
]
NO_TEXT += [
    "latin.txt",
    "empty.txt",
    "blank.txt",
    "list.jsonl",
    "cut.jsonl",
    "number.jsonl",
    "half.jsonl",
    "nested.jsonl",
]
NO_MEDIA = ["photos", "out", "no_file.jsonl", "no_key.jsonl", "two_kinds.jsonl"]
"""Images and sound that cannot be read, or that the model does not take."""
MIXED = ["bundled + ", "bundled + nowhere.txt", "bundled + latin.txt", "bundled + empty.txt", "text.txt + text.txt"]
MIXED += ["bundled + self", "bundled+text.txt", "+ text.txt", "bundled +  + text.txt", "2*bundled", "2 * + text.txt"]
MIXED += [f"{weight}* bundled + text.txt" for weight in ("", "0", "-1", "nan", "1.2.3", "1e5", "9" * 400, "0.00001")]
CHOICES = ["", "nothing", "WANDA", "wanda ", "ﬁne", "--"]
METHODS = ["", " ", "+", "nothing", "WANDA", "ﬁne", "--", "wonda", "score", "score(metric=wanda)", "x" * 5000]
METHODS += ["admm +", "+ admm", "admm ++ distill", "wanda swaps", "wanda; admm", "wanda, admm", "wanda,admm", "[]"]
METHODS += ["admm(", "admm)", "admm)(", "(admm)", "admm((damping=1))", "admm(damping=1", "admm damping=1", "admm()()"]
METHODS += ["admm(damping)", "admm(=1)", "admm(damping=1,)", "admm(,)", "admm(damping=1 floor=0)", "admm(damping==1)"]
METHODS += [
    "admm(damping=1, damping=1)",
    "admm(damping:1)",
    "admm(" * 5000,
    "(" * 50_000,
    "+" * 50_000,
    f"x{' ' * 50_000}x",
]
METHODS += ["admm\nwanda", "admm(da\nmping=1)", "admm(damping=1\u00a0000)", "²", "２:4", "wanda + \x1b[31m"]
METHODS += [
    "wanda(iterations=30)",
    "obs(iterations=3)",
    "balanced(tokens=1000)",
    "wanda(exponent=1)",
    "admm(order=block)",
]
METHODS += [
    "published-wanda(exponent=0.5)",
    "admm(sparsity=0.5)",
    "mean-swaps(gram=plain)",
    "train(tokens=9)",
    "ria(x=1)",
]
METHODS += ["swaps(name=x)", "swaps(groups=row)", "swaps(__class__=x)", "collect(label=x)", "allocate(metric=wanda)"]
METHODS += ["wanda + ria", "admm + obs", "swaps + mean-swaps", "best + distill", "balanced + fast", "collect + collect"]
METHODS += ["distill + admm", "admm + wanda", "admm + collect", "wanda + allocate", "admm + published-wanda"]
METHODS += [
    "wanda + admm(saliency=magnitude)",
    "wanda + alps(iterations=9)",
    "wanda + dsnot + swaps",
    "swaps + admm(gram=sketch)",
    "swaps(gram=cosine) + obs",
]
METHODS += [
    "collect(token_norm=exact) + wanda",
    "train + quantize",
    "quantize + admm",
    "admm(gram=cosine) + quantize(gram=plain)",
    "balanced(gram=plain) + quantize",
]
"""Texts that are no method."""
OPTIONS: dict[str, list[str]] = {
    "collect(batch_tokens={}) + wanda": [*NOT_WHOLE, *TOO_SMALL],
    "collect(order={}) + wanda": CHOICES,
    "collect(token_norm={}) + ace": CHOICES,
    "allocate(by={}) + wanda": CHOICES,
    "allocate(range={}) + wanda": [*NO_NUMBERS, "nan", "-1", "0", "1", "2"],
    "ria(exponent={})": [*NO_NUMBERS, "nan", "inf"],
    "swaps(max_swaps={})": [*NOT_WHOLE, "0", "-1"],
    "swaps(gram={})": [*CHOICES, "sketch"],
    "mean-swaps(rounds={})": [*NOT_WHOLE, *TOO_SMALL],
    "admm(damping={})": [*NO_NUMBERS, "nan", "-1"],
    "admm(floor={})": [*NO_NUMBERS, "nan", "-1", "inf"],
    "admm(iterations={})": [*NOT_WHOLE, *TOO_SMALL, *TOO_LARGE[3:]],
    "admm(relaxation={})": [*NO_NUMBERS, "nan", "-1", "0", "2"],
    "admm(saliency={})": CHOICES,
    "admm(gram={})": CHOICES,
    "alps(damping={})": [*NO_NUMBERS, "nan", "-1"],
    "alps(iterations={})": [*NOT_WHOLE, *TOO_SMALL],
    "alps(steps={})": [*NOT_WHOLE, "-1"],
    "alps(gram={})": [*CHOICES, "sketch"],
    "dsnot(cycles={})": [*NOT_WHOLE, *TOO_SMALL],
    "dsnot(threshold={})": [*NO_NUMBERS, "nan", "-1", "inf"],
    "thanos(damping={})": [*NO_NUMBERS, "nan", "-1"],
    "thanos(block={})": [*NOT_WHOLE, *TOO_SMALL],
    "thanos(gram={})": [*CHOICES, "sketch"],
    "obs(damping={})": [*NO_NUMBERS, "nan", "-1"],
    "obs(gram={})": [*CHOICES, "sketch"],
    "quantize(bits={})": [*NOT_WHOLE, "0", "5", "16", "-4"],
    "quantize(group={})": [*NOT_WHOLE, "0", "-64", "100"],
    "quantize(gram={})": [*CHOICES, "sketch"],
    "quantize(sweeps={})": [*NOT_WHOLE, "-1"],
    "train(epochs={})": [*NOT_WHOLE, *TOO_SMALL],
    "train(learning_rate={})": [*NO_NUMBERS, "nan", "-1", "0", "inf"],
    "train(step_tokens={})": [*NOT_WHOLE, *TOO_SMALL],
    "train(held_out={})": [*NO_NUMBERS, "nan", "-1", "1", "inf"],
    "distill(tokens={})": [*NOT_WHOLE, *TOO_SMALL],
    "distill(learning_rate={})": [*NO_NUMBERS, "nan", "-1", "0", "inf"],
    "balanced(damping={})": [*NO_NUMBERS, "nan", "-1"],
}
"""Options of stages, and values that they do not accept."""
TARGETS = [
    {"group": "matrix", "method": "swaps"},
    {"group": "matrix", "method": "balanced"},
    {"group": "model", "method": "obs"},
    {"group": "model", "method": "alps"},
    {"group": "model", "method": "thanos"},
    {"group": "model", "method": "wanda + dsnot"},
    {"group": "model", "method": "wanda + train"},
    {"group": "model", "method": "allocate"},
    {"group": "model", "method": "collect(order=sequential) + wanda"},
    {"group": "matrix", "pattern": "2:4"},
    {"pattern": "2:4", "method": "allocate + admm"},
    {"pattern": "2:4", "sparsity": "0.5"},
    {"method": "quantize", "sparsity": "0.5"},
    {"method": "quantize", "pattern": "2:4"},
    {"method": "quantize", "group": "matrix"},
]
"""Targets that methods do not reach, or that exclude each other."""
STRUCTURES = ["", " ", "+", "--", "neurons", "neurons=", "=0.2", "neurons=x", "neurons=²", "neurons=1_0", "neurons=0"]
STRUCTURES += ["neurons=1", "neurons=-0.2", "neurons=1.5", "neurons=50", "neurons=nan", "neurons=inf", "neurons=1e400"]
STRUCTURES += [
    "neurons=0.2,blocks=1",
    "neurons=0.2;blocks=1",
    "neurons=0.2 +",
    "+ neurons=0.2",
    "neuron=0.2",
    "heads=0.2",
]
STRUCTURES += [
    "NEURONS=0.2",
    "neurons=0.2 + neurons=0.2",
    "neurons=0.2(",
    "neurons=0.2)",
    "neurons=0.2(score)",
    "x" * 5000,
]
STRUCTURES += [
    "neurons=0.2(score=wanda)",
    "neurons=0.2(scor=obs)",
    "neurons=0.2(multiple=0)",
    "neurons=0.2(multiple=1.5)",
]
STRUCTURES += [
    "neurons=0.2(multiple=4096)",
    "neurons=0.001",
    "neurons=0.999",
    "neurons=0.2(refit=all)",
    "[]",
    "neurons: 0.2",
]
STRUCTURES += [
    "blocks=0",
    "blocks=-1",
    "blocks=1.5",
    "blocks=3",
    "blocks=99",
    "blocks=0.01",
    "blocks=x",
    "blocks=1(score=obs)",
    "neurons=0.25(score=published-shortgpt)",
    "neurons=0.25(score=published-flap, refit=none)",
    "heads=2",
    "heads=0.01",
    "heads=0.99",
    "heads=0.5(multiple=2)",
    "experts=0.5",
    "experts=2",
    "params=2",
    "params=0.0001",
    "params=0.2 + blocks=1",
]
STRUCTURES += ["(" * 50_000, "+" * 50_000, "neurons=0.2(" * 5000, "neurons=" + "9" * 5000, "blocks=" + "9" * 400]
"""Texts of --remove that name no structure, or none of the tiny model."""
WITH_REMOVE: list[dict[str, object]] = [
    {"method": "balanced"},
    {"method": "wanda + distill"},
    {"group": "matrix"},
    {"skip": "mlp"},
    {"offload": "disk"},
    {"format": "bitmap"},
    {"pattern": "8:16"},
]
"""Options that do not go with --remove."""
REMOVED = [
    "preset",
    "metric",
    "refine",
    "update",
    "gram",
    "order",
    "allocation",
    "iterations",
    "damping",
    "batch-tokens",
]
"""Options that are now part of the method."""
FROM_STATISTICS: dict[str, object] = {"calibration": None, "nsamples": None, "seqlen": None}
"""A run from saved statistics takes no calibration."""
UNREAD: dict[str, object] = {"calibration": "text.txt", "nsamples": 4, "seqlen": 8, "seed": 1, "text-field": "text"}
UNREAD |= {"bos": "auto", "evaluate": "never"}
"""Options that such a run would not read."""


def cases() -> Iterator[Case]:
    """Every case; names are unique."""
    yield from _options()
    yield from _files()
    yield from _environment()


def _each(verb: str, option: str, values: list[str], **others: object) -> Iterator[Case]:
    for number, value in enumerate(values):
        shown = value if len(value) <= 12 and value.isascii() and value.isprintable() else f"#{number}"
        given = {**others, option: value}
        yield f"{verb} --{option} {shown!r} {'+'.join(others)}", verb, given, None


def _options() -> Iterator[Case]:
    for verb in ("run", "plan"):
        for option in ("nsamples", "seqlen"):
            yield from _each(verb, option, [*NOT_WHOLE, *TOO_SMALL, *TOO_LARGE])
        yield from _each(verb, "seed", [*NOT_WHOLE, "-1", *TOO_LARGE[1:2], *TOO_LARGE[3:]])
        yield from _each(verb, "sparsity", [*NO_NUMBERS, "inf", "nan", "-0.1", "1.0001", "50", "1e400", "9" * 400])
        yield from _each(verb, "pattern", PATTERNS)
        yield from _each(verb, "group", CHOICES)
        yield from _each(verb, "method", METHODS)
        for target in TARGETS:
            yield f"{verb} {target}", verb, target, None
        yield from _each(verb, "remove", STRUCTURES)
        for others in WITH_REMOVE:
            yield f"{verb} --remove {others}", verb, {"remove": "neurons=0.25", **others}, None
        for option in REMOVED:
            yield from _each(verb, option, ["wanda"])
        for name in ("compressed-tensors", "nm"):  # without the stage quantize, and without a pattern
            yield from _each(verb, "format", [name, name.upper(), f"{name} "])
        for option in ("device", "dtype", "offload", "bos"):
            yield from _each(
                verb, option, [*CHOICES, "cuda:99", "cpu:x", "float8", "meta"][: 6 if option != "device" else 10]
            )
        yield from _each(verb, "max-memory", [*NO_NUMBERS, "0", "-1GB", "1", "1KB", "9" * 400 + "x", "1e3GB", "1 G B"])
        yield from _each(verb, "skip", ["(", "[", "*", "(?P<x", "proj", "x{99999999999}", "no-such-layer"])
        yield from _each(verb, "skip", ["(([a-z._0-9]*)*)*!", "(a|a|[a-z_.])*$^"])
        yield from _each(verb, "model", NOWHERE)
        yield from _each(verb, "calibration", [*NO_TEXT, *MIXED, "photos"])
        for media in NO_MEDIA:
            yield f"{verb} calibration {media}", verb, {"calibration": media, "seqlen": None}, None
        yield from _each(verb, "seqlen", ["129", "1000"])
    yield from _each(
        "run", "output", ["", ".", "..", "dense", "dense/x", "out", "text.txt", "text.txt/x", "/", "x" * 250]
    )
    yield from _each(
        "run", "output", ["out", "dense", "photos", "text.txt", "dangling", "loop", "pipe"], overwrite=True
    )
    for option in ("report", "log-json"):
        yield from _each(
            "run", option, ["", ".", "text.txt", "pipe", "dangling", "dense/config.json", "no/x", "x" * 300]
        )
    for option in ("save-stats", "stats"):
        names = ["", ".", "text.txt", "pipe", "dangling", "dense/model.safetensors", "no/x", "x" * 300, "/dev/null"]
        yield from _each("run", option, names, **FROM_STATISTICS if option == "stats" else {})
    for option, value in UNREAD.items():
        yield f"run --stats --{option}", "run", {**FROM_STATISTICS, "stats": "s.zip", option: value}, None
    for option, others in {"save-stats": {}, "stats": FROM_STATISTICS}.items():
        sequential = {**others, option: "s.zip", "method": "collect(order=sequential) + wanda"}
        yield f"run --{option} sequential", "run", sequential, None
    for method, values in OPTIONS.items():
        for number, value in enumerate(values):
            yield f"run --method {method} #{number}", "run", {"method": method.format(value)}, None
    yield from _each("eval", "seqlen", [*NOT_WHOLE, *TOO_SMALL, "1", *TOO_LARGE, "129"])
    yield from _each("eval", "max-tokens", [*NOT_WHOLE, *TOO_SMALL, "7"])
    yield from _each("eval", "model", NOWHERE)
    yield from _each("eval", "text", [*NO_TEXT, "self", "bundled + text.txt"])
    yield from _each("eval", "bos", CHOICES)
    yield from _each("verify", "", [*NOWHERE, "dense", "photos"])
    yield from _each("heal", "", [*NOWHERE, "dense", "photos"])
    yield from _each("heal", "dense", NOWHERE)
    yield from _each("heal", "tokens", [*NOT_WHOLE, *TOO_SMALL, *TOO_LARGE[1:]])
    yield from _each("heal", "minutes", [*NO_NUMBERS, "nan", "-1", "0", "inf"], tokens=None)
    yield from _each("heal", "seqlen", [*NOT_WHOLE, *TOO_SMALL, "1"])
    yield from _each("heal", "output", ["", "out", "dense", "text.txt", "dangling"])
    lists = ["", ";", " ; ", "nothing", "wanda;nothing", "wanda; wanda", "wanda,ace", "wanda, ace", "a:b:c"]
    lists += ["wanda:", "wanda:x=1", "wanda:order=block", "wanda; obs(damping=x)", "balanced(sparsity=0.5)", "admm +"]
    yield from _each("compare", "methods", lists)
    yield from _each("compare", "methods", ["allocate; wanda"], patterns="2:4")
    yield from _each("compare", "sparsities", ["x", "1.5", "nan", "0.5;0.6", "-1", "inf"])
    yield from _each("compare", "patterns", [value for value in PATTERNS if value.strip()])
    yield from _each(
        "compare",
        "lengths",
        ["", "x", "8", "8x", "x8", "8x8x8", "0x8", "8x1", "-1x8", "²x8", "8x" + "9" * 400, "1.5x8"],
    )
    yield from _each("compare", "seeds", ["", "x", "-1", "1.5", "²", "9" * 400])
    yield from _each("compare", "texts", ["", "nowhere.txt", "self", "latin.txt", "empty.txt", "bundled + text.txt"])
    yield from _each("compare", "calibration", MIXED)
    yield from _each("compare", "eval-seqlen", [*NOT_WHOLE, *TOO_SMALL, "1"])
    yield from _each("compare", "eval-windows", [*NOT_WHOLE, *TOO_SMALL])
    yield from _each("compare", "output", ["text.txt", "dense", "photos", "text.txt/x"])


# Files


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda place: (place / name).write_bytes(data)


def change(name: str, **values: object) -> Callable[[Path], object]:
    """Changes keys of a JSON file; a value of ``...`` removes one."""

    def damage(place: Path) -> None:
        data = {**json.loads((place / name).read_text()), **values}
        (place / name).write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return damage


def replace_by(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Removes a file and puts something else in its place."""

    def damage(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return damage


JSON_DAMAGE = {
    "empty": "", "null": "null", "list": "[]", "number": "5", "text": '"x"', "cut": '{"a": ', "deep": "[" * 100_000,
    "bytes": b"\xff\xfe\x00", "object": "{}", "nan": "NaN", "big": '{"format": ' + "9" * 5000 + "}",
}  # fmt: skip
CONFIG: dict[str, list[object]] = {
    "hidden_size": [None, 0, -1, "x", 1.5, [], 10**12, 33, 64],
    "num_hidden_layers": [None, -1, "x", 1.5, 10**12, 0, 2, 4],
    "num_attention_heads": [None, 0, -1, "x", 5, 10**9],
    "num_key_value_heads": [0, -1, "x", 3],
    "vocab_size": [None, 0, -1, "x", 10**13],
    "intermediate_size": [None, 0, -1, "x", 10**13],
    "model_type": [None, "", "x", 5, [], "bert", "gpt2", "t5"],
    "hidden_act": [None, "x", 5],
    "rms_norm_eps": [None, "x"],
    "dtype": ["x", 5, "float8"],
    "rope_parameters": ["x", 5, {"rope_type": "x"}],
    "auto_map": [5, {"AutoConfig": 5}],
    "quantization_config": [5, "x", {"quant_method": "x"}],
    "max_position_embeddings": ["x"],
    "head_dim": ["x", -1, 3],
}
HEADERS = {
    "empty": b"",
    "short": b"short",
    "huge": struct.pack("<Q", 2**60) + b"{}",
    "array": struct.pack("<Q", 2) + b"[]",
    "null": struct.pack("<Q", 4) + b"null",
    "no tensors": struct.pack("<Q", 2) + b"{}",
    "cut": struct.pack("<Q", 9) + b"{",
    "deep": struct.pack("<Q", 20000) + b"[" * 20000,
}


def _files() -> Iterator[Case]:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for kind, text in JSON_DAMAGE.items():
            harmless = (name != "config.json" and kind in ("object", "null")) or name == "generation_config.json"
            for verb in ("plan", "eval") if not harmless else ():
                if name == "tokenizer_config.json" and kind in ("nan", "big"):
                    continue
                yield f"{name} {kind} {verb}", verb, {}, write(f"dense/{name}", text)
    for value in ({}, "x"):
        for verb in ("plan", "eval"):
            files = change("dense/tokenizer_config.json", model_max_length=value)
            yield f"tokenizer model_max_length={value} {verb}", verb, {}, files
    for key, values in CONFIG.items():
        for value in values:
            # A plan reads shapes from the configuration; that the files hold other weights, what loads them finds.
            for verb in ("run", "eval") if value == "gpt2" else ("plan", "eval"):
                yield f"config {key}={str(value)[:20]} {verb}", verb, {}, change("dense/config.json", **{key: value})
    for kind, data in HEADERS.items():
        for verb in ("run", "plan", "eval"):
            yield f"safetensors {kind} {verb}", verb, {}, write("dense/model.safetensors", data)
        yield f"safetensors {kind} verify", "verify", {}, write("out/model.safetensors", data)
        yield f"gguf {kind} plan", "plan", {"model": "m.gguf"}, write("m.gguf", data)
        yield f"gguf {kind} eval", "eval", {"model": "m.gguf"}, write("m.gguf", b"GGUF" + data)
    for kind, text in JSON_DAMAGE.items():
        for verb in ("verify", "heal"):
            yield f"report {kind} {verb}", verb, {}, write("out/ace_report.json", text)
        yield f"manifest {kind}", "run", {"output": "out", "overwrite": True}, write("out/ace_manifest.json", text)
        yield f"stats {kind}", "run", {**FROM_STATISTICS, "stats": "s.zip"}, write("s.zip", text)
        yield f"stats description {kind}", "run", {**FROM_STATISTICS, "stats": "s.zip"}, _archive("s.zip", text)
        yield f"runs.jsonl {kind}", "compare", {"output": "results"}, _put("results/runs.jsonl", text)
        if kind != "empty":
            yield f"index {kind}", "plan", {}, _index(text)
    for name in ("config.json", "model.safetensors"):
        for kind, make in {"pipe": os.mkfifo, "folder": Path.mkdir, "nothing": lambda path: None}.items():
            # A plan of a folder without weights is one of its configuration.
            planned = (name, kind) != ("model.safetensors", "nothing")
            for verb in ("run", *(["plan"] if planned else []), "eval"):
                yield f"{name} is {kind} {verb}", verb, {}, replace_by(f"dense/{name}", make)
    for name in ("tokenizer_config.json", "generation_config.json", "notes.txt"):
        for target in ("../text.txt", "/etc/hostname", "../dense/../text.txt"):
            yield f"{name} leads to {target}", "run", {}, _link(f"dense/{name}", target)
    for kind, text in RECORDS.items():
        yield f"runs.jsonl with {kind}", "compare", {"output": "results"}, _put("results/runs.jsonl", text)
    for name in ("/etc/hostname", "../text.txt", "..", "", "a/b.safetensors", "x" * 300 + ".safetensors"):
        text = json.dumps({"weight_map": {"w": name}})
        yield f"index names {name[:20]!r}", "run", {}, _index(text)


RECORDS = {
    "another checksum": '{"format": 2, "settings": {}, "sha256": "00"}\n',
    "no checksum": '{"format": 2, "settings": {}}\n',
    "a format to come": '{"format": 3, "settings": {}}\n',
}


def _link(name: str, target: str) -> Callable[[Path], object]:
    def damage(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to(target)

    return damage


def _put(name: str, content: str | bytes) -> Callable[[Path], object]:
    def damage(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        write(name, content)(place)

    return damage


def _archive(name: str, text: str | bytes) -> Callable[[Path], object]:
    def damage(place: Path) -> None:
        with zipfile.ZipFile(place / name, "w") as archive:
            archive.writestr("statistics.json", text)

    return damage


def _index(text: str | bytes) -> Callable[[Path], object]:
    def damage(place: Path) -> None:
        (place / "dense" / "model.safetensors").unlink()
        write("dense/model.safetensors.index.json", text)(place)

    return damage


# The environment


def _environment() -> Iterator[Case]:
    for value in ("", "abc", "-1", "1.5", "²", "9" * 9, "9" * 400, "2"):
        yield f"WORLD_SIZE={value[:9]} {len(value)}", "run", {}, _set(WORLD_SIZE=value)
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for value in ("", "abc", "-1", "1.5", "2", "9" * 400):
        yield f"RANK={value[:9]} {len(value)}", "run", {}, _set(**torchrun, RANK=value)


def _set(**values: str) -> Callable[[Path], object]:
    return lambda place: os.environ.update(values)
