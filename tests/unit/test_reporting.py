"""How programs end when several ranks meet the same mistake."""

import os
import signal
import subprocess
import sys
import time

REFUSING = """
from megatron_cca.errors import UserError
from megatron_cca.reporting import reported_tool_errors
with reported_tool_errors((), ""):
    print("refusing", flush=True)
    raise UserError("--prompts: no such file")
"""


def test_a_rank_that_waits_for_rank_0_to_speak_is_ended_without_another_word():
    environment = {**os.environ, "RANK": "1"}
    rank = subprocess.Popen(
        [sys.executable, "-c", REFUSING], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert rank.stdout.readline() == "refusing\n"
    time.sleep(0.5)
    rank.send_signal(signal.SIGTERM)
    assert rank.communicate(timeout=10)[1] == ""
    assert rank.returncode == -signal.SIGTERM
