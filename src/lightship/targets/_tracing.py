"""What the targets share when they trace a model: silence around transformers' exporters, and one error."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from lightship.checkpoint import Checkpoint
from lightship.errors import UnsupportedError
from lightship.kind import GENERATORS

HINTS = {
    "decoder": "supported are language models that transformers' exporter can trace",
    "encoder": "supported are encoders that transformers' exporter can trace, with token ids, mask and token types as "
    "inputs",
}


@contextlib.contextmanager
def tracing(checkpoint: Checkpoint, runtime: str) -> Iterator[None]:
    """Trace `checkpoint` for `runtime` quietly, without gradients. Raises `UnsupportedError` where it cannot be."""
    import torch
    from transformers.exporters import exporter_dynamo

    # they advise whoever wrote this call, not who runs it, and miss packages for vision models
    for name in ("transformers", exporter_dynamo.__file__, "torch.onnx._internal.exporter._registration"):
        logging.getLogger(name).setLevel(logging.ERROR)
    root = logging.getLogger()
    before = root.level, list(root.filters), list(root.handlers)
    try:
        with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.export's, about a type of its own
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    # whatever the exporters raise for what they cannot trace; what is none of these is a fault of ours
    except (RuntimeError, ValueError, TypeError, NotImplementedError, KeyError, AttributeError) as error:
        said = str(error).splitlines()[0] if str(error) else repr(error)
        raise UnsupportedError(
            f"the architecture {checkpoint.config.get('model_type')!r} could not be exported to {runtime}: "
            f"{type(error).__name__}: {said}",
            hint=HINTS["decoder" if checkpoint.kind in GENERATORS else "encoder"],
        ) from error
    finally:
        # OpenVINO silences all warnings while it converts, and for good when it fails
        root.setLevel(before[0])
        root.filters, root.handlers = before[1:]
