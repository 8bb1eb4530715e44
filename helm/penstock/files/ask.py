"""What `helm test` runs: is the cluster ready, and does it answer? Standard library only.

PENSTOCK_URL, PENSTOCK_MODEL, PENSTOCK_QUESTION, PENSTOCK_EXPECT ("" takes any answer),
PENSTOCK_TIMEOUT_S; PENSTOCK_API_KEY where keys are asked for; PENSTOCK_CA for a CA of one's own.
Exit code 0 only if everything held.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request


def main():
    url = os.environ["PENSTOCK_URL"].rstrip("/")
    deadline = time.monotonic() + float(os.environ["PENSTOCK_TIMEOUT_S"])
    context = None
    if url.startswith("https"):
        context = ssl.create_default_context(cafile=os.environ.get("PENSTOCK_CA"))
        # Inside the cluster the Service has another name than the certificate.
        context.check_hostname = False

    def call(path, body=None):
        headers = {"content-type": "application/json"}
        if os.environ.get("PENSTOCK_API_KEY"):
            # Several keys stand with commas between; any will do.
            first = os.environ["PENSTOCK_API_KEY"].split(",")[0].strip()
            headers["authorization"] = "Bearer " + first
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url + path, data=data, headers=headers)
        left = max(1.0, deadline - time.monotonic())
        with urllib.request.urlopen(request, timeout=left, context=context) as answer:
            return json.load(answer)

    while True:
        try:
            print("ready:", call("/ready"), flush=True)
            break
        except OSError as error:
            reason = str(error)
            if isinstance(error, urllib.error.HTTPError):
                reason = error.read().decode(errors="replace")
            if time.monotonic() > deadline:
                sys.exit("not ready in time: " + reason)
            print("not ready yet:", reason, flush=True)
            time.sleep(2)

    body = {
        "model": os.environ["PENSTOCK_MODEL"],
        "temperature": 0,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": os.environ["PENSTOCK_QUESTION"]}],
    }
    while True:
        try:
            answer = call("/v1/chat/completions", body)
            break
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")
            # These pass: a busy moment, a replica that was just started anew.
            if error.code not in (429, 503) or time.monotonic() > deadline:
                sys.exit(f"refused with {error.code}: {reason}")
            print("not yet:", reason, flush=True)
            time.sleep(2)
    text = answer["choices"][0]["message"]["content"]
    print(f"answer: {text!r}, usage: {answer['usage']}", flush=True)
    expected = os.environ["PENSTOCK_EXPECT"]
    if not text or expected not in text:
        sys.exit(f"wrong: the answer does not hold {expected!r}")


if __name__ == "__main__":
    main()
