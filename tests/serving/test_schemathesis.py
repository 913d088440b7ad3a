"""The API against a client that reads its OpenAPI document and then does not keep to it (Schemathesis)."""

import re
import subprocess
import sys

import pytest

from lightship.serving.keys import KeyFile, KeyRing
from tests.serving.door import healthy, model_folder, served

# Every answer is documented, has the form that is documented, and is no 5xx; wrong data, methods and keys are refused.
# Not `positive_data_acceptance`: a document cannot say that a prompt must fit the context, or which options exclude
# each other.
CHECKS = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
          "response_schema_conformance", "negative_data_rejection", "unsupported_method", "ignored_auth"]  # fmt: skip


@pytest.mark.timeout(200)
def test_a_client_that_reads_the_document_and_breaks_every_rule(tmp_path):
    file = KeyFile(tmp_path / "keys.json")
    _, secret = file.create("admin", ["admin"])
    with served(model_folder(tmp_path, context=200), KeyRing(file)) as (url, _):
        options = {"--phases": "coverage,fuzzing", "--mode": "all",
                   "--max-examples": "40", "--checks": ",".join(CHECKS), "--seed": "1", "--request-timeout": "10",
                   "--header": f"Authorization: Bearer {secret}"}  # fmt: skip
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
        done = subprocess.run(
            [*command, *(word for pair in options.items() for word in pair)],
            capture_output=True, text=True, timeout=180, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) > 500  # requests, not phases
        healthy(url, Authorization=f"Bearer {secret}")
