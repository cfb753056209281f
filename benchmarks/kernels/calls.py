"""Everything that needs an NVIDIA GPU, a call at a time: `benchmarks/kernels/gpu.sh first|second|STEP ...`.

first takes at most 540 s: the build, meanwhile what the machine can do and Triton alone, every op on every path against
float64, the tests, what bounds memory and products, a profile, memory and race checks. second takes at most
240 s: QuACK, a training step of 1B, then MRD and the G-effect in the shape of 7B as far as time goes. Steps by name get
470 s each. Each step has a time box; what one leaves of it goes to the steps after it, and the call ends on time.

Results lie in the out-dir, whole logs in its folder logs; after every step all of it is put into one tar file. Needs
torch, triton, nvcc, cmake, ninja and pybind11; the tests pytest and hypothesis, step, mrd and geffect transformers.
What else is missing (peers too) is told and left out, or carried: `--wheels FOLDER`. On a GPU nothing is run here that
changes its settings.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pyunlearn._hints import hint

ROOT = Path(__file__).parent.parent.parent
CALLS: dict[str, tuple[int, dict[str, int]]] = {  # the steps of a call in order, and the time box of each in seconds
    "first": (540, dict(build=0, environment=25, check_triton=50, check_cuda=100, tests=70, logits=110, weights=35,
                        linear=54, profile=35, memcheck=30, racecheck=30)),
    "second": (240, dict(quack=55, step=85, mrd=55, geffect=45)),
}  # fmt: skip
ALONE = 470  # seconds of a step that is asked for by name
GRACE = 5  # seconds from an interrupt to the end: pytest sums up what it has
DEVICE_LOST = 75  # a benchmark's exit status: a kernel broke the CUDA context, a new process goes on
NOT_TRIED, MISSING = "not tried on a CPU", " is not here"  # no faults
VOCABULARIES = (128256, 32000, 151936, 256000)


class Command(NamedTuple):
    words: tuple[str, ...]  # "{seconds}" is what is left of the box
    again: bool = False  # after DEVICE_LOST
    into: str = ""  # a file of the out-dir for what it prints
    variables: tuple[tuple[str, str], ...] = ()  # of its environment


class Step(NamedTuple):
    name: str
    seconds: float
    commands: list[Command]
    background: bool = False
    after: str = ""  # a step in the background that has to have ended


class Process:
    """A command in a process group of its own. What it prints goes to the end of the log, or into a file."""

    def __init__(self, words: Sequence[str], log: Path, into: Path | None, environment: dict[str, str]):
        with log.open("ab") as errors, into.open("wb") if into else log.open("ab") as output:
            self.popen = subprocess.Popen(
                words, cwd=ROOT, env=environment, stdout=output, stderr=errors, start_new_session=True
            )

    def wait(self, seconds: float) -> int | None:
        """Its exit status; None if it is still running then."""
        try:
            return self.popen.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        for kind in (signal.SIGINT, signal.SIGKILL):  # what it has started goes too
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, kind)
            self.wait(GRACE)


# ---- what the steps are ----------------------------------------------------------------------------------------------


def step(name: str, seconds: float, out: Path, small: bool) -> Step:
    """small: tiny shapes on the CPU, as far as that can show anything."""
    python, tiny, device = sys.executable, ("--small",) if small else (), "cpu" if small else "cuda"

    def bench(part: str, impl: str, *chosen: str) -> Command:
        words = (python, "-m", "benchmarks", part, "--device", device, "--seconds", "{seconds}", "--out", str(out))
        return Command((*words, "--impl", impl, *chosen, *tiny), again=True)

    def gpu(*words: str, under: tuple[str, ...] = (), into: str = "", **variables: str) -> Command:
        program = (*(() if small else under), python, "-m", "benchmarks.kernels.gpu")
        return Command((*program, *words, "--device", device), into=into, variables=tuple(variables.items()))

    def check(backends: str, *words: str, tool: str = "") -> Command:
        under = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9") if tool else ()
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool else {}  # every tensor has bounds of its own
        words = ("--backends", "cpu", "--widths", "999") if small else ("--backends", backends, *words)
        return gpu("check", *words, under=under, **variables)

    def at_scale(what: str, *words: str) -> Command:
        shape = "toy" if small else "7B"
        where = ("--shape", shape, "--device", device, "--out", str(out), "--name", f"{what}-{shape}")
        return Command((python, "-m", f"benchmarks.scale.{what}", *where, *words))

    more: tuple[str, ...]
    ours, shapes = ("cpu" if small else "cuda,triton"), (8,) if small else (8192,)
    vocabularies = (128, 999) if small else VOCABULARIES
    rows = ",".join(f"{n}x{v}" for n in shapes for v in vocabularies)
    heads = "8x512x16,16x999x32" if small else "4096x131072x4096,4096x128256x4096"
    match name:
        case "environment":
            commands = [gpu("environment", *tiny, into="environment.json"), Command(("nvidia-smi",))]
        case "build":
            commands = [] if small else [Command((python, "setup.py", "-q", "build_ext", "--inplace"))]
        case "check_triton":
            commands = [check("triton")]
        case "check_cuda":
            commands = [check("cuda")]
        case "tests":
            pytest = (python, "-m", "pytest", "tests/ops", "-p", "no:cacheprovider", "-q", "-k", "cuda or triton")
            more = (
                ("-n", "0" if small else str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
            )
            commands = [Command((*pytest, *(("--collect-only",) if small else ("--durations", "10")), *more))]
        case "logits":
            commands = [bench(name, f"{ours},liger", "--shape", rows, "--dtype", "bfloat16")]
        case "weights":
            commands = [bench(name, f"{ours},reading alone", "--case", "perturb,three dots")]
        case "linear":
            kinds = "product,entropy from hidden,within the budget,beyond the budget"
            commands = [bench(name, f"{ours},torch,liger,three GEMMs alone", "--case", kinds, "--shape",
                              f"{heads},8192x8192x8192,256x256x256")]  # fmt: skip
        case "profile":
            under = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
                     "--metrics", ",".join(COUNTERS), "--log-file", str(out / "logs" / "ncu.csv"))  # fmt: skip
            commands = [gpu("profile", *tiny, under=under)]
            if not small:
                commands.append(gpu("ncu", str(out / "logs" / "ncu.csv"), into="profile.json"))
        case "memcheck" | "racecheck":
            commands = [check("cuda,triton", "--ops", "logits", "--widths", "8200,128256", tool=name)]
        case "quack":
            commands = [bench("logits", "quack", "--shape", rows, "--dtype", "bfloat16"),
                        bench("linear", "quack", "--shape", heads)]  # fmt: skip
        case "step":
            commands = [bench(name, "", "--case", "toy" if small else "1B")]
        case "mrd":
            data = Path(os.environ.get("TOFU", "/nowhere")) / "forget10.jsonl"
            more = ("--data", str(data)) if data.is_file() else ("--limit", "3") if small else ()
            words = ("--naive-seconds", "0", "--check-draws", "2", "--batch-size", "16", "--num-draws", "2")
            commands = [at_scale(name, *words, "--estimators", "gradient,algorithm1", *more)]
        case _:
            more = ("--samples", "2", "--length", "8", "--micro-batch", "2", "--rounds", "1") if small else ()
            commands = [at_scale("geffect", *more)]
    return Step(name, seconds, commands, name == "build", "build" if name == "check_cuda" else "")


# ncu's name of a figure -> ours
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram_percent",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__inst_issued.avg.pct_of_peak_sustained_active": "issue_slots_percent",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
    "launch__registers_per_thread": "registers",
}
STEPS = tuple(name for _, boxes in CALLS.values() for name in boxes)


# ---- running them ----------------------------------------------------------------------------------------------------


class Run:
    """Steps one after another until `seconds` are over. process, clock: what starts commands and tells the time."""

    def __init__(
        self,
        steps: list[Step],
        seconds: float,
        out: Path,
        tar: Path,
        environment: dict[str, str],
        process: Callable[..., Any] = Process,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps, self.out, self.tar, self.environment = steps, out, tar, environment
        self.process, self.clock, self.begin = process, clock, clock()
        self.end = self.begin + seconds
        self.running: dict[str, tuple[Any, float]] = {}  # in the background: (process, when it began)
        self.told: dict[str, dict[str, Any]] = {}
        self.logs = out / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def all(self) -> int:
        """The call's exit status: 1 where a step failed or was left out."""
        for i, step in enumerate(self.steps):
            later = sum(other.seconds for other in self.steps[i + 1 :])
            left = self.end - self.clock() - (GRACE if self.running else 0)
            self.run(step, self.clock() + min(left, max(step.seconds, left - later)))
            self.keep()
        for name in [*self.running]:
            self.collect(name, self.end - GRACE, last=True)
            self.keep()
        return int(
            not all(status in ("ok", NOT_TRIED) or status.endswith(MISSING) for status in self.statuses().values())
        )

    def run(self, step: Step, until: float) -> None:
        until -= GRACE  # an interrupted command has that long to end
        print(f"== {step.name}", flush=True)
        if step.after in self.running:
            self.collect(step.after, until)
        begin = self.clock()
        status = "ok" if step.commands else NOT_TRIED
        if step.after in self.running:
            return self.tell(step.name, f"left out: {step.after} has not ended", begin)
        for command in step.commands:
            if shutil.which(command.words[0]) is None:  # what follows would be about what it leaves
                status = command.words[0] + MISSING
                break
            if step.background:
                self.running[step.name] = (self.start(step.name, command, self.end), begin)
                return
            if until - self.clock() < 1:
                status = "left out: no time" if status == "ok" else status
            elif (ended := self.follow(step.name, command, until)) != "ok":
                status = ended
        self.tell(step.name, status, begin)

    def start(self, name: str, command: Command, until: float) -> Any:
        left = until - self.clock()
        words = [word.replace("{seconds}", f"{max(0.8 * left, left - 15):.0f}") for word in command.words]
        self.log(name, f"$ {' '.join(words)}\n")
        into = self.out / command.into if command.into else None
        return self.process(words, self.logs / name, into, {**self.environment, **dict(command.variables)})

    def follow(self, name: str, command: Command, until: float) -> str:
        while True:
            process = self.start(name, command, until)
            code = process.wait(until - self.clock())
            if code is None:
                process.end()
                return "stopped at the end of its time"
            if not (command.again and code == DEVICE_LOST and until - self.clock() > 20):
                return "ok" if code == 0 else f"exit status {code}"

    def collect(self, name: str, until: float, last: bool = False) -> None:
        """Waits for a step in the background; it goes on after `until` unless that was its last chance."""
        process, begin = self.running[name]
        code = process.wait(until - self.clock())
        if code is None and not last:
            return
        if code is None:
            process.end()
        del self.running[name]
        self.tell(
            name,
            "stopped at the end of its time" if code is None else "ok" if code == 0 else f"exit status {code}",
            begin,
        )

    def statuses(self) -> dict[str, str]:
        return {name: one["status"] for name, one in self.told.items()}

    def log(self, name: str, text: str) -> None:
        with (self.logs / name).open("a") as file:
            file.write(text)

    def tell(self, name: str, status: str, begin: float) -> None:
        """The end of its log, and how it went."""
        self.told[name] = {
            "status": status,
            "seconds": round(self.clock() - begin, 1),
            "at": round(begin - self.begin, 1),
        }
        log = self.logs / name
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        print("\n".join(line[:200] for line in lines[-12:]))
        print(f"== {name}: {status}, {self.told[name]['seconds']} s", flush=True)

    def keep(self) -> None:
        """All that there is, in one file that is whole at any time."""
        (self.out / "steps.json").write_text(json.dumps(self.told, indent=1) + "\n")
        new = self.tar.with_name(self.tar.name + ".new")
        with tarfile.open(new, "w:gz") as tar:
            tar.add(self.out, self.out.name)
        new.replace(self.tar)


def environment(wheels: Path | None, commit: str, seconds: float, small: bool) -> dict[str, str]:
    """Of the commands. Wheels are installed beside the interpreter's own packages, without what they ask for."""
    cores = os.cpu_count() or 1
    path = [str(ROOT)]
    if wheels is not None:
        site = Path(os.environ.get("TMPDIR", "/tmp")) / "pyunlearn-site"
        files = [str(file) for file in sorted(wheels.glob("*.whl"))]
        if not files:
            raise SystemExit(f"--wheels {wheels}: needs a folder with wheels, there is none in it")
        pip = (sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade")
        subprocess.run((*pip, "--target", str(site), *files), check=True, timeout=seconds)
        path.append(str(site))
    path += filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    given = {"PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    given["OMP_NUM_THREADS"] = "1" if small else str(max(1, cores // min(8, cores)))
    if commit:
        given["COMMIT"] = commit
    if not small:
        given |= {"PYUNLEARN_CUDA": "on", "PYUNLEARN_CUDA_ARCHS": architecture()}
    return {**os.environ, **given}


def architecture() -> str:
    """What to build for: "90a" on an H200."""
    query = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise SystemExit("gpu.sh: no GPU is seen (nvidia-smi tells none); --small tries everything on a CPU") from None
    return {"9.0": "90a"}.get(found, found.replace(".", ""))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/kernels/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", help=f"{', '.join(CALLS)}, or steps: {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results/<device>)")
    parser.add_argument("--tar", type=Path, help="where all of it is put in one file (default: beside the folder)")
    parser.add_argument("--commit", default="", help="what is measured, where there is no git to ask")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--seconds", type=float, help="time of the call, in place of its own")
    parser.add_argument("--small", action="store_true", help="tiny shapes on the CPU: does everything run?")
    args = parser.parse_args(words)
    if unknown := [name for name in args.what if name not in (*CALLS, *STEPS)]:
        parser.error(f"{unknown[0]!r}: {hint(unknown[0], (*CALLS, *STEPS))}")
    begin = time.monotonic()
    seconds: float = 0
    boxes: dict[str, int] = {}
    for name in args.what:
        more, its = CALLS.get(name, (ALONE, {name: ALONE}))
        seconds, boxes = seconds + more, boxes | its
    seconds = args.seconds or seconds
    given = environment(args.wheels, args.commit, seconds, args.small)
    out = args.out or (ROOT / "build" / "small" if args.small else results_of_this_device(given))
    run = Run(
        [step(name, box, out, args.small) for name, box in boxes.items()],
        seconds - (time.monotonic() - begin),
        out,
        args.tar or out.with_name(out.name + ".tar.gz"),
        given,
    )
    failed = run.all()
    print("\n".join(f"{name}: {one['status']}, {one['seconds']} s" for name, one in run.told.items()))
    print(f"== results in {run.out}, all of them in {run.tar}")
    return failed


def results_of_this_device(environment: dict[str, str]) -> Path:
    code = "import benchmarks.measure as m; print(m.machine('cuda')['folder'])"
    done = subprocess.run((sys.executable, "-c", code), env=environment, capture_output=True, text=True, check=True)
    return ROOT / "benchmarks" / "results" / done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
