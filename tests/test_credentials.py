"""A URL with a credential in it is refused before it is stored or shown anywhere, and by a sentence without it."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.utilities.schema_tools.validation import ValidationError as SchemaError
from prefect.utilities.schema_tools.validation import validate
from pydantic import ValidationError

from flows.evaluate import evaluate
from flows.pretrain import pretrain
from gpt2core.cli import run as gpt2
from gpt2core.config import DataConfig, EvalConfig, RunConfig, TrainConfig, first_error
from gpt2core.credentials import without_credentials
from gpt2core.storage import exists

SECRETS = [
    "https://me:hunter2@example.org/corpus.parquet",
    "s3://AKIA123:hunter2@bucket/shards",
    "https://example.org/corpus.parquet?X-Amz-Credential=AKIA123&X-Amz-Signature=hunter2",
    "https://account.blob.core.windows.net/c/x.txt?sv=2024&sig=hunter2",
    "https://example.org/x.txt?access_token=hunter2",
    "https://hunter2@example.org/x.txt",
    "https://example.org/x.txt?api_key=hunter2",
    "https://account.blob.core.windows.net/c/x.txt?AccountKey=hunter2",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize(
    ("group", "field"),
    [
        (DataConfig, "source"),
        (DataConfig, "data_dir"),
        (TrainConfig, "checkpoint_dir"),
        (EvalConfig, "hellaswag"),
        (RunConfig, "artifacts_dir"),
    ],
)
def test_no_setting_takes_a_credential(group: Any, field: str, url: str):
    with pytest.raises(ValidationError) as refused:
        group(**{field: url})
    sentence = first_error(refused.value)
    assert sentence.startswith(f"{field}: ")
    assert "hunter2" not in sentence and "\n" not in sentence


@pytest.mark.parametrize(
    "location",
    [
        "s3://bucket/shards",
        "abfs://container@account.dfs.core.windows.net/shards",
        "sftp://me@host/shards",
        "http://host:8080/a@b.txt",
        "https://example.org/x.txt?download=true&version=3",
        "hf://datasets/owner/name@main/x.parquet",
        "data/a:b@c",
        "HuggingFaceFW/fineweb-edu",
    ],
)
def test_other_places_are_taken(location: str):
    assert without_credentials(location) == location


@pytest.mark.parametrize("url", SECRETS)
def test_prefect_refuses_it_by_the_parameters_schema(url: str):
    validate({"data": {"source": "s3://bucket/x"}, "train": {"checkpoint_dir": None}}, schema(pretrain))
    for flow, parameters in [
        (pretrain, {"data": {"source": url}}),
        (pretrain, {"train": {"checkpoint_dir": url}}),
        (pretrain, {"artifacts_dir": url}),
        (evaluate, {"checkpoint": url}),
        (evaluate, {"hellaswag": url}),
    ]:
        with pytest.raises(SchemaError):
            validate(parameters, schema(flow), raise_on_error=True)


def schema(flow: Any) -> dict[str, Any]:
    return flow.parameters.model_dump()


@pytest.mark.parametrize("url", SECRETS)
def test_commands_refuse_it_without_repeating_it(url: str, capsys: Any, tmp_path: Any):
    for command in (
        ["prepare", "--source", url],
        ["train", "--checkpoint_dir", url],
        ["evaluate", "--checkpoint", url, "--artifacts_dir", str(tmp_path)],
        ["checkpoints", "--folder", url],
    ):
        with pytest.raises(ValueError) as refused:
            gpt2(command)
        sentence = first_error(refused.value) if isinstance(refused.value, ValidationError) else str(refused.value)
        assert "hunter2" not in sentence
    with pytest.raises(ValueError, match="holds a password, key or token"):
        exists(url)
    assert "hunter2" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["s3://bucket/runs", "https://example.org/runs"])
def test_a_run_has_its_folder_where_it_can_be_locked(url: str):
    with pytest.raises(ValidationError, match="runs have their folders on a local or mounted file system"):
        RunConfig(artifacts_dir=url)
    with pytest.raises(SchemaError):
        validate({"artifacts_dir": url}, schema(pretrain), raise_on_error=True)
