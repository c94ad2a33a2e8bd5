#!/usr/bin/env python
"""Before the head's pod ends: ask every running job to stop, and wait until each has committed.

`ray job stop` sends SIGTERM to a job's driver, on which ftray commits and ends with exit code 75. How long Ray waits
before it kills is RAY_JOB_STOP_WAIT_TIME_S, 3 s unless the pod sets it.
"""

from __future__ import annotations

import os
import time

from ray.job_submission import JobStatus, JobSubmissionClient


def main() -> None:
    client = JobSubmissionClient(os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265"))
    running = [
        job.submission_id for job in client.list_jobs() if job.submission_id and not JobStatus(job.status).is_terminal()
    ]
    for job in running:
        client.stop_job(job)
    deadline = time.monotonic() + float(os.environ.get("RAY_JOB_STOP_WAIT_TIME_S", "3")) + 5
    while time.monotonic() < deadline:
        if all(client.get_job_status(job).is_terminal() for job in running):
            return
        time.sleep(1)


if __name__ == "__main__":
    main()
