"""Reference of the reasons of quarantine, the exit statuses and the environment variables, from the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import schemas.reasons
from reinforce import errors
from reinforce_docs.tables import cell, code, table

ROOT = Path(__file__).parents[1]
#: Environment variables that commands read or set -> what they mean for users.
VARIABLES = {
    "RAY_TMPDIR": "folder of Ray's files on a machine, whose free space `plan` checks; default: `/tmp`",
    "COLUMNS": "width of printed tables; in a pipe or file without it, tables are as wide as they are",
    "REINFORCE_CACHE": "folder for weights that were fetched and converted; default: `~/.cache/reinforce`",
    "RAY_ADDRESS": "Ray cluster of commands without `--address`: `auto` or HOST:PORT; default: this machine",
    "RAY_COLOR_PREFIX": "set to 0, unless it is set: Ray's log lines have no colour codes where they are no terminal",
    "OMP_WAIT_POLICY": "set to PASSIVE, unless it is set: threads of the arithmetic sleep while they wait",
    "OMP_NUM_THREADS": "threads of the arithmetic; commands that divide the cores set it for the processes they start",
    "MIMALLOC_ALLOW_THP": "set to 0 for workers, unless it is set: huge pages cost CPU",
    "CUBLAS_WORKSPACE_CONFIG": "set to :4096:8 on CUDA, unless it is set: products are summed in one order",
    "TORCH_CPP_LOG_LEVEL": "set to ERROR, unless it is set: hides warnings of intended settings",
    "AWS_RETRY_MODE": "mode of retries of S3, as in botocore; if it is set, this project sets no retries",
    "AWS_MAX_ATTEMPTS": "attempts of a request to S3, as in botocore; if it is set, this project sets no retries",
    "MLFLOW_ALLOW_FILE_STORE": "set for the tracker MLflow, unless it is set: it may write to a folder",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "retries of the tracker MLflow; set, unless it is set, so that none waits long",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "seconds for a request of the tracker MLflow; set, unless it is set",
    "RANK": "set by torchrun: number of the rank; only rank 0 prints results",
    "LOCAL_RANK": "set by torchrun: number of the rank on its node, which selects its GPU",
    "WORLD_SIZE": "set by torchrun: number of ranks; has precedence over `train.compute.ranks`",
    "MASTER_ADDR": "set by torchrun: address of rank 0; a loopback address is replaced by that of its host",
    "NCCL_CONF_FILE": "settings of NCCL; if it names a network interface, this project chooses none",
    "LOCAL_WORLD_SIZE": "set by torchrun: number of ranks on the node, which share its cores",
}
#: Variables that are set for Ray and for child processes, and mean nothing to users.
INTERNAL = {
    *("RAY_CHDIR_TO_TRIAL_DIR", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "TUNE_DISABLE_SIGINT_HANDLER"),
    *("RAY_AIR_NEW_OUTPUT", "TUNE_ORIG_WORKING_DIR", "PATH"),
}
#: Exit status -> what it means, besides those of classes in `reinforce/errors.py`.
STATUSES = {
    0: "done; of `run`: every shard is finished or, up to `failures.allowed_share` of them, quarantined",
    1: "of `run`: more shards are quarantined than allowed, or Ray or a storage failed; of `validate`: something was "
    "found; of any command: an error that nobody has foreseen, in one line (`--debug` shows its traceback)",
    2: "an error that the user can fix: the config, the source or the environment; one message",
    3: "of `evaluate --suite`: the sets that are there were evaluated, and others are missing (`--allow-missing`)",
    130: "stopped by Ctrl-C (SIGINT), of `run` also by SIGTERM while it works; the same command resumes",
    143: "stopped by SIGTERM, of trainings after a checkpoint, of `run` before or after its work; the same command "
    "resumes",
}


def reasons() -> Iterator[tuple[str, str, str]]:
    """(group, reason, meaning) of every reason, from the comments of ``schemas/reasons.py``."""
    group = ""
    for line in inspect.getsource(schemas.reasons.Reason).splitlines():
        if heading := re.fullmatch(r"    # (.+)", line):
            group = heading[1]
        elif entry := re.fullmatch(r'    [A-Z_]+ = "(\w+)"(?:  # (.+))?', line):
            yield group, entry[1], entry[2] or ""


def variables_in_code() -> set[str]:
    """Names of the environment variables that the code reads or sets by ``os.environ``."""
    pattern = re.compile(
        r"environ(?:\.get|\.setdefault|\.pop)?[(\[]\s*\"([A-Z][A-Z_]+)\"|\"([A-Z_]+)\" (?:not )?in os\.environ"
    )
    files = [path for name in ("reinforce", "teachers", "jobs") for path in (ROOT / name).rglob("*.py")]
    return {
        name for path in files for found in pattern.findall(path.read_text(encoding="utf-8")) for name in found if name
    }


def reasons_page() -> str:
    """The page of the reasons of quarantine."""
    parts = ["# Reasons of quarantine\n", "What to do about them is in [Bad data](../bad-data.md#reasons).\n"]
    found = list(reasons())
    for group in dict.fromkeys(group for group, *_ in found):
        rows = [(code(reason), cell(meaning)) for of_group, reason, meaning in found if of_group == group]
        parts += [f"## {group.rstrip('.')}\n", table(("reason", "meaning"), rows)]
    return "\n".join(parts)


def error_classes() -> list[type[errors.UserError]]:
    """The classes of errors that end a command with one message."""
    found = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, errors.UserError)]
    return sorted(found, key=lambda error: (error.exit_status, error.__name__))


def statuses_page() -> str:
    """The page of the exit statuses."""
    by_class = [
        (code(error.__name__), str(error.exit_status), cell((inspect.getdoc(error) or "").splitlines()[0]))
        for error in error_classes()
    ]
    return "\n".join(
        [
            "# Exit statuses\n",
            table(("status", "meaning"), [(str(status), cell(meaning)) for status, meaning in STATUSES.items()]),
            "`summary.json` of a run has the status of the command in `status`.\n",
            "## Errors\n",
            "Classes of `reinforce.errors`, which `reinforce.run`, `train` and `open` raise:\n",
            table(("class", "status", "meaning"), by_class),
        ]
    )


def variables_page() -> str:
    """The page of the environment variables."""
    rows = [(code(name), meaning) for name, meaning in sorted(VARIABLES.items())]
    return "\n".join(
        [
            "# Environment variables\n",
            "Variables that commands read, or set unless they are set. Drivers of fsspec read theirs as well, such as "
            "`AWS_ENDPOINT_URL`.\n",
            table(("variable", "meaning"), rows),
        ]
    )
