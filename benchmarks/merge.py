"""What a merge costs: `python benchmarks/merge.py --mergekit MK/bin/mergekit-yaml` prints Markdown tables.

Our engine, mergekit and the disk's limit take turns on the same recipes and the same seeded Llama models; each run is a
process of its own, seen from outside: wall and CPU seconds, and the peak of what its tree holds in memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, NamedTuple

import numpy as np
import safetensors
import typer
import yaml
from numpy.typing import NDArray
from safetensors import TensorSpec
from tokenizers import Tokenizer, models

BLOCK = 4 << 20
UNCHANGED, NOISE = 0.3, 0.01
"""A fine-tune leaves this part of the elements alone, and moves the rest by so many standard deviations: a few bits."""
EVICT = Path("/proc/sys/vm/drop_caches")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
CONFIG = """{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
"rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 32000, "head_dim": 64}"""
TOKENIZER = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
COLUMNS = ("ours s (min-max)", "mergekit s", "ratio", "target", "CPU s", "anonymous MB", "RSS MB", "GB/s")
MODULES = {"ours": "builder.__main__", "mergekit": "mergekit.scripts.run_yaml", "limit": "numpy, typer"}
WEIGHTS, TUNED, TRIM = "model.safetensors", ("ft0", "ft1", "ft2"), {"weight": 0.4, "density": 0.5}
METHODS: dict[str, tuple[str | None, tuple[str, ...], dict[str, float], dict[str, float]]] = {
    # the base, the models, parameters of each and of the whole
    "linear": (None, TUNED, {"weight": 1.0}, {}),
    "slerp": ("ft0", TUNED[:2], {}, {"t": 0.5}),
    "task_arithmetic": ("base", TUNED, {"weight": 0.4}, {}),
    "ties": ("base", TUNED, TRIM, {}),
    "dare_ties": ("base", TUNED, TRIM, {}),
    "della": ("base", TUNED, {**TRIM, "epsilon": 0.15}, {}),
    "model_stock": ("base", TUNED, {}, {}),
}
TARGETS = dict.fromkeys(("linear", "slerp", "task_arithmetic", "model_stock"), 0.4) | {"dare_ties": 0.15}
TARGETS |= {"ties": 0.08, "della": 0.08, "limit": 1.5}
"""At most this part of mergekit's wall time; of the disk's limit for linear."""
RANDOM = ("dare_ties", "della")
Bits = NDArray[np.uint16]
Tools = dict[str, list[str]]


class Run(NamedTuple):
    """One process: seconds, and peak megabytes of its tree: those that no file backs, and all."""

    wall: float
    cpu: float
    anonymous: float
    rss: float


def main(
    work: Annotated[Path, typer.Option(help="Folder for models and outputs.")] = Path("build/benchmark"),
    mergekit: Annotated[Path | None, typer.Option(help="mergekit-yaml, in a venv of its own.")] = None,
    methods: Annotated[str, typer.Option(help="With commas between.")] = ",".join(METHODS),
    runs: Annotated[int, typer.Option(min=1)] = 3,
    layers: Annotated[int, typer.Option(min=1, help="28 make 395.9 M parameters.")] = 28,
    scale: Annotated[float, typer.Option(min=0.02, help="Widen the model: 3 makes 1.13 G parameters.")] = 1.0,
    threads: Annotated[int | None, typer.Option(min=1, help="For both tools [each its default].")] = None,
    warm: Annotated[bool, typer.Option(help="Runs with the inputs in the page cache.")] = True,
    cold: Annotated[bool, typer.Option("--cold", help="Also runs with the inputs out of it.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Recipes ask for float32, rounded at the end.")] = False,
) -> None:
    """Print the tables."""
    if unknown := {*methods.split(",")} - METHODS.keys():
        raise SystemExit(f"error: no method {', '.join(sorted(unknown))}; there are: {', '.join(METHODS)}")
    tools = mergers(mergekit, threads)
    zoo = make(work.resolve(), layers, scale)
    recipes = {name: recipe(zoo, name, "float32" if fp32 else "bfloat16") for name in methods.split(",")}
    print_setting(tools, next(iter(recipes.values())), runs)
    for state in ["warm"] * warm + ["cold"] * cold:
        print_table(state, tools, recipes, runs)


def mergers(mergekit: Path | None, threads: int | None) -> Tools:
    """The commands before RECIPE OUT: ours, of the venv that runs this, and mergekit's if it is given."""
    tools = {"ours": [str(Path(sys.executable).with_name("builder")), "merge"]}
    if mergekit:
        tools["mergekit"] = [str(mergekit.absolute()), "--random-seed", "0"]
    for name, command in tools.items():
        if not os.access(command[0], os.X_OK):
            raise SystemExit(f"error: {command[0]} is no program: install the tool there, or name another place")
        command += ["--threads" if name == "ours" else "--num-threads", str(threads)] if threads else []
    return tools


def importing(tool: str, command: list[str]) -> list[str]:
    return [str(Path(command[0]).with_name("python")), "-c", f"import {MODULES[tool]}"]


def make(work: Path, layers: int, scale: float) -> Path:
    """The folder of base and fine-tunes, made once."""
    width = 128 * max(1, round(8 * scale**0.5))
    zoo, unfinished = work / f"llama-{layers}x{width}", work / "unfinished"
    if zoo.exists():
        return zoo
    shutil.rmtree(unfinished, ignore_errors=True)
    config = json.loads(CONFIG) | {"hidden_size": width, "intermediate_size": width * 11 // 4}
    config |= {"num_hidden_layers": layers, "num_attention_heads": width // 64, "num_key_value_heads": width // 128}
    base: dict[str, Bits] = {}
    for model, name in enumerate(("base", *TUNED)):
        folder = unfinished / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2), "utf-8")
        Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
        new = {t: tensor(shape, [model, i], base.get(t)) for i, (t, shape) in enumerate(shapes(config).items())}
        base = base or new
        specs = {}
        for t, b in new.items():
            specs[t] = TensorSpec(dtype="bfloat16", shape=b.shape, data_ptr=b.ctypes.data, data_len=b.nbytes)
        safetensors.serialize_file(specs, folder / WEIGHTS, {"format": "pt"})
    return unfinished.rename(zoo)


def shapes(config: dict[str, int]) -> dict[str, tuple[int, ...]]:
    width, inner = config["hidden_size"], (config["intermediate_size"], config["hidden_size"])
    square, narrow, words = (width, width), (width // 2, width), (config["vocab_size"], width)
    parts: dict[str, tuple[int, ...]] = {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
    parts |= {f"self_attn.{part}_proj": square if part in "qo" else narrow for part in "qkvo"}
    parts |= {"mlp.gate_proj": inner, "mlp.up_proj": inner, "mlp.down_proj": inner[::-1]}
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    names = {f"{layer}.{part}": shape for layer in layers for part, shape in parts.items()}
    names |= dict.fromkeys(("model.embed_tokens", "lm_head"), words) | {"model.norm": (width,)}
    return {f"{name}.weight": shape for name, shape in names.items()}


def tensor(shape: tuple[int, ...], seed: list[int], base: Bits | None) -> Bits:
    """A tensor of the base, norms near 1 and matrices near 0; or of a fine-tune. Rounded to nearest, ties to even."""
    random = np.random.default_rng(seed)
    values = random.standard_normal(shape, np.float32)
    if base is not None:
        values *= NOISE * widen(base).std() * (random.random(shape, np.float32) >= UNCHANGED)
        values += widen(base)
    else:
        values = values * 0.1 + 1 if len(shape) == 1 else values * 0.02
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widen(bits: Bits) -> NDArray[np.float32]:
    """A bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def recipe(zoo: Path, method: str, dtype: str) -> Path:
    """The YAML that both tools read."""
    base, names, each, whole = METHODS[method]
    inputs = [{"model": str(zoo / name)} | ({"parameters": dict(each)} if each else {}) for name in names]
    text = {"merge_method": method, "models": inputs, "dtype": dtype, "out_dtype": "bfloat16"}
    extra = ({"parameters": whole} if whole else {}) | ({"base_model": str(zoo / base)} if base else {})
    path = zoo / f"{method}.yaml"
    path.write_text(yaml.safe_dump(text | extra, sort_keys=False), "utf-8")
    return path


def measure(command: list[str], log: Path) -> Run:
    """Run a command to its end; its last words are the error if it fails."""
    peaks, over, begin = np.zeros(2), threading.Event(), time.perf_counter()
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | OFFLINE) as child:
        watcher = threading.Thread(target=watch, args=(child.pid, peaks, over), daemon=True)
        watcher.start()
        # Not child.wait(): only wait4 tells what the process, and those it waited for, used.
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begin
        child.returncode = os.waitstatus_to_exitcode(status)
        over.set()
        watcher.join()
    if child.returncode:
        words = log.read_text("utf-8", "replace").strip()[-1500:]
        raise SystemExit(f"error: {' '.join(command)} ended with {child.returncode}:\n{words}")
    return Run(wall, usage.ru_utime + usage.ru_stime, *peaks.tolist())


def watch(pid: int, peaks: NDArray[np.float64], over: threading.Event) -> None:
    while not over.wait(0.02):
        np.maximum(peaks, held(pid), out=peaks)


def held(pid: int) -> NDArray[np.float64]:
    """Megabytes of a process and its descendants: those that no file backs, shared memory included, and all."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
        children = " ".join((task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:  # it has ended
        return np.zeros(2)
    size = {name: int(kib) * 1024 / 1e6 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    own = np.array([size.get("RssAnon", 0) + size.get("RssShmem", 0), size.get("VmRSS", 0)])
    return sum((held(int(child)) for child in children.split()), own)


def prepare(state: str, files: list[Path], program: list[str], log: Path) -> None:
    """Bring the inputs into the page cache, or out of it, when nothing is being written any more."""
    os.sync()
    if state == "warm":
        read(files)
        return
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if os.access(EVICT, os.W_OK):
        EVICT.write_text("1")
        measure(program, log)  # the weights are cold; the program is not


def read(files: list[Path]) -> None:
    buffer = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def limit(out: Path, size: int, files: list[Path]) -> None:
    """Read the inputs while writing as many bytes as a merge does, synced; print wall and CPU seconds of that alone."""
    begin, used = time.perf_counter(), time.process_time()
    reader = threading.Thread(target=read, args=(files,))
    reader.start()
    block, start_flush = os.urandom(BLOCK), ctypes.CDLL(None).sync_file_range
    with out.open("wb", buffering=0) as file:
        for place in range(0, size, BLOCK):
            file.write(block[: size - place])
            # 2 is SYNC_FILE_RANGE_WRITE: the disk works from the first block on, and nobody waits for it.
            start_flush(file.fileno(), ctypes.c_int64(place), ctypes.c_int64(BLOCK), 2)
        os.fsync(file.fileno())
    reader.join()
    print(time.perf_counter() - begin, time.process_time() - used)


def print_setting(tools: Tools, path: Path, runs: int) -> None:
    """What runs where, and the seconds before any weight is read."""
    zoo = path.parent
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    parts = [f"{os.cpu_count()} cores {cpu[1] if cpu else '?'}, {memory:.0f} GB, load {os.getloadavg()[0]:.1f}"]
    parts += [f"Linux {os.uname().release}", f"Python {sys.version.split()[0]}, numpy {version('numpy')}"]
    if "mergekit" in tools:
        code = "from importlib.metadata import version as v; print('mergekit', v('mergekit') + ', torch', v('torch'))"
        parts.append(subprocess.check_output([*importing("mergekit", tools["mergekit"])[:2], code], text=True).strip())
    size, dtype = (zoo / "base" / WEIGHTS).stat().st_size, yaml.safe_load(path.read_text("utf-8"))["dtype"]
    parts.append(f"{zoo.name}, {size / 2e6:.1f} M parameters, bfloat16, recipes in {dtype}; {runs} runs in turn")
    print("; ".join(parts) + ". Medians of seconds and of paired ratios; peaks of memory; ours / mergekit.\n")
    commands = {f"import {name}": importing(name, command) for name, command in tools.items()}
    commands["ours --plan"] = [*tools["ours"], str(path), str(zoo.parent / "planned"), "--plan"]
    for name, command in commands.items():
        print(f"- {name}: {median(measure(command, zoo.parent / 'log').wall for _ in range(runs)):.2f} s")
    print()


def print_table(state: str, tools: Tools, recipes: dict[str, Path], runs: int) -> None:
    """One row a method; the limit takes turns with the first. Below it, how the outputs differ."""
    first, zoo = next((method, path.parent) for method, path in recipes.items())
    out, log, notes = zoo.parent / "out", zoo.parent / "log", [""]
    row(f"{state} cache", *COLUMNS)
    row(*["---"] * (1 + len(COLUMNS)))
    for method, path in recipes.items():
        base, names, *_ = METHODS[method]
        files = [zoo / name / WEIGHTS for name in sorted({*names, base or "ft0"})]
        sizes = [file.stat().st_size for file in files]
        bound = [sys.executable, __file__, "limit", str(out / "limit"), str(sizes[0]), *map(str, files)]
        commands = {name: [*tool, str(path), str(out / name)] for name, tool in tools.items()}
        commands |= {"limit": bound} if method == first else {}
        done: dict[str, list[Run]] = {name: [] for name in (*commands, "mergekit")}
        for _ in range(runs):
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            for name, command in commands.items():
                prepare(state, files, importing(name, command), log)
                done[name].append(measure(command, log))
                if name == "limit":
                    wall, cpu = map(float, log.read_text().split())
                    done[name][-1] = done[name][-1]._replace(wall=wall, cpu=cpu)
        print_row(method, done["ours"], done["mergekit"], sum(sizes), TARGETS[method])
        if "limit" in done:
            print_row(f"limit of {method}", done["limit"], [], sum(sizes), None)
            factor = median(ours.wall / least.wall for ours, least in zip(done["ours"], done["limit"], strict=True))
            notes.append(f"- {method}: ours takes {factor:.2f} times the limit (target: at most {TARGETS['limit']})")
        if "mergekit" in tools and method not in RANDOM:
            notes.append(f"- {method}: {difference(out / 'ours', out / 'mergekit')}")
    shutil.rmtree(out)
    print(*notes, "", sep="\n")


def print_row(name: str, ours: list[Run], theirs: list[Run], size: int, goal: float | None) -> None:
    walls, both = [run.wall for run in ours], [runs for runs in (ours, theirs) if runs]
    ratio = median(a.wall / b.wall for a, b in zip(ours, theirs, strict=True)) if theirs else 0.0
    row(
        name,
        f"{median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})",
        f"{median(run.wall for run in theirs):.2f}" if theirs else "-",
        f"{ratio:.3f}" if theirs else "-",
        f"{goal:g} {'met' if ratio <= goal else 'missed'}" if theirs and goal else "-",
        " / ".join(f"{median(run.cpu for run in runs):.1f}" for runs in both),
        " / ".join(f"{max(run.anonymous for run in runs):.0f}" for runs in both),
        " / ".join(f"{max(run.rss for run in runs):.0f}" for runs in both),
        f"{size / 1e9 / median(walls):.2f}",
    )


def difference(ours: Path, theirs: Path) -> str:
    """How two merged models differ, element by element."""
    a, b = load(ours), load(theirs)
    if {name: bits.size for name, bits in a.items()} != {name: bits.size for name, bits in b.items()}:
        return "ours has other tensors or dtypes than mergekit's"
    count, differing, far, worst = sum(bits.size for bits in a.values()), 0, 0, np.float32(0)
    for name in a:
        gap = np.abs(widen(a[name]) - widen(b[name]))
        steps = np.abs(a[name].astype(np.int32) - b[name])
        differing, far = differing + int((gap != 0).sum()), far + int((steps[gap != 0] > 1).sum())
        worst = np.maximum(worst, gap.max())
    parts = f"{differing} of {count} elements ({differing / count:.3%}) differ from mergekit's, {far} of them"
    return f"{parts} ({far / count:.4%}) by more than one step of bfloat16; at most by {worst:.2g}"


def load(folder: Path) -> dict[str, Bits]:
    files = (path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
    pairs = (pair for file in files for pair in safetensors.deserialize(file))  # type: ignore[no-untyped-call]
    return {name: np.frombuffer(entry["data"], np.uint16) for name, entry in pairs}


def row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["limit"]:
        limit(Path(sys.argv[2]), int(sys.argv[3]), [Path(each) for each in sys.argv[4:]])
    else:
        typer.run(main)
