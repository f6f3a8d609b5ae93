"""An S3 server on all interfaces of a host: ``python -m tests.soak.object_store PORT``, until it is killed."""

from __future__ import annotations

import sys
import threading

from tests.helpers.s3_proxy import s3_behind_proxy

if __name__ == "__main__":
    with s3_behind_proxy("0.0.0.0", int(sys.argv[1])):
        threading.Event().wait()
