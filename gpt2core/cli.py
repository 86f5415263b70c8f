"""`gpt2 COMMAND`: every stage and every look at a run from the command line, with no Prefect server."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2core.config import DataConfig, LaunchConfig, RunConfig
from gpt2core.flags import TRY_AGAIN, Parser, add_recipe, add_settings, main_guard, run_config, settings_of

if TYPE_CHECKING:
    from gpt2core.generate import Sampling
    from gpt2core.model import GPT
    from gpt2core.run_checkpoint import NamedCheckpoint


def prepare(argv: list[str]) -> None:
    from gpt2core.launch import end_on_sigterm, tell
    from gpt2core.prepare import prepare as prepare_dataset

    end_on_sigterm()
    parser = Parser(prog="gpt2 prepare", description="Tokenize text into shards.")
    add_recipe(parser)
    add_settings(parser, DataConfig)
    prepare_dataset(run_config(parser.parse_args(argv)).data, tell)


def data(argv: list[str]) -> int:
    from gpt2core.dataset_check import print_dataset, print_problems

    parser = Parser(prog="gpt2 data", description="Check a dataset from end to end, or show what it is made of.")
    parser.add_argument("action", choices=["verify", "show"], help="what to do")
    parser.add_argument("--data_dir", default=DataConfig().data_dir, metavar="DIR_OR_URL", help="folder of the shards")
    arguments = parser.parse_args(argv)
    if arguments.action == "verify":
        return 1 if print_problems(arguments.data_dir) else 0
    print_dataset(arguments.data_dir)
    return 0


def train(argv: list[str]) -> int:
    from gpt2core import launch, train_command
    from gpt2core.memory_limit import too_many_sequences
    from gpt2core.preflight import preflight
    from gpt2core.run_folder import RunFolder

    parser = Parser(prog="gpt2 train", description="Train GPT-2, in one process or under torchrun in several.")
    add_settings(parser, LaunchConfig)
    train_command.add_arguments(parser)
    arguments = parser.parse_args(argv)
    config, launched = run_config(arguments), settings_of(LaunchConfig, arguments)
    if arguments.list_checkpoints:
        train_command.list_checkpoints(config)
        return 0
    nproc = launch.num_processes(launched.nproc_per_node, config.train.device)
    train_command.refuse_silent_overwrite(config, arguments.resume)
    preflight(config, launched.nnodes * nproc)
    torchrun_flags = launched.torchrun_flags(nproc, config.run_name)
    command = launch.python_command("gpt2core.train", _without_launch_flags(argv), torchrun_flags)
    folder = RunFolder.of(config)
    too_many = too_many_sequences(folder)

    def with_a_smaller_mini_batch(code: int) -> list[str] | None:
        """The command once more, where memory ran out; several machines must be started together, and another checkpoint
        than the latest is taken only once."""
        nonlocal too_many
        before, too_many = too_many, too_many_sequences(folder)
        ran_out = code == TRY_AGAIN and too_many != before
        can_go_on = launched.nnodes == 1 and arguments.resume in (None, "latest")
        return [*command, "--resume", "latest"] if ran_out and can_go_on else None

    return launch.run_in_foreground(command, nproc, bool(torchrun_flags), with_a_smaller_mini_batch)


def _without_launch_flags(argv: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_settings(parser, LaunchConfig)
    return parser.parse_known_args(argv)[1]


def evaluate(argv: list[str]) -> None:
    from gpt2core import evaluate as evaluation

    parser = Parser(prog="gpt2 evaluate", description="Measure a checkpoint: validation loss and HellaSwag.")
    evaluation.add_arguments(parser)
    print(evaluation.describe(evaluation.evaluate(parser.parse_args(argv))))


def promote(argv: list[str]) -> None:
    from gpt2core import promote as promotion

    parser = Parser(
        prog="gpt2 promote", description="Promote the run's best measured model, if it beats what is there."
    )
    promotion.add_arguments(parser)
    promotion.run(parser.parse_args(argv))


def generate(argv: list[str]) -> None:
    from gpt2core import generate as generation
    from gpt2core import gpus

    parser = Parser(prog="gpt2 generate", description="Continue a text, or those of a file.")
    parser.add_argument("prompt", nargs="?", default=generation.PROMPT, help="text to continue")
    parser.add_argument("--prompts", metavar="FILE", type=Path, help="a prompt a line; answers as JSON lines")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts of the file computed at once")
    _add_checkpoint(parser, default="best")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest continuation, in tokens")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token each time")
    parser.add_argument("--top_k", type=int, default=50, help="draw among so many likeliest tokens; 0 among all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="draw among the likeliest with this probability in all"
    )
    parser.add_argument("--seed", type=int, default=42, help="same seed, same text")
    parser.add_argument("--samples", type=int, default=1, help="number of continuations")
    gpus.add_arguments(parser, if_busy="cpu")
    arguments = parser.parse_args(argv)
    numbers = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "seed", "samples")}
    sampling = generation.Sampling(**numbers, top_k=None if arguments.top_k == 0 else arguments.top_k)
    if arguments.batch_size < 1:
        raise ValueError(f"batch_size {arguments.batch_size}: at least 1 is needed")
    prompts = _read_prompts(arguments.prompts) if arguments.prompts else []
    checkpoint = _load(arguments)
    with contextlib.ExitStack() as held:
        with contextlib.redirect_stdout(sys.stderr):  # stdout has the answers alone
            ranks = gpus.join(arguments.device, arguments.if_gpu_busy, held, f"generating with {checkpoint.name}")
        _answer(checkpoint.model(ranks.device), arguments, prompts, sampling)


def _answer(model: GPT, arguments: argparse.Namespace, prompts: list[str], sampling: Sampling) -> None:
    from gpt2core import generate as generation

    if prompts:
        generation.check_prompts(model, prompts)  # before the first of many answers
        for start in range(0, len(prompts), arguments.batch_size):
            batch = prompts[start : start + arguments.batch_size]
            for prompt, texts in zip(batch, generation.generate_each(model, batch, sampling), strict=True):
                print(json.dumps({"prompt": prompt, "texts": texts}, ensure_ascii=False), flush=True)
    elif arguments.samples == 1:
        pieces = generation.stream(model, arguments.prompt, sampling)
        print(arguments.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    else:
        print("\n---\n".join(generation.generate(model, arguments.prompt, sampling)))


def _read_prompts(file: Path) -> list[str]:
    try:
        lines = re.split("\r?\n", file.read_bytes().decode())  # U+2028 and other such signs are text of a prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: it is not UTF-8 ({error.reason} at byte {error.start})") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: there is no prompt in it, one a line is needed")
    return prompts


def export(argv: list[str]) -> None:
    from tempfile import TemporaryDirectory

    from gpt2core.export import export_huggingface
    from gpt2core.storage import is_remote, local_path

    parser = Parser(prog="gpt2 export", description="Write a model for Hugging Face transformers.")
    _add_checkpoint(parser, default="best")
    parser.add_argument("--to", nargs=2, metavar=("FORMAT", "FOLDER"), required=True, help="hf FOLDER")
    arguments = parser.parse_args(argv)
    target_format, folder = arguments.to
    if target_format != "hf":
        raise ValueError(f"--to {target_format}: the format known is hf")
    if is_remote(folder):
        raise ValueError(f"--to {folder}: a folder on this machine is needed; gpt2 promote --publish_to writes to URLs")
    target = local_path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to {folder}: it is there and not empty; give a new folder")
    checkpoint = _load(arguments)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as building:  # whole, or not there at all
        whole = Path(building) / target.name
        export_huggingface(checkpoint.state["model"], checkpoint.config.model, whole, checkpoint.name)
        whole.rename(target)
    print(f"{folder} holds {checkpoint.name} as transformers' AutoModelForCausalLM and AutoTokenizer load it")


def import_(argv: list[str]) -> None:
    from gpt2core.import_weights import import_run
    from gpt2core.launch import exit_on_sigterm

    exit_on_sigterm()
    parser = Parser(prog="gpt2 import", description="Make a run of GPT-2 weights that others wrote.")
    parser.add_argument(
        "--from", nargs=2, metavar=("FORMAT", "PATH"), required=True, dest="source", help="hf FOLDER, or llm.c FILE"
    )
    parser.add_argument("--run_name", required=True, help="name of the run to make")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")
    arguments = parser.parse_args(argv)
    kind, path = arguments.source
    imported = import_run(kind, path, arguments.artifacts_dir, arguments.run_name)
    print(
        f"{imported.location} holds the weights of {path}, with no optimizer state: "
        f"--run_name {arguments.run_name} --checkpoint best for evaluate, generate and export, "
        f"and `gpt2 train --init_from {imported.location}` starts another run from it"
    )


def checkpoints(argv: list[str]) -> int:
    from gpt2core import listing
    from gpt2core.checkpoint_folder import CheckpointFolder
    from gpt2core.run_folder import RunFolder
    from gpt2core.storage import join

    parser = Parser(prog="gpt2 checkpoints", description="Look at a run's checkpoints, or remove old rolling ones.")
    actions = ["list", "show", "verify", "du", "prune"]
    parser.add_argument("action", nargs="?", choices=actions, default="list", help="what to do")
    parser.add_argument("name", nargs="?", help="checkpoint to show or verify; verify takes all without one")
    _add_run(parser)
    parser.add_argument("--folder", metavar="PATH|URL", help="folder of checkpoints, instead of a run's")
    parser.add_argument(
        "--keep", type=int, default=RunConfig().train.keep_checkpoints, help="rolling ones that prune leaves"
    )
    arguments = parser.parse_args(argv)
    folder = CheckpointFolder(
        arguments.folder or RunFolder(arguments.artifacts_dir, arguments.run_name).checkpoints,
    )
    if arguments.action == "show":
        listing.print_checkpoint(folder, arguments.name or "latest")
    elif arguments.action == "du":
        listing.print_disk_use(folder)
    elif arguments.action == "verify":
        from gpt2core.checkpoint import damage

        names = [arguments.name] if arguments.name else folder.names()
        listing.require_checkpoints(folder)
        bad = [name for name in names if listing.print_verdict(name, damage(folder, name))]
        return 1 if bad else 0
    else:
        if arguments.action == "prune":
            if arguments.keep < 1:
                raise ValueError(f"--keep {arguments.keep}: at least 1 stays")
            for name in folder.prune(arguments.keep):
                print(f"removed {join(folder.location, name)}")
        listing.print_checkpoints(folder)
    return 0


def tensorboard(argv: list[str]) -> None:
    from gpt2core.ports import EVERYWHERE, refuse_taken, tunnel

    parser = Parser(prog="gpt2 tensorboard", description="Show the runs' curves in TensorBoard.")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=6006, help="port to listen on")
    arguments = parser.parse_args(argv)
    if not Path(arguments.artifacts_dir).is_dir():
        raise ValueError(f"--artifacts_dir {arguments.artifacts_dir}: there is no such folder")
    refuse_taken(arguments.host, arguments.port)
    print(f"the curves that matter: http://{arguments.host}:{arguments.port}/#custom_scalars")
    print(f"from another machine: {tunnel(arguments.port, arguments.host)}, then http://127.0.0.1:{arguments.port}")
    if arguments.host in EVERYWHERE:
        print("WARNING: whoever reaches this machine can read them: TensorBoard asks for no password")
    sys.stdout.flush()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", arguments.artifacts_dir]
    os.execv(sys.executable, [*command, "--host", arguments.host, "--port", str(arguments.port)])


def status(argv: list[str]) -> None:
    from gpt2core.status import find_runs, print_status, status_of

    parser = Parser(prog="gpt2 status", description="Show how far every run is, from files alone.")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")
    parser.add_argument("--json", action="store_true", help="a JSON object a run and line, for programs")
    arguments = parser.parse_args(argv)
    artifacts = Path(arguments.artifacts_dir)
    if arguments.json:
        for folder in find_runs(artifacts):
            print(status_of(folder).model_dump_json(), flush=True)
    else:
        print_status(artifacts)


def report(argv: list[str]) -> None:
    from gpt2core.report import write_html
    from gpt2core.status import find_runs

    parser = Parser(prog="gpt2 report", description="Write the curves of one or more runs as one HTML file.")
    parser.add_argument("--run_name", nargs="+", metavar="NAME", help="runs to compare; all of them without it")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")
    parser.add_argument("--to", type=Path, metavar="FILE", help="where to write it [report.html in --artifacts_dir]")
    arguments = parser.parse_args(argv)
    artifacts = Path(arguments.artifacts_dir)
    there = {folder.path.name: folder for folder in find_runs(artifacts)}
    wanted = arguments.run_name or list(there)
    if not there or (missing := set(wanted) - there.keys()):
        what = f"no run {sorted(missing)[0]}" if there else "no run"
        raise ValueError(f"{artifacts} holds {what}; there are: {', '.join(there) or 'none'}")
    file = arguments.to or artifacts / "report.html"
    write_html([there[name] for name in wanted], file)
    print(f"{file} compares {', '.join(wanted)}" if len(wanted) > 1 else f"{file} shows {wanted[0]}")


def preflight(argv: list[str]) -> int:
    from gpt2core.launch import num_processes
    from gpt2core.preflight import examine, examine_machine

    parser = Parser(prog="gpt2 preflight", description="Check what must be right before a run, and start nothing.")
    add_settings(parser, LaunchConfig)
    add_recipe(parser)
    add_settings(parser, RunConfig)
    arguments = parser.parse_args(argv)
    config, launched = run_config(arguments), settings_of(LaunchConfig, arguments)
    found = examine_machine(config, launched)
    device = (
        "cpu"
        if any(finding.what == "GPUs" and finding.verdict == "error" for finding in found)
        else config.train.device
    )
    found += examine(config, launched.nnodes * num_processes(launched.nproc_per_node, device))
    for finding in found:
        print(finding)
    errors = sum(finding.verdict == "error" for finding in found)
    print(f"{errors} to put right before the run can start" if errors else "ready")
    return 1 if errors else 0


def clean(argv: list[str]) -> None:
    from gpt2core.clean import clean as clean_runs

    parser = Parser(
        prog="gpt2 clean", description="Remove whole runs, such as those of tests; never one that is alive."
    )
    parser.add_argument("--run_name", nargs="+", required=True, metavar="NAME", help="runs to remove")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")
    parser.add_argument("--yes", action="store_true", help="remove them; without it, only say what would go")
    arguments = parser.parse_args(argv)
    for line in clean_runs(Path(arguments.artifacts_dir), arguments.run_name, arguments.yes):
        print(line)
    if not arguments.yes:
        print("nothing was removed; --yes does it")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run_name", default=RunConfig().run_name, help="run to look at")
    parser.add_argument("--artifacts_dir", default=RunConfig().artifacts_dir, help="folder of the runs")


def _add_checkpoint(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--checkpoint", default=default, metavar="latest|best|epoch_00003|PATH|URL", help="which weights"
    )
    _add_run(parser)


def _load(arguments: argparse.Namespace) -> NamedCheckpoint:
    from gpt2core.run_checkpoint import load_named
    from gpt2core.run_folder import RunFolder

    return load_named(arguments.checkpoint, RunFolder(arguments.artifacts_dir, arguments.run_name))


COMMANDS = {
    "prepare": (prepare, "tokenize text into shards"),
    "data": (data, "check a dataset, or show what it is made of"),
    "train": (train, "train, or go on training"),
    "evaluate": (evaluate, "measure a checkpoint: validation loss and HellaSwag"),
    "promote": (promote, "make the best measured model the one in artifacts/best/"),
    "generate": (generate, "continue a text"),
    "export": (export, "write a model for Hugging Face transformers"),
    "import": (import_, "make a run of GPT-2 weights that others wrote"),
    "checkpoints": (checkpoints, "list a run's checkpoints, or remove old ones"),
    "tensorboard": (tensorboard, "show the curves"),
    "status": (status, "show how far every run is"),
    "report": (report, "write the curves of one or more runs as one HTML file"),
    "preflight": (preflight, "check what must be right before a run"),
    "clean": (clean, "remove whole runs"),
}


def run(argv: list[str]) -> int:
    listing = "\n".join(f"  {name:<12} {summary}" for name, (_, summary) in COMMANDS.items())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: gpt2 COMMAND [flags]\n\n{listing}\n\ngpt2 COMMAND --help explains one.")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        Parser(prog="gpt2").error(f"there is no command '{argv[0]}'; the commands are {', '.join(COMMANDS)}")
    command, _ = COMMANDS[argv[0]]
    return command(argv[1:]) or 0


def main() -> None:
    command = [word for word in sys.argv[1:2] if word in COMMANDS]
    main_guard(lambda: run(sys.argv[1:]), " ".join(["gpt2", *command]))


if __name__ == "__main__":
    main()
