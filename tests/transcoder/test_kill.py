"""kill -9 at any moment, then the same command: the bits of a run that never stopped. With a real process."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mdlm_interp.config_files import to_mapping
from transcoder.config import METRICS
from transcoder.run import train
from transcoder.training_log import read_log
from transcoder.training_state import latest_training_state

ROOT = Path(__file__).parents[2]
MOST_KILLS = 3


def command(config_file):
    return [sys.executable, "-m", "mdlm_interp", "clt", "train", str(config_file)]


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_a_run_that_is_killed_again_and_again_has_the_bits_of_one_that_never_stopped(
    run_config, tmp_path, activation
):
    settings = replace(
        run_config.train,
        steps=40,
        checkpoint_every=1,
        keep_checkpoints=2,
        sparsity="none" if activation != "jumprelu" else "tanh",
        pre_act="none" if activation != "jumprelu" else "threshold",
        t_bins=2,
        row_weights="subs",
    )
    config = replace(run_config, activation=activation, train=settings)
    whole = train(config)
    killed = replace(config, out=tmp_path / "killed")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(to_mapping(killed)), encoding="utf-8")
    draw = random.Random(activation)
    kills = 0
    while kills < MOST_KILLS:
        before = latest_training_state(killed.out)
        process = subprocess.Popen(
            command(file), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # Some states further, at any moment of the step, of the writing or of the renaming.
        while process.poll() is None and latest_training_state(killed.out) == before:
            time.sleep(0.01)
        time.sleep(0.2 * draw.random())
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills >= 2
    last = subprocess.run(command(file), cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert last.returncode == 0 or b"holds a finished transcoder" in last.stderr
    for name in ("clt.safetensors", "training_sequences.safetensors"):
        assert (killed.out / name).read_bytes() == (config.out / name).read_bytes()
    ours, theirs = (
        [{**line, "rows_per_s": 0} for line in read_log(run.out / METRICS)] for run in (killed, config)
    )
    assert ours == theirs
    assert whole.config.activation == ("jumprelu" if activation == "batchtopk" else activation)
