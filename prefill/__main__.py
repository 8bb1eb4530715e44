"""`python -m prefill`: one prefill worker as a process. Prints `ready ADDRESS` once it serves."""

from penstock.process import Open, main


def load() -> Open:
    from prefill.worker import open_worker

    return open_worker


if __name__ == "__main__":
    raise SystemExit(main("prefill", load))
