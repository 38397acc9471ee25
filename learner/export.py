"""A checkpoint as a Hugging Face folder.

``python -m learner.export CHECKPOINT --model MODEL --dtype bfloat16 --to DIR`` is what `ringasync
export` runs for weights that are in a checkpoint only. ``DIR`` exists and is empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ringasync.errors import CheckpointError, RingError
from ringasync.runtime.role import report_error


def export_checkpoint(checkpoint: Path, model: str, dtype: str, into: Path) -> None:
    """Write the weights of a checkpoint folder as the learner would have published them.

    ``model`` is the run's starting model: the checkpoint has tensors, it has the architecture and
    the tokenizer. Memory for one copy of the model in float32 is needed, and no optimizer state.

    Raises ``CheckpointError`` (damaged, or of another model) and ``TrainingError`` (no such model).
    """
    import torch  # late: a wrong command line is answered at once

    from learner.backends.export import export_hf
    from learner.backends.pretrained import load_causal_lm
    from learner.backends.tensor_files import read_model
    from learner.backends.torch_state import model_tensors
    from learner.checkpoint import read_meta, tensors_in

    read_meta(checkpoint)
    loaded = load_causal_lm(model)
    read_model(
        tensors_in(checkpoint), {name: one.detach() for name, one in model_tensors(loaded).items()}
    )
    export_hf(loaded, into, dtype=getattr(torch, dtype), source=model)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m learner.export", description="Write a checkpoint as an HF-format folder."
    )
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("--model", required=True, help="the run's starting model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="an empty folder")
    arguments = parser.parse_args(argv)
    try:
        export_checkpoint(arguments.checkpoint, arguments.model, arguments.dtype, arguments.to)
    except CheckpointError as error:
        gone = "" if arguments.checkpoint.is_dir() else " (replaced by a newer one: try again)"
        return report_error(error, gone)
    except RingError as error:
        return report_error(error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
