"""Drain this node of Ray when the cloud announces that it takes the machine back.

    python drain_on_notice.py &        # on each spot node, next to `ray start`

AWS announces it two minutes before and GCP half a minute before, by the metadata server of the machine. Ray then places
nothing on the node any more, and a run gives it no further shards. KubeRay needs no such script: there the pod gets a
SIGTERM, on which Ray drains by itself.
"""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

_AWS = "http://169.254.169.254/latest"
_GCP = "http://metadata.google.internal/computeMetadata/v1/instance/preempted"
_SECONDS = 3.0  # between two looks
_GCP_SECONDS = 30  # from GCP's notice to the end


def fetch(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer of the metadata server; None if there is none."""
    request = urllib.request.Request(url, headers=headers, method=method)  # noqa: S310 - constant URLs
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:  # noqa: S310
            return str(answer.read().decode())
    except (urllib.error.URLError, TimeoutError):
        return None


def seconds_left() -> int | None:
    """Seconds until the machine is taken back; None while there is no notice."""
    if fetch(_GCP, {"Metadata-Flavor": "Google"}) == "TRUE":
        return _GCP_SECONDS
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = fetch(f"{_AWS}/api/token", lifetime, "PUT")
    action = fetch(f"{_AWS}/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}) if token else None
    if action is None:
        return None
    end = datetime.datetime.fromisoformat(json.loads(action)["time"].replace("Z", "+00:00"))
    return max(0, int((end - datetime.datetime.now(datetime.timezone.utc)).total_seconds()))


def drain(seconds: int) -> None:
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the cloud takes this machine back", f"--deadline-remaining-seconds={seconds}"]
    subprocess.run(command, check=True)  # noqa: S603 - constant but for a number


def main() -> None:
    while (seconds := seconds_left()) is None:
        time.sleep(_SECONDS)
    print(f"this machine is taken back in {seconds} s: Ray drains it", file=sys.stderr, flush=True)
    drain(seconds)


if __name__ == "__main__":
    main()
