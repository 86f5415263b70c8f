"""`gpt2`: every command helps, refuses in one sentence, and does what its name says."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.cli import COMMANDS, run
from gpt2core.ports import taken

pytestmark = pytest.mark.slow  # each test starts trainers or other processes

TINY = ["--run_name", "tiny", "--artifacts_dir"]


@pytest.fixture
def tiny(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return lab.copy_run(straight, tmp_path)


def gpt2(*arguments: object) -> int:
    return run([str(argument) for argument in arguments])


def assert_one_sentence(done: Any, *words: str) -> None:
    """It failed, and stderr has one line that holds these words and says first which program it is from."""
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr + done.stdout
    assert re.fullmatch(r"(gpt2|gpt2 [a-z]+|python -m gpt2core\.[a-z]+): error: .+\n", done.stderr), done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_help(command: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as left:
        gpt2(command, "--help")
    assert left.value.code == 0
    assert f"gpt2 {command}" in capsys.readouterr().out


def test_gpt2_lists_its_commands(lab: Any) -> None:
    done = lab.run("gpt2core.cli", ["--help"])
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert lab.run("gpt2core.cli", []).returncode != 0


WITHOUT_TORCH = """
import contextlib, sys
from gpt2core.cli import run
for command in sys.argv[3:]:
    with contextlib.suppress(SystemExit):
        run([command, "--help"])
run(["status", "--artifacts_dir", sys.argv[1]])
run(["checkpoints", "list", "--run_name", "tiny", "--artifacts_dir", sys.argv[1]])
run(["train", "--run_name", "tiny", "--artifacts_dir", sys.argv[1], "--data_dir", sys.argv[2], "--list_checkpoints"])
sys.exit("torch" in sys.modules)
"""


def test_what_computes_nothing_does_not_wait_for_torch(tiny: Path, lab: Any) -> None:
    computing = {"evaluate", "promote", "generate", "export", "import"}
    arguments = map(str, [tiny.parent, lab.data_dir, *COMMANDS.keys() - computing])
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch_00001") == 2


def test_help_of_train_names_every_flag_of_the_contract(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        gpt2("train", "--help")
    shown = capsys.readouterr().out
    flags = """--total_batch_size --mini_batch_size --context_length --num_layers --embd_size --num_heads --max_lr --min_lr
    --warmup_steps --num_epochs --steps_per_epoch --eval_freq --checkpoint_freq --keep_checkpoints --use_tensorboard
    --run_name --resume --list_checkpoints --data_dir --artifacts_dir --nproc_per_node"""
    assert [flag for flag in flags.split() if f"{flag} " not in shown and f"{flag}," not in shown] == []


# --- refusals, as a person sees them ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["there is no command 'trian'", "train"]),
        (["train", "--max_lr", "fast"], ["max_lr", "fast"]),
        (["train", "--num_heads", "5"], ["embd_size 768", "num_heads 5"]),
        (["train", "--min_batch_size", "4"], ["--min_batch_size", "did you mean --mini_batch_size?"]),
        (["generate", "--max_new_tokens", "many"], ["--max_new_tokens", "many"]),
        (["checkpoints", "prune", "--keep", "0"], ["--keep 0"]),
        (["export", "--to", "onnx", "somewhere"], ["onnx", "hf"]),
        (["evaluate", "--checkpoint", "nothing", "--artifacts_dir", "/nonexistent"], ["nothing", "there are: none"]),
        (["promote", "--artifacts_dir", "/nonexistent"], ["no measured checkpoint"]),
        (["promote", "--rule", "loss"], ["gpt2 promote: error: rule:", "'val_loss' or 'acc_norm', got 'loss'"]),
        (["promote", "--rollback", "--history"], ["--history", "not allowed with", "--rollback"]),
        (["import", "--from", "hf", "/nonexistent", "--run_name", "a"], ["/nonexistent holds no config.json"]),
        (["tensorboard", "--artifacts_dir", "/nonexistent"], ["/nonexistent"]),
    ],
    ids=lambda value: "_".join(value[:2]) if isinstance(value, list) else None,
)
def test_bad_values_are_refused_in_one_sentence(
    arguments: list[str], words: list[str], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the guard that the `gpt2` script runs."""
    from gpt2core.cli import main

    monkeypatch.setattr("sys.argv", ["gpt2", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code not in (0, None)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    "flags",
    [
        ["--top_k", "-1"],
        ["--samples", "0"],
        ["--samples", "-1"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--max_new_tokens", "-5"],
    ],
    ids=" ".join,
)
def test_generate_refuses_numbers_that_mean_nothing(tiny: Path, flags: list[str]) -> None:
    with pytest.raises(ValueError, match=flags[0].removeprefix("--")):
        gpt2("generate", "Hello", *TINY, tiny.parent, "--checkpoint", "latest", "--device", "cpu", *flags)


def test_evaluate_refuses_zero_val_tokens(tiny: Path, lab: Any) -> None:
    with pytest.raises(ValueError, match="val_tokens"):
        gpt2("evaluate", *TINY, tiny.parent, "--hellaswag", lab.examples(4), "--device", "cpu", "--val_tokens", "0")


def test_a_real_process_refuses_in_one_sentence(lab: Any, tmp_path: Path) -> None:
    assert_one_sentence(lab.run("gpt2core.cli", ["fly"]), "gpt2: error: there is no command 'fly'")
    assert_one_sentence(lab.run("gpt2core.cli", ["train", "--embd_size", "-1"]), "gpt2 train: error: ", "embd_size")
    assert_one_sentence(lab.run("gpt2core.cli", ["train", "--embd", "1"]), "gpt2 train: error: unrecognized")
    nowhere = ["--data_dir", tmp_path / "nowhere", "--artifacts_dir", tmp_path]
    assert_one_sentence(lab.run("gpt2core.train", nowhere), "python -m gpt2core.train: error: ", "nowhere")


def test_a_gpu_that_is_not_there_is_refused_in_one_sentence(lab: Any, tmp_path: Path) -> None:
    flags = lab.flags(tmp_path, device="cuda", mini_batch_size=1, total_batch_size=99 * 32)
    if torch.cuda.is_available():
        assert_one_sentence(lab.run("gpt2core.cli", ["train", "--nproc_per_node", "99", *flags]), "nproc_per_node 99")
        return
    assert_one_sentence(lab.run("gpt2core.train", flags), "device cuda", "--device cpu")
    done = lab.run("gpt2core.cli", ["train", "--nproc_per_node", "2", *lab.flags(tmp_path, device="cuda")])
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(said) == 1 and "device cuda" in said[0], said


# --- what commands do ------------------------------------------------------------------------------------------------


def test_train_runs_to_its_end(lab: Any, tmp_path: Path) -> None:
    flags = lab.flags(tmp_path, num_epochs=1, steps_per_epoch=2)
    done = lab.run("gpt2core.cli", ["train", *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(lab.logged(tmp_path / "tiny", "loss")) == [1, 2]
    assert lab.load(tmp_path / "tiny" / "checkpoints" / "epoch_00001.pt")["step"] == 2
    again = lab.run("gpt2core.cli", ["train", *flags])
    assert_one_sentence(again, "--resume latest", "--run_name")


def test_train_lists_checkpoints(tiny: Path, lab: Any, capsys: Any) -> None:
    assert gpt2("train", "--nproc_per_node", "2", *lab.flags(tiny.parent), "--list_checkpoints") == 0
    assert "epoch_00001" in capsys.readouterr().out


def test_status_shows_runs_and_what_is_promoted(tiny: Path, lab: Any, capsys: Any) -> None:
    assert gpt2("status", "--artifacts_dir", tiny.parent) == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if line.startswith("│ tiny")]
    assert f"{lab.logged(tiny, 'loss')[24]:.4f}" in row
    assert f"{lab.logged(tiny, 'val_loss')[24]:.4f}" in row
    assert "promoted: nothing yet" in shown


def test_status_of_an_empty_folder(tmp_path: Path, capsys: Any) -> None:
    assert gpt2("status", "--artifacts_dir", tmp_path) == 0
    assert "no runs" in capsys.readouterr().out


def test_checkpoints_lists_and_prunes(tiny: Path, capsys: Any) -> None:
    folder = tiny / "checkpoints"
    assert gpt2("checkpoints", *TINY, tiny.parent) == 0
    shown = capsys.readouterr().out
    assert all(path.stem in shown for path in folder.glob("*.pt"))
    rolling = sorted(path.stem for path in folder.glob("rolling_*.pt"))
    assert len(rolling) == 3
    assert gpt2("checkpoints", "prune", "--keep", "1", *TINY, tiny.parent) == 0
    shown = capsys.readouterr().out
    assert [path.stem for path in folder.glob("rolling_*.pt")] == rolling[-1:]
    assert [path.stem for path in folder.glob("rolling_*.json")] == rolling[-1:]
    assert all(f"removed {folder / name}.pt" in shown for name in rolling[:-1])
    for name in ("latest", "latest_backup", "best_model", "epoch_00001", "epoch_00002"):
        assert (folder / f"{name}.pt").exists()


def test_checkpoints_shows_one_and_refuses_what_is_not_there(tiny: Path, lab: Any, capsys: Any) -> None:
    where = [*TINY, tiny.parent]
    assert gpt2("checkpoints", "show", *where) == 0
    shown = capsys.readouterr().out
    assert str(tiny / "checkpoints" / "latest.pt") in shown
    saved = json.loads((tiny / "checkpoints" / "latest.json").read_text())
    rows = dict(re.findall(r"│ (\w+) +│ +(.*?) │", shown))
    assert rows["step"] == "24" and rows["sha256"] == saved["sha256"] and rows["saved_at"] == saved["saved_at"]
    assert float(rows["val_loss"]) == lab.logged(tiny, "val_loss")[24]
    assert gpt2("checkpoints", "show", "epoch_00001", *where) == 0
    assert re.search(r"│ step +│ +12 │", capsys.readouterr().out)
    with pytest.raises(ValueError, match=r"no whole checkpoint epoch_00009; there are: best_model, epoch_00001"):
        gpt2("checkpoints", "show", "epoch_00009", *where)
    for action in ("list", "show", "verify", "du"):
        with pytest.raises(ValueError, match=r"nothing/checkpoints holds no checkpoints"):
            gpt2("checkpoints", action, "--run_name", "nothing", "--artifacts_dir", tiny.parent)


def test_checkpoints_verify_finds_a_flipped_byte_and_a_missing_sidecar(tiny: Path, capsys: Any) -> None:
    where, folder = [*TINY, tiny.parent], tiny / "checkpoints"
    names = {path.stem for path in folder.glob("*.pt")}
    assert gpt2("checkpoints", "verify", *where) == 0
    assert set(capsys.readouterr().out.splitlines()) == {f"{name}: whole" for name in names}
    content = bytearray((folder / "epoch_00001.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "epoch_00001.pt").unlink()  # it shares its file with others
    (folder / "epoch_00001.pt").write_bytes(content)
    (folder / "best_model.json").unlink()
    assert gpt2("checkpoints", "verify", *where) == 1
    said = capsys.readouterr().out.splitlines()
    assert sorted(line for line in said if not line.endswith(": whole")) == [
        "best_model: DAMAGED, its sidecar is missing or does not fit",
        f"epoch_00001: DAMAGED, {folder}/epoch_00001.pt: its content does not have the hash in its sidecar, "
        f"so it is damaged",
    ]
    assert len(said) == len(names)
    assert gpt2("checkpoints", "verify", "latest", *where) == 0
    assert gpt2("checkpoints", "verify", "epoch_00001", *where) == 1
    assert gpt2("checkpoints", "verify", "epoch_00009", *where) == 1


def test_checkpoints_du_counts_a_shared_file_once(tiny: Path, capsys: Any) -> None:
    assert gpt2("checkpoints", "du", *TINY, tiny.parent) == 0
    shown = capsys.readouterr().out
    sizes = {path: path.stat() for path in (tiny / "checkpoints").glob("*.pt")}
    once = sum({stat.st_ino: stat.st_size for stat in sizes.values()}.values())
    assert f"{once / 1e6:.1f} MB stored" in shown
    tiers = {"latest": 1, "latest_backup": 1, "best_model": 1, "epoch": 2, "rolling": 3}
    for tier, files in tiers.items():
        count = sum(stat.st_size for path, stat in sizes.items() if re.fullmatch(rf"{tier}[\d_step]*", path.stem))
        assert re.search(rf"│ {tier} +│ +{files} │ +{count / 1e6:.1f} MB │", shown), shown


def test_export_writes_what_transformers_loads(tiny: Path, lab: Any, tmp_path: Path) -> None:
    import transformers

    target = tmp_path / "exported"
    assert gpt2("export", "--to", "hf", target, "--checkpoint", "epoch_00001", *TINY, tiny.parent) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    weights = lab.load(tiny / "checkpoints" / "epoch_00001.pt")["model"]
    assert torch.equal(model.transformer.wte.weight, weights["transformer.wte.weight"][:50257])
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, weights["transformer.h.0.mlp.c_fc.weight"].t())
    modes = {path.stat().st_mode & 0o777 for path in target.iterdir()}
    assert len(modes) == 1  # who may read one may read all
    with pytest.raises(ValueError, match="not empty"):
        gpt2("export", "--to", "hf", target, *TINY, tiny.parent)
    with pytest.raises(ValueError, match=r"--to s3://bucket/model: a folder on this machine is needed"):
        gpt2("export", "--to", "hf", "s3://bucket/model", *TINY, tiny.parent)
    assert {path.name for path in tmp_path.iterdir()} == {"exported", "tiny"}


def test_generate_answers_a_file_of_prompts(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    prompts = tmp_path / "prompts.txt"
    asked = ["First Citizen:", "États,\u2028à\x85\x0c\rla", "What"]  # only a newline parts prompts
    prompts.write_bytes("{}\n\n{}\r\n{}\n".format(*asked).encode())
    command = ["generate", "--prompts", prompts, *TINY, tiny.parent, "--device", "cpu", "--max_new_tokens", "8"]
    for batch_size in (1, 2):
        assert gpt2(*command, "--samples", "2", "--batch_size", batch_size) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.strip().split("\n")]
    assert [answer["prompt"] for answer in answers[:3]] == asked
    assert all(text.startswith(answer["prompt"]) for answer in answers for text in answer["texts"])
    assert answers[:3] == answers[3:] and len(answers[0]["texts"]) == 2
    prompts.write_text("\n")
    with pytest.raises(ValueError, match="there is no prompt in it"):
        gpt2(*command)
    prompts.write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"prompts\.txt: it is not UTF-8 \(.* at byte 3\)"):
        gpt2(*command)


def test_generate_continues_a_text(tiny: Path, capsys: Any) -> None:
    command = ["generate", "First Citizen:", *TINY, tiny.parent, "--device", "cpu", "--max_new_tokens", "8"]
    assert gpt2(*command, "--samples", "2") == 0
    text = capsys.readouterr().out
    assert text.count("First Citizen:") == 2
    assert gpt2(*command, "--samples", "2") == 0
    assert capsys.readouterr().out == text
    assert gpt2(*command, "--samples", "2", "--seed", "1") == 0
    assert capsys.readouterr().out != text


def test_a_prompt_longer_than_the_context_is_refused_before_any_text(tiny: Path, lab: Any, tmp_path: Path) -> None:
    where = [*TINY, tiny.parent, "--device", "cpu"]
    sentence = (
        "gpt2 generate: error: the prompt 'word word word word  ...' has 41 tokens and the model's context_length is 32"
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("short\n" + "word " * 40)
    for words in (["word " * 40], ["--prompts", prompts, "--batch_size", "1"]):
        refused = lab.run("gpt2core.cli", ["generate", *words, *where])
        assert_one_sentence(refused, sentence, ": at most 31 leave room")
        assert refused.stdout == ""


def test_promote_after_evaluate(tiny: Path, lab: Any, capsys: Any) -> None:
    evaluate = [
        "evaluate",
        "--checkpoint",
        "best",
        "--hellaswag",
        lab.examples(4),
        "--device",
        "cpu",
        *TINY,
        tiny.parent,
    ]
    assert not gpt2(*evaluate)
    assert not gpt2("promote", *TINY, tiny.parent)
    assert "promoted: tiny" in capsys.readouterr().out
    assert not gpt2("status", "--artifacts_dir", tiny.parent)
    assert "promoted: tiny step" in capsys.readouterr().out
    assert (tiny.parent / "best" / "model.safetensors").exists()


@pytest.mark.slow
def test_tensorboard_ends_with_the_command_that_started_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["tensorboard", "--artifacts_dir", str(tmp_path), "--port", str(port)]
    with subprocess.Popen([sys.executable, "-m", "gpt2core.cli", *words], stderr=subprocess.PIPE, text=True) as command:
        assert command.stderr
        assert next(line for line in command.stderr if f"http://127.0.0.1:{port}" in line)
        command.terminate()
    assert taken("127.0.0.1", port) is None
