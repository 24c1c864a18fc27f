"""Runs `tercet serve` as a Ray job for as long as this process lives, in a container beside the Ray head.

    serve_job.py run ADDRESS NAME STOP_S -- COMMAND...   submit it, or follow the one that a killed predecessor left
    serve_job.py stop ADDRESS NAME STOP_S                have it drained, and wait until it has ended

ADDRESS: of Ray's jobs API, http://127.0.0.1:8265. NAME: of the jobs. STOP_S: seconds that a job has to drain.
Exit codes: 0 it ended as asked; 1 it failed, or Ray cannot be reached any more: Kubernetes starts this anew.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import signal
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported later, since it takes seconds in which a signal would not be heard
    from ray.job_submission import JobSubmissionClient

RAY_START_S = 120.0
POLL_S = 1.0


def main() -> None:
    # As the first process of a container it would not be ended by the signal otherwise.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    action, address, name, stop_s, *rest = sys.argv[1:]
    if action == "stop":
        sys.exit(stop(connect(address, 0.0), name, int(stop_s)))
    assert action == "run", f"no action {action}"
    assert rest[:1] == ["--"], "a command after --"
    sys.exit(asyncio.run(run(connect(address, RAY_START_S), name, int(stop_s), rest[1:])))


def connect(address: str, within_s: float) -> JobSubmissionClient:
    """The client, once Ray answers. Raises the last failure if it does not in time."""
    from ray.job_submission import JobSubmissionClient

    deadline = time.monotonic() + within_s
    while True:
        try:
            return JobSubmissionClient(address)
        except (ConnectionError, RuntimeError):
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


async def run(client: JobSubmissionClient, name: str, stop_s: int, command: list[str]) -> int:
    job = running(client, name) or submit(client, name, stop_s, command)
    following = asyncio.create_task(follow(client, job))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, client.stop_job, job)
    await following
    status = client.get_job_status(job)
    print(f"{job}: {status}", flush=True)
    return 0 if status in {"SUCCEEDED", "STOPPED"} else 1


def running(client: JobSubmissionClient, name: str) -> str | None:
    """The id of the job of that name that has not ended."""
    for job in client.list_jobs():
        if (job.submission_id or "").startswith(f"{name}-") and not job.status.is_terminal():
            return job.submission_id
    return None


def submit(client: JobSubmissionClient, name: str, stop_s: int, command: list[str]) -> str:
    # Ray kills a job that has not ended so soon after it was told to; its own default is 3 s.
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_s)}
    return client.submit_job(
        entrypoint=shlex.join(command),
        submission_id=f"{name}-{secrets.token_hex(4)}",
        runtime_env={"env_vars": environment},
    )


async def follow(client: JobSubmissionClient, job: str) -> None:
    """Print what it logs until it ends. Raises RuntimeError or OSError if Ray cannot be reached any more."""
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def stop(client: JobSubmissionClient, name: str, stop_s: int) -> int:
    deadline = time.monotonic() + stop_s
    if (job := running(client, name)) is None:
        return 0
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            return 1
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)  # it would win over ADDRESS
    main()
