"""Reference of the environment variables, from the code."""

from __future__ import annotations

import re
from pathlib import Path

from reinforce_docs.tables import code, table

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
    "REINFORCE_ACCELERATOR": "plain: no fast path of accelerators is used, as with `accelerator: plain` in a config",
    "PYTORCH_ENABLE_MPS_FALLBACK": "set to 1, unless it is set: operations that Apple's GPUs lack run on the CPU",
    "TORCH_CPP_LOG_LEVEL": "set to ERROR, unless it is set: hides warnings of intended settings",
    "AWS_RETRY_MODE": "mode of retries of S3, as in botocore; if it is set, this project sets no retries",
    "AWS_MAX_ATTEMPTS": "attempts of a request to S3, as in botocore; if it is set, this project sets no retries",
    "MLFLOW_TRACKING_URI": "server of the tracker MLflow, or a folder as file:PATH; default: MLflow's own",
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


def variables_in_code() -> set[str]:
    """Names of the environment variables that the code reads or sets by ``os.environ``."""
    pattern = re.compile(
        r"environ(?:\.get|\.setdefault|\.pop)?[(\[]\s*\"([A-Z][A-Z_]+)\"|\"([A-Z_]+)\" (?:not )?in os\.environ"
    )
    files = [path for name in ("reinforce", "teachers", "jobs") for path in (ROOT / name).rglob("*.py")]
    return {
        name for path in files for found in pattern.findall(path.read_text(encoding="utf-8")) for name in found if name
    }


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
