"""Trains with the tiny model on a real MLflow server: killed between two checkpoints, resumed, with the server away for a
while and back again. The server must have one run with every figure of `metrics.jsonl` once, the plan, and the exported
encoder to the byte.

    python tests/reference/check_mlflow.py SAIL_TRAIN      (package: mlflow; scripts/check_mlflow.sh)
"""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from mlflow.tracking import MlflowClient

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE_SECS = 240
STEPS = 60
# Where it stops once the server is away; it is killed well before.
STOP_AT = 50


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def until(what: str, holds) -> None:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < PATIENCE_SECS, f"{what}: not within {PATIENCE_SECS} s"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def server(folder: Path, port: int):
    """MLflow's server, with its database and artifacts in `folder`."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    with (folder / "server.log").open("a") as log:
        # A group of its own, since it starts workers.
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        until(f"the server, see {folder}/server.log", lambda: process.poll() is not None or answers(f"http://127.0.0.1:{port}"))
        assert process.poll() is None, (folder / "server.log").read_text()
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def lines_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_of(run: Path) -> int:
    return max((line["step"] for line in lines_of(run) if line["kind"] == "train"), default=0)


def is_told(run: Path) -> bool:
    """Whether the server has some steps, of which some will be made again."""
    state = run / "mlflow.json"
    return steps_of(run) >= 6 and state.exists() and json.loads(state.read_text())["sent"].get("train", 0) >= 3


def check_metrics(client: MlflowClient, run_id: str, lines: list[dict]) -> int:
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    points = {
        "train/loss": [(line["step"], line["loss"]) for line in train],
        "train/grad_norm": [(line["step"], line["grad_norm"]) for line in train],
        "train/lr/vision": [(line["step"], line["lr"]["vision"]) for line in train],
        "train/tokens": [(line["step"], line["tokens"]) for line in train],
        "eval/loss": [(line["step"], line["report"]["total"]["loss"]) for line in lines if line["kind"] == "eval"],
    }
    for key, expected in points.items():
        found = sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, key))
        assert [step for step, _ in found] == [step for step, _ in expected], (key, found, expected)
        for (step, value), (_, wanted) in zip(found, expected, strict=True):
            assert math.isclose(value, wanted, rel_tol=1e-6), (key, step, value, wanted)
    return sum(map(len, points.values()))


def check_model(client: MlflowClient, run_id: str, export: Path, folder: Path) -> int:
    names = sorted(path.name for path in export.iterdir())
    assert sorted(file.path for file in client.list_artifacts(run_id, "model")) == [f"model/{name}" for name in names]
    downloaded = Path(client.download_artifacts(run_id, "model", str(folder)))
    for name in names:
        assert (downloaded / name).read_bytes() == (export / name).read_bytes(), name
    return len(names)


def main() -> None:
    sail_train = str(Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        folder, port = Path(temporary), free_port()
        url = f"http://127.0.0.1:{port}"
        run = folder / "runs/tiny/stage1"
        settings = [
            f"run.root={folder}",
            "train.vision={lr: 1e-4}",
            f"schedule.steps={STEPS}",
            "checkpoint.every=5",
            "eval.samples=2",
            "export={vit: transformers}",
            f"log.mlflow={{url: '{url}', experiment: 'sail checks', flush_secs: 60}}",
        ]
        command = [sail_train, "--config", "configs/tiny/stage1.yaml"]
        command += [argument for setting in settings for argument in ("--set", setting)]
        env = {key: value for key, value in os.environ.items() if key.lower() not in ("http_proxy", "all_proxy")}

        with server(folder, port):
            killed = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
            until("step 5 is made and told", lambda: killed.poll() is not None or is_told(run))
            killed.kill()
            killed.wait()
            sent = json.loads((run / "mlflow.json").read_text())
            assert 5 <= steps_of(run) < STOP_AT, steps_of(run)
        # The server is away, and training goes on.
        stopped = [*command, "--stop-at", str(STOP_AT), "--set", "log.mlflow.flush_secs=1"]
        away = subprocess.run(stopped, cwd=ROOT, env=env, capture_output=True, text=True)
        assert away.returncode == 3 and away.stderr.count("was not told") == 1, away.stderr
        with server(folder, port):
            subprocess.run(command, cwd=ROOT, env=env, check=True, stderr=subprocess.DEVNULL)
            client = MlflowClient(url)
            (experiment,) = [it for it in client.search_experiments() if it.name == "sail checks"]
            (found,) = client.search_runs([experiment.experiment_id])
            assert found.info.run_id == sent["run_id"], "another run after the resume"
            assert found.info.run_name == "tiny-stage1" and found.info.status == "FINISHED", found.info
            numbers = check_metrics(client, found.info.run_id, lines_of(run))
            params = found.data.params
            assert params["train.vision.lr"] == "0.0001" and params["data.sources.0.name"] == "caption", params
            assert params["schedule.steps"] == str(STEPS)
            lineage = json.loads(found.data.tags["sail.lineage"])
            assert lineage["weights"]["vision"] == "random" and found.data.tags["sail.version"], found.data.tags
            files = check_model(client, found.info.run_id, run / "export/vit", folder)
        print(f"one run with {len(params)} parameters, {numbers} of its figures compared, {files} files of its model")


main()
