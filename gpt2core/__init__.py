"""GPT-2 pretraining as a library: no Prefect in here, only torch, numpy, tiktoken, datasets, fsspec and TensorBoard.

Modules build on the ones above them:

    config -> tokenizer, run_folder -> shards, prepare -> loader
    config -> model -> optim
    checkpoint, metrics, evaluation, hellaswag
    export, import_weights -> run_checkpoint; report -> model_card
    trainer -> train, evaluate, promote (promoted, model_card), generate -> cli
"""

__version__ = "0.1.0"
