"""The live progress of an epoch, out of the trainer's lines."""

from __future__ import annotations

import time

import pytest
from prefect.client.schemas.actions import ArtifactCreate

from gpt2core.log_line import parse, seconds_of, short_duration, step_line
from tasks.artifacts import artifact_key
from tasks.dashboard import markdown_table
from tasks.epoch_progress import EpochProgress


def test_progress_says_how_far_the_epoch_is_and_when_epoch_and_run_are_done():
    progress = EpochProgress("gpt2", epoch=2, num_epochs=5)
    progress.bar.updated = time.monotonic()  # as if it had just been shown: here is no server to show it
    now = {"loss": 3.21, "tokens_per_sec": 580_000.0, "max_steps": 100_000, "eta_s": 75_000.0}
    lines = [
        "2026-11-23 08:00:00 " + step_line(24_750, {"val_loss": 3.3}),
        "2026-11-23 08:00:01 " + step_line(25_000, now),
        "2026-11-23 08:00:02 step=25000 saved rolling_step_025000.pt as latest.pt (1.5 GB in 2 s)",
    ]
    for line in lines:
        progress.look(line)
    assert progress.percent() == pytest.approx(25.0)
    assert progress.describe() == (
        "epoch 2 of 5, step 25,000 of 100,000, loss 3.21, val_loss 3.3, 580,000 tokens/s; "
        "to go: epoch 4h10m, run 20h50m"
    )


def test_a_step_line_is_words_that_can_be_read_back():
    line = step_line(250, {"loss": 3.211849, "lr": 3.5e-4, "max_steps": 95_365, "eta_s": 184_000.0})
    assert line == "step=250 loss=3.2118 lr=0.00035 of=95365 eta=2d03h"
    assert parse(f"2026-11-23 08:00:00 {line}") == {
        "step": "250",
        "loss": "3.2118",
        "lr": "0.00035",
        "of": "95365",
        "eta": "2d03h",
    }
    for other in ("step=10 sample: 'a=b'", "step=4 saved rolling_step_000004.pt as latest.pt", "device: cpu", ""):
        assert parse(other) == {}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (3599, "59m59s"), (7260, "2h01m"), (183_600, "2d03h")]
)
def test_durations_take_two_units(seconds: float, text: str):
    assert short_duration(seconds) == text
    assert seconds_of(text) == pytest.approx(seconds, abs=1)


def test_each_name_has_a_key_of_its_own_that_prefect_takes():
    assert artifact_key("training", "demo-2") == "training-demo-2", "as it is, where it can be"
    url = "https://example.org/" + "a" * 200
    alike = ["demo_2", "demo.2", "Demo-2", "demo-2-", "DEMO_2", "", "/", "é", url, url.replace("org", "com")]
    keys = [artifact_key("training", name) for name in ["demo-2", *alike]]
    assert len(set(keys)) == len(keys)
    assert max(map(len, keys)) < 130
    for key in keys:
        assert ArtifactCreate(key=key).key == key
    assert artifact_key("dataset", "/data/Edu_FineWeb10B/").startswith("dataset-data-edu-fineweb10b-")


def test_tables_hold_what_their_pages_take():
    table = markdown_table(("why",), [("a|b",)])
    assert table == "| why |\n| --- |\n| a\\|b |"
