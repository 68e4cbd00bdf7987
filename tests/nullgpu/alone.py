"""Runs a function in a process of its own, where the device and everything else is used for the first time."""

import multiprocessing
import traceback

import pytest


def alone(function, *arguments, **options):
    """``function(*arguments, **options)`` in a forked process; its result, or a failure with the child's traceback.

    A kernel that a former test loaded would otherwise hide that a capture loads it.
    """
    receiving, sending = multiprocessing.Pipe(duplex=False)

    def run():
        try:
            sending.send((function(*arguments, **options), None))
        except BaseException:
            sending.send((None, traceback.format_exc()))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    sending.close()
    try:
        result, failure = receiving.recv()
    except EOFError:
        child.join()
        result, failure = None, f"the process ended with exit code {child.exitcode}"
    child.join()
    if failure is not None:
        pytest.fail(failure, pytrace=False)
    return result
