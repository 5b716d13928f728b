"""`python configs/knowlm/ask.py MODEL FILE`: serves a model, gets its page, asks the first record of FILE, and stops.

The question goes to /generate, the route of KnowLM's own server.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


def wait_until_ready(url: str, seconds: float = 300) -> None:
    """Returns when the server has compiled its programs; until then it answers 503."""
    end = time.monotonic() + seconds
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=30):
                return
        except urllib.error.HTTPError as error:
            if error.code != 503 or time.monotonic() > end:
                raise
        time.sleep(0.5)


def main(model: str, file: Path) -> int:
    record = json.loads(file.read_text(encoding="utf-8").splitlines()[0])
    words = ["--model", model, "--port", "0", "--template", "oneke", "--rows", "2"]
    server = subprocess.Popen([sys.executable, "-m", "jaxlm.serve", *words], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        url, said = None, []
        for line in server.stderr:
            said.append(line)
            if found := re.search(r"^serving .*(http://127\.0\.0\.1:\d+)", line):
                url = found[1]
                break
        if url is None:
            print("".join(said), file=sys.stderr)
            return 1
        with urllib.request.urlopen(f"{url}/", timeout=120) as page:
            print(f"GET {url}/ -> {page.status}, {len(page.read()):,} bytes of {page.headers['content-type']}")
        wait_until_ready(url)
        body = {"instruction": record["instruction"], "parameters": {"temperature": 0, "max_tokens": 112}}
        kind = {"content-type": "application/json"}
        request = urllib.request.Request(f"{url}/generate", json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request, timeout=300) as answer:
            text = json.load(answer)["generated_text"]
        print(f"POST /generate {json.loads(record['instruction'])['input']}\n  -> {text}\n  right: {record['label']}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
