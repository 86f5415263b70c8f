"""What artifacts/best/ holds: whole and the one that was measured, after a rollback, a kill and at a URL, too."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from promotions import history, record, score, without_metrics
from servers import DEADLINE_S, S3

from gpt2core import __version__, lock
from gpt2core.cli import run as gpt2
from gpt2core.code_version import code_version
from gpt2core.config import VOCAB_SIZE
from gpt2core.generate import Sampling, generate
from gpt2core.promote import promote
from gpt2core.promoted import PromotedModels
from gpt2core.records import current_best, published_at
from gpt2core.run_checkpoint import load_at, load_named
from gpt2core.run_folder import RunFolder


@pytest.fixture
def run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return without_metrics(lab.copy_run(straight, tmp_path))


@pytest.fixture
def other_run(lab: Any, straight: Path, tmp_path: Path) -> Path:
    return without_metrics(lab.copy_run(straight, tmp_path, name="other"))


# --- what is promoted ------------------------------------------------------------------------------------------------


def test_what_is_promoted_is_the_measured_model_as_transformers_loads_it(run: Path, straight: Path, lab: Any) -> None:
    import transformers

    shutil.copy(straight / "metrics.jsonl", run)
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    best = run.parent / "best"
    checkpoint = lab.load(run / "checkpoints" / "epoch_00001.pt")
    ours = load_named("epoch_00001", RunFolder(run.parent, "tiny")).model("cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(best).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(best)
    text = "First Citizen: Before we proceed any further"
    tokens = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = ours(tokens)[..., :VOCAB_SIZE]
        logits = theirs(tokens).logits
    assert logits.shape == expected.shape
    assert torch.allclose(logits, expected, atol=1e-4, rtol=0)
    continued = theirs.generate(tokens, max_new_tokens=16, do_sample=False)[0]
    assert [tokenizer.decode(continued)] == generate(ours, text, Sampling(16, temperature=0))
    assert json.loads((best / "evaluation.json").read_text())["val_loss"] == 3.5
    assert json.loads((best / "training_config.json").read_text()) == checkpoint["config"]
    steps = [json.loads(line)["step"] for line in (best / "metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 12


def test_the_record_says_what_was_beaten_and_where_the_model_comes_from(run: Path, other_run: Path, lab: Any) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    record(other_run, "epoch_00002", 3.25)
    promote(run.parent, "other")
    said = json.loads((run.parent / "best" / "promotion.json").read_text())
    assert (said["candidate"]["run_name"], said["candidate"]["step"]) == ("other", 24)
    assert (said["beaten"]["run_name"], said["better_by"], said["rule"]) == ("tiny", 0.25, "val_loss")
    checkpoint = lab.load(other_run / "checkpoints" / "epoch_00002.pt")
    assert said["train_fingerprint"] == checkpoint["data"]["fingerprint"]
    assert said["candidate"]["val_fingerprint"] == "same"
    assert said["candidate"]["sha256"] == json.loads((other_run / "checkpoints/epoch_00002.json").read_text())["sha256"]
    assert said["trained_with"]["version"] == said["promoted_with"]["version"] == __version__
    assert said["trained_with"]["commit"] == code_version().commit
    assert history(run.parent)[-1] == said


def test_the_card_shows_figures_curves_and_origin(run: Path, straight: Path, lab: Any) -> None:
    record(run, "epoch_00002", 3.5, hellaswag=score(0.3))
    logged = (straight / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(logged + '{"step": 24, "acc": 0.25, "acc_norm": 0.3}\n')
    promote(run.parent, "tiny")
    best = run.parent / "best"
    card = ModelCard.load(best / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    results = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert results["validation shard", "loss"] == 3.5
    assert results["HellaSwag (build-nanogpt)", "acc_norm"] == 0.3
    shown = [line.rpartition("(")[2].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert shown == ["loss.png", "hellaswag.png"]
    assert all((best / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    checkpoint = lab.load(run / "checkpoints" / "epoch_00002.pt")
    assert "| validation loss | 3.5000 nats a token |" in card.text
    assert "acc_norm | 0.3000 ± 0.0300 |" in card.text
    assert checkpoint["data"]["fingerprint"] in card.text
    assert f"{checkpoint['tokens_seen']:,} tokens of {lab.source}" in card.text
    assert card.data.datasets is None, "a file of this machine is no dataset of the hub"


def test_the_promoted_model_outlives_its_run(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    shutil.rmtree(run)
    assert (run.parent / "best" / "model.safetensors").stat().st_size > 0


def test_the_code_version_is_of_a_checkout_that_holds_the_package(tmp_path: Path) -> None:
    package, environment = tmp_path / "package", os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert code_version(package).model_dump() == {"version": __version__, "commit": None, "dirty": None}

    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, env=environment, capture_output=True, check=True)
        return done.stdout.decode().strip()

    def seen() -> tuple[str | None, bool | None]:
        code_version.cache_clear()
        version = code_version(package)
        return version.commit, version.dirty

    git("init", "--quiet")
    assert seen() == (None, None), "it lies in a checkout, as an environment may, and does not belong to it"
    git("add", "package")
    git("commit", "--quiet", "--message", "a")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "data.txt").write_text("untracked")
    assert seen() == (commit, False)
    (package / "__init__.py").write_text("changed = True")
    assert seen() == (commit, True)
    code_version.cache_clear()


# --- back again ------------------------------------------------------------------------------------------------------


@pytest.fixture
def three_promoted(run: Path) -> PromotedModels:
    """Of validation loss 3.5, 3.4 and 3.3."""
    for name, loss in (("epoch_00001", 3.5), ("epoch_00002", 3.4), ("epoch_00001", 3.3)):
        record(run, name, loss)
        assert promote(run.parent, "tiny").promoted
    return PromotedModels(run.parent)


def best_loss(models: PromotedModels) -> float:
    """Of the model that readers see, which must be whole."""
    for name in ("model.safetensors", "config.json", "vocab.json", "README.md", "training_config.json"):
        assert (models.link / name).stat().st_size > 0
    found = current_best(models.artifacts)
    assert found
    return found.val_loss


def test_rollback_goes_back_one_by_one_and_a_later_promotion_compares_with_what_is_there(
    run: Path, three_promoted: PromotedModels, capsys: Any
) -> None:
    where = ["--artifacts_dir", str(run.parent), "--run_name", "tiny"]
    assert not gpt2(["promote", "--rollback", *where])
    assert capsys.readouterr().out == "rolled back: best is tiny epoch_00002 (step 24) again\n"
    assert best_loss(three_promoted) == 3.4
    record(run, "epoch_00001", 3.35)
    assert promote(run.parent, "tiny").better_by == pytest.approx(0.05)
    for loss in (3.4, 3.5):
        gpt2(["promote", "--rollback", *where])
        assert best_loss(three_promoted) == loss
    with pytest.raises(ValueError, match="best holds the first model that was promoted: there is none before it"):
        gpt2(["promote", "--rollback", *where])
    losses = [(line["action"], line["candidate"]["val_loss"]) for line in history(run.parent)]
    promotions = [("promote", 3.5), ("promote", 3.4), ("promote", 3.3), ("rollback", 3.4), ("promote", 3.35)]
    assert losses == [*promotions, ("rollback", 3.4), ("rollback", 3.5)]
    capsys.readouterr()
    assert not gpt2(["promote", "--history", *where])
    table = [line for line in capsys.readouterr().out.splitlines() if "tiny 12" in line or "tiny 24" in line]
    assert [line.split("│")[2].strip() for line in table] == ["promoted"] * 3 + ["rolled back to", "promoted"] + [
        "rolled back to"
    ] * 2
    assert all(" 3.3500 " in line for line in table[4:5])


def test_rollback_without_anything_to_go_back_to_is_refused(tmp_path: Path, three_promoted: PromotedModels) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="best: nothing was promoted yet, so there is nothing to go back from"):
        gpt2(["promote", "--rollback", "--artifacts_dir", str(empty)])
    shutil.rmtree(next(three_promoted.versions.glob("0002_*")))
    with pytest.raises(ValueError, match=r"0002_tiny_step_000024/promotion.json is not there"):
        gpt2(["promote", "--rollback", "--artifacts_dir", str(three_promoted.artifacts)])
    assert best_loss(three_promoted) == 3.3


def test_a_best_that_was_not_promoted_here_is_left_alone(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    (run.parent / "best").mkdir()
    with pytest.raises(ValueError, match=r"best is no link into .*promoted, so it was not promoted: move it away"):
        promote(run.parent, "tiny")


# --- two at once, and kills ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_promotions_at_once_are_both_decided_one_after_the_other(run: Path, other_run: Path, lab: Any) -> None:
    for folder, loss in ((run, 3.5), (other_run, 3.4)):
        record(folder, "epoch_00001", loss)
    models = PromotedModels(run.parent)
    command = ["--artifacts_dir", str(run.parent), "--run_name"]
    with (
        lab.started(run, [*command, "tiny"], module="gpt2core.promote") as one,
        lab.started(run, [*command, "other"], module="gpt2core.promote") as two,
    ):
        with lock.hold(models.versions / lock.LOCK_FILE):
            for started in (one, two):
                started.wait_for(lambda started=started: "waiting for process" in started.output, "it to wait")
        assert (one.wait(), two.wait()) == (0, 0), one.output + two.output
    assert best_loss(models) == 3.4
    assert sorted(line["candidate"]["val_loss"] for line in history(run.parent)) == [3.4, 3.5]


# Promotes or rolls back in children, of which the Nth is killed right before its Nth change to the links and records.
KILLER = """
import os, signal, subprocess, sys
from gpt2core.promote import promote
from gpt2core.promoted import PromotedModels

before, work, action = sys.argv[1:]
WATCHED = (".best.new", "pending.json", "history.jsonl", ".building")

def dying(call):
    def count(*arguments, **options):
        global left
        if any(str(argument).endswith(WATCHED) or str(argument) == folder for argument in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return count

for kill_at in range(1, 1000):
    folder = f"{work}/killed_at_{kill_at}"
    subprocess.run(["cp", "-a", before, folder], check=True)
    child = os.fork()
    if child == 0:
        left = kill_at
        for name in ("replace", "rename", "symlink", "unlink", "mkdir", "open"):
            setattr(os, name, dying(getattr(os, name)))
        os.fsync = lambda descriptor: None  # of no use against a kill, and most of the time
        if action == "promote":
            promote(folder, "other")
        else:
            models = PromotedModels(folder)
            with models.held():
                models.roll_back()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("action", "new_loss"), [("promote", 3.2), ("rollback", 3.4)])
def test_killed_anywhere_the_old_or_the_new_is_best_and_the_next_puts_the_rest_right(
    three_promoted: PromotedModels, other_run: Path, tmp_path: Path, action: str, new_loss: float
) -> None:
    before, work = three_promoted.artifacts, tmp_path.with_name(f"{tmp_path.name}_killed")
    record(other_run, "epoch_00002", 3.2)
    work.mkdir()
    known = history(before)
    done = subprocess.run([sys.executable, "-c", KILLER, before, work, action], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = [work / f"killed_at_{n + 1}" for n in range(len(list(work.iterdir())))]
    assert len(folders) >= 7
    seen = []
    for folder in folders:
        models = PromotedModels(folder)
        seen.append(best_loss(models))
        with models.held():
            pass
        assert best_loss(models) == seen[-1], "what readers saw stays"
        decided = [line["candidate"]["val_loss"] for line in history(folder)[len(known) :]]
        assert decided == ([new_loss] if seen[-1] == new_loss else []), "history has what happened, and once"
        numbers = sorted(path.name[:4] for path in models.versions.iterdir() if path.is_dir())
        assert numbers == ["0001", "0002", "0003", "0004"][: 4 if decided and action == "promote" else 3]
        assert not list(models.versions.glob(".*.building")) and not models.pending_file.exists()
    assert [loss for loss, _ in itertools.groupby(seen)] == [3.3, new_loss], "old, then new"


def test_a_history_line_that_a_crash_cut_short_takes_no_other_with_it(run: Path) -> None:
    record(run, "epoch_00001", 3.5)
    promote(run.parent, "tiny")
    with (run.parent / "promoted" / "history.jsonl").open("a") as file:
        file.write('{"promoted": fal')
    record(run, "epoch_00002", 3.4)
    promote(run.parent, "tiny")
    assert [found.candidate.val_loss for found in PromotedModels(run.parent).history()] == [3.5, 3.4]


# --- at a URL --------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote_run(run: Path, s3: S3) -> Path:
    """The run, as if it had its checkpoints at s3://BUCKET/checkpoints/tiny."""
    config = json.loads((run / "config.json").read_text())
    config["train"]["checkpoint_dir"] = f"{s3.bucket_url}/checkpoints"
    (run / "config.json").write_text(json.dumps(config))
    for name in ("epoch_00001", "best_model"):
        for suffix in ("pt", "json"):
            s3.add(f"checkpoints/tiny/{name}.{suffix}", (run / "checkpoints" / f"{name}.{suffix}").read_bytes())
    shutil.rmtree(run / "checkpoints")
    return run


@pytest.mark.slow
def test_checkpoints_at_a_url_are_promoted_and_published_to_one(remote_run: Path, s3: S3, capsys: Any) -> None:
    artifacts, place = remote_run.parent, f"{s3.bucket_url}/best"
    record(remote_run, "epoch_00001", 3.5)
    command = ["promote", "--artifacts_dir", str(artifacts), "--run_name", "tiny", "--publish_to", place]
    gpt2(command)
    published = published_at(place)
    assert published and published.candidate == current_best(artifacts)
    local = {path.name: path.read_bytes() for path in (artifacts / "best").iterdir()}
    assert s3.contents(f"best/{published.folder}") == local
    assert s3.requests("PUT")[-1] == "best/best.json", "what names it goes last"
    assert f"published: {place}/{published.folder}" in capsys.readouterr().out
    sent = len(s3.requests("PUT"))
    gpt2(command)
    assert "published already" in capsys.readouterr().out and len(s3.requests("PUT")) == sent
    there, here = load_at(place), load_at(str(artifacts / "best"))
    assert there and here and there.state["step"] == 12
    assert all(torch.equal(tensor, here.state["model"][name]) for name, tensor in there.state["model"].items())


@pytest.mark.slow
def test_a_publication_that_is_killed_leaves_the_old_one_and_is_done_by_the_next(run: Path, s3: S3, lab: Any) -> None:
    place = f"{s3.bucket_url}/best"
    command = ["promote", "--artifacts_dir", str(run.parent), "--run_name", "tiny", "--publish_to", place]
    record(run, "epoch_00001", 3.5)
    gpt2(command)
    first = published_at(place)
    record(run, "epoch_00002", 3.4)
    held = s3.hold("PUT", "tokenizer_config.json")
    with lab.started(run, command, module="gpt2core.cli") as promoter:
        promoter.wait_for(held.reached.is_set, "the upload")
        promoter.kill_everything()
        promoter.wait()
    held.release(drop=True)
    assert published_at(place) == first
    gpt2(command)  # which has nothing to promote any more
    second = published_at(place)
    assert second and second.candidate.val_loss == 3.4
    assert len(s3.contents(f"best/{second.folder}")) == len(list((run.parent / "best").iterdir()))
    gpt2([*command, "--rollback"])
    again = published_at(place)
    assert first and again and again.folder == first.folder


@pytest.mark.slow
def test_a_best_checkpoint_replaced_while_it_is_read_is_not_promoted_under_the_old_measurement(
    remote_run: Path, s3: S3
) -> None:
    record(remote_run, "best_model", 3.3)
    record(remote_run, "epoch_00001", 3.5)
    held = s3.hold("GET", "best_model.pt")
    with ThreadPoolExecutor() as pool:
        promotion = pool.submit(promote, remote_run.parent, "tiny")
        assert held.reached.wait(DEADLINE_S)
        newer = s3.contents("checkpoints/tiny")
        for suffix in ("pt", "json"):
            s3.add(f"checkpoints/tiny/best_model.{suffix}", newer[f"epoch_00001.{suffix}"])
        held.release()
        decision = promotion.result(DEADLINE_S)
    assert decision.promoted and (decision.candidate.step, decision.candidate.val_loss) == (12, 3.5)
    assert current_best(remote_run.parent) == decision.candidate


def test_a_link_to_a_version_that_is_gone_is_an_error(run: Path) -> None:
    record(run, "epoch_00002", 3.5)
    promote(run.parent, "tiny")
    shutil.rmtree((run.parent / "best").resolve())
    with pytest.raises(
        ValueError, match=r"best leads to promoted/0001_tiny_step_000024, which is not there: restore it"
    ):
        promote(run.parent, "tiny")
