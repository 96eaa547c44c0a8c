"""Jobs in the background."""

import threading

import pytest

from imgcap_jax.training.background import BackgroundJobs


def test_drain_waits_for_a_job_that_another_thread_waits_for() -> None:
    jobs, proceed, drained = BackgroundJobs("test"), threading.Event(), threading.Event()
    jobs.start("newest", lambda: assert_set(proceed))
    waiting = threading.Thread(target=jobs.wait)
    waiting.start()
    waiting.join(0.1)
    draining = threading.Thread(target=lambda: (jobs.drain(), drained.set()))
    draining.start()
    assert not drained.wait(0.2)
    proceed.set()
    assert drained.wait(10)
    waiting.join()
    jobs.close()


def test_error_ends_all_later_jobs_and_is_raised_once() -> None:
    jobs, ran = BackgroundJobs("test"), list[str]()
    error = OSError("full")
    jobs.fail(error)
    jobs.start("newest", lambda: ran.append("newest"))
    assert jobs.drain() is error
    with pytest.raises(OSError, match="full"):
        jobs.wait()
    jobs.wait()
    assert jobs.failed
    assert jobs.drain() is error
    jobs.close()
    assert not ran


def assert_set(event: threading.Event) -> None:
    assert event.wait(10)
