"""python -m reinforce_docs write FOLDER | finish SITE: the steps of `make docs` around the build of the pages."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reinforce_docs.offline import find_any_word, make_offline, outside_requests, write_redirects


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["write", "finish"])
    parser.add_argument("folder", type=Path)
    given = parser.parse_args(arguments)
    if given.step == "write":
        from reinforce_docs.pages import write_pages

        write_pages(given.folder)
        return
    make_offline(given.folder)
    find_any_word(given.folder)
    write_redirects(given.folder)
    if found := outside_requests(given.folder):
        sys.exit("requests to other hosts:\n" + "\n".join(found))
    print(f"{sum(1 for _ in given.folder.rglob('*.html'))} pages in {given.folder}, without requests to other hosts")


if __name__ == "__main__":
    main()
