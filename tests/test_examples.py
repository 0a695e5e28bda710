# SPDX-License-Identifier: Apache-2.0
"""Each example runs alone, from any folder, and reaches what it claims. Must not know how an example is written."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PNG = b"\x89PNG\r\n\x1a\n"


def run(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run an example in this folder, as a user would."""
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def accuracy(output: str) -> float:
    """What the digits example says of ASGD, as a fraction."""
    found = re.search(r"Held-out accuracy: ASGD ([\d.]+)%, SGD [\d.]+%", output)
    assert found, output
    return float(found[1]) / 100


def test_all_examples_are_tested() -> None:
    tested = {"train_digits", "converge_exactly", "linear_probe", "ridge", "sag_convergence", "stability"}
    tested |= {"averages_digits", "char_lm", "narrow_history", "distributed_digits"}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == tested


def test_digits(tmp_path: Path) -> None:
    """The default run."""
    done = run("train_digits.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert accuracy(done.stdout) >= 0.97
    assert (tmp_path / "digits_loss.png").read_bytes().startswith(PNG)
    # The progress bars.
    assert re.search(r"ASGD: +100%.*50/50.*accuracy=\d+\.\d+%, loss=0\.\d+", done.stderr), done.stderr


def test_digits_too_few_epochs(tmp_path: Path) -> None:
    """Fails, says why, and draws nevertheless; ``--batch-size`` that does not divide the digits evenly is used."""
    done = run("train_digits.py", tmp_path, "--epochs=2", "--batch-size=100", "--seed=3", "--output=loss.png")
    assert done.returncode == 1
    assert accuracy(done.stdout) < 0.97
    assert f"{accuracy(done.stdout):.2%}, is below 97%" in done.stderr
    assert "2 epochs in batches of 100" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--epochs=0", "received 0, expected at least 1"),
        ("--batch-size=1438", "received 1438, expected 1 to 1437"),
        ("--output=missing/loss.png", "there is no folder missing"),
    ],
)
def test_digits_refusals(tmp_path: Path, argument: str, message: str) -> None:
    done = run("train_digits.py", tmp_path, argument)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_averages_digits(tmp_path: Path) -> None:
    """A shorter run: every average is better than the weights in training, and statistics renewed than those left."""
    done = run("averages_digits.py", tmp_path, "--epochs=12", "--seeds=1")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (\S.*?) +([\d.]+) +[\d.]+% +([\d.]+)$", done.stdout, re.MULTILINE)
    losses = {name: float(loss) for name, loss, _ in rows}
    widths = [f"PostHocEMA, width {width}" for width in ("0.02", "0.03", "0.05", "0.07", "0.10", "0.14", "0.20")]
    assert list(losses) == ["weights in training", "rate falls to zero", "ema(0.99)", "swa()", *widths]
    raw = losses["weights in training"]
    assert losses["ema(0.99)"] < 0.85 * raw
    assert losses["swa()"] < raw
    assert losses["PostHocEMA, width 0.07"] < 0.85 * raw
    stale = {name: float(before) for name, _, before in rows}
    assert stale["swa()"] > losses["swa()"]
    share = re.search(r"ema\(0\.99\) leaves (\d+)%", done.stdout)
    assert share, done.stdout
    assert abs(int(share[1]) / 100 - losses["ema(0.99)"] / raw) < 0.006
    assert "24/24" in done.stderr  # the progress bar
    assert "track global mean" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["averages_digits.png"]
    assert (tmp_path / "averages_digits.png").read_bytes().startswith(PNG)


def test_char_lm(tmp_path: Path) -> None:
    """A part of the text: the average is better than the weights in training, at the same step."""
    done = run("char_lm.py", tmp_path, "--steps=400", "--characters=40000")
    assert done.returncode == 0, done.stderr
    begun = re.search(r"averaging began at step (\d+) of 400", done.stdout)
    assert begun, done.stdout
    assert 0 < int(begun[1]) < 300  # the trigger fired by itself
    rows = re.findall(r"^  (.+?)  +([\d.]+) +([\d.]+)$", done.stdout, re.MULTILINE)
    values = {name: (float(validation), float(test)) for name, validation, test in rows}
    raw, averaged, annealed = "SGD, weights in training", "AveragedSGD, average", "SGD, rate falls to zero"
    assert list(values) == [raw, averaged, annealed]
    assert values[averaged][0] < values[raw][0]
    assert values[averaged][1] < values[raw][1]
    change = 1 - values[averaged][1] / values[raw][1]
    said = re.search(r"perplexity of the average is ([\d.]+)% below that of the weights in training", done.stdout)
    assert said, done.stdout
    assert abs(float(said[1]) / 100 - change) < 0.001
    total = 400 + 400 - int(begun[1])
    assert f"{total}/{total}" in done.stderr  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["char_lm.png"]
    assert (tmp_path / "char_lm.png").read_bytes().startswith(PNG)


def test_converge_exactly(tmp_path: Path) -> None:
    """ASGD ends at the minimum; no other optimizer does, whichever its learning rate."""
    done = run("converge_exactly.py", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (\w+) +\S+ .* (\S+)$", done.stdout, re.MULTILINE)
    excess = {name: float(value) for name, value in rows if name != "learning"}
    assert list(excess) == ["ASGD", "SGD", "Momentum", "Adam"]
    assert abs(excess.pop("ASGD")) < 1e-10
    assert min(excess.values()) > 1e-6
    assert "SlotMismatchWarning" not in done.stderr
    assert (tmp_path / "converge_exactly.png").read_bytes().startswith(PNG)


def distributed_rows(output: str) -> dict[str, tuple[float, float]]:
    """The objective and the norm of the gradient by the name of the run."""
    rows = re.findall(r"^  (\d \w+) +([\d.]+) +(\S+)$", output, re.MULTILINE)
    return {name: (float(loss), float(norm)) for name, loss, norm in rows}


def test_distributed_digits(tmp_path: Path) -> None:
    """One file: two processes come to the objective of one, and so does a process that nobody launched."""
    script = str(EXAMPLES / "distributed_digits.py")
    launch = ["-m", "paddle.distributed.launch", "--nproc_per_node", "2", "--backend", "gloo", script, "--epochs=10"]
    with (tmp_path / "said.txt").open("w+") as said:
        # A group of its own, because who ends the launcher leaves its children behind.
        launcher = subprocess.Popen(
            [sys.executable, *launch], cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = launcher.wait(150)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
        said.seek(0)
        output = said.read()
    assert code == 0, output
    rows = distributed_rows(output)
    assert list(rows) == ["2 ranks", "1 process"]
    assert abs(rows["2 ranks"][0] - rows["1 process"][0]) <= 1e-12 * rows["1 process"][0]
    found = re.search(r"Relative difference (\S+), expected at most 1e-12\.", output)
    assert found, output
    assert float(found[1]) <= 1e-12

    plain = run("distributed_digits.py", tmp_path, "--epochs=10")
    assert plain.returncode == 0, plain.stderr
    assert distributed_rows(plain.stdout) == {"1 rank": rows["1 process"]}


def test_linear_probe(tmp_path: Path) -> None:
    """ASGD ends at the minimum by loss and by gradient; no other optimizer does, whichever its learning rate."""
    done = run("linear_probe.py", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (\w+) +([\d.]+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
    found = {name: (float(excess), float(norm)) for name, _, excess, norm in rows}
    assert list(found) == ["ASGD", "SGD", "Momentum", "Adam"]
    excess, norm = found.pop("ASGD")
    assert abs(excess) < 1e-12
    assert norm < 1e-6
    assert min(excess for excess, _ in found.values()) > 1e-6
    assert min(norm for _, norm in found.values()) > 1e-4
    assert "SlotMismatchWarning" not in done.stderr
    assert "950/950" in done.stderr  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["linear_probe.png"]
    assert (tmp_path / "linear_probe.png").read_bytes().startswith(PNG)


def test_narrow_history(tmp_path: Path) -> None:
    """A shorter run: 16 bits end lower than 8, and above the exact history, which they have followed until then."""
    done = run("narrow_history.py", tmp_path, "--passes=50")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (\w.*?) +(\S+) at \d+/L +(\S+) at \d+/L +(\S+) at \d+/L$", done.stdout, re.MULTILINE)
    cancer, digits = ({name: float(values[k]) for name, *values in rows} for k in range(2))
    assert list(cancer)[:4] == ["exact, float64", "int16", "int8", "int8, theta=1"]
    assert len(cancer) == 5
    assert abs(cancer["exact, float64"]) < 5e-12 < cancer["int16"] < 5e-11
    assert abs(digits["exact, float64"]) < 1e-11 < digits["int16"] < 2e-10
    assert 1e-7 < cancer["int8"] < 1e-6 < digits["int8"] < 3e-6
    ratios = re.findall(r": int16 is at most ([\d.]+) times as high$", done.stdout, re.MULTILINE)
    assert [float(ratio) < 1.1 for ratio in ratios] == [True] * 3
    assert "750/750" in done.stderr  # the progress bar
    assert [path.name for path in tmp_path.iterdir()] == ["narrow_history.png"]
    assert (tmp_path / "narrow_history.png").read_bytes().startswith(PNG)


def test_ridge(tmp_path: Path) -> None:
    """Stops at the closed form's weights, and somewhere else if the short last batch counts as much as the others."""
    done = run("ridge.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the last of 10:" in done.stdout
    rows = re.findall(r"^  (.+?) +(\d+|-)  +(\S+)  +(\S+)$", done.stdout, re.MULTILINE)
    names = ["closed form", "scikit-learn, solver='sag'", "ASGD with batch_weights", "ASGD without"]
    assert [name for name, *_ in rows] == names
    errors = {name: float(error) for name, _, _, error in rows}
    assert max(errors[name] for name in names[:3]) < 1e-8
    assert errors["ASGD without"] > 1e-3
    assert "SlotMismatchWarning" not in done.stderr


def test_ridge_stops_short(tmp_path: Path) -> None:
    """Says so where the tolerance cannot be reached."""
    done = run("ridge.py", tmp_path, "--tolerance=1e-30", "--batch-size=200")
    assert done.returncode == 1
    assert re.search(r"After 1000 passes gradient_norm\(\) is \S+, above 1.0e-30", done.stderr), done.stderr


def test_sag_convergence(tmp_path: Path) -> None:
    """The quick run: with right slots ASGD is ahead of all others, and with wrong ones it is told so."""
    done = run("sag_convergence.py", tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  (.+?) +(\S+)  learning rate .*  warned: (.+)$", done.stdout, re.MULTILINE)
    excess = {name: float(value) for name, value, _ in rows}
    right = ["SAG, replacement", "SAG, reshuffle", "SAG, sequential"]
    assert list(excess)[:3] == right
    assert len(excess) == 8
    assert excess["SAG, replacement"] < 1e-5
    assert max(excess[name] for name in right) < min(excess[name] for name in excess if name not in right)
    warned = {name: when for name, _, when in rows}
    assert warned.pop("SAG, shuffle=True, no batch_index") == "pass 10"
    assert set(warned.values()) == {"never"}
    assert [path.name for path in tmp_path.iterdir()] == ["sag_convergence.png"]
    assert (tmp_path / "sag_convergence.png").read_bytes().startswith(PNG)
    assert "75/75" in done.stderr  # the progress bar


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("averages_digits.py", "--epochs=3", "received 3, expected at least 4"),
        ("averages_digits.py", "--seeds=0", "received 0, expected at least 1"),
        ("averages_digits.py", "--output=missing/loss.png", "there is no folder missing"),
        ("char_lm.py", "--steps=100", "received 100, expected a multiple of 40 of at least 80"),
        ("char_lm.py", "--characters=9999", "received 9999, expected at least 10000"),
        ("char_lm.py", "--output=missing/lm.png", "there is no folder missing"),
        ("converge_exactly.py", "--epochs=0", "received 0, expected at least 1"),
        ("distributed_digits.py", "--epochs=0", "received 0, expected at least 1"),
        ("converge_exactly.py", "--output=missing/loss.png", "there is no folder missing"),
        ("linear_probe.py", "--epochs=0", "received 0, expected at least 1"),
        ("linear_probe.py", "--output=missing/probe.png", "there is no folder missing"),
        ("narrow_history.py", "--passes=0", "received 0, expected at least 1"),
        ("narrow_history.py", "--output=missing/narrow.png", "there is no folder missing"),
        ("sag_convergence.py", "--seeds=0", "received 0, expected at least 1"),
        ("sag_convergence.py", "--output=missing/sag.png", "there is no folder missing"),
    ],
)
def test_other_refusals(tmp_path: Path, name: str, argument: str, message: str) -> None:
    done = run(name, tmp_path, argument)
    assert done.returncode == 2
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_stability(tmp_path: Path) -> None:
    """The quick run: with theta = 0.3 the limit of 20 batches is that of few; without theta it is much lower."""
    done = run("stability.py", tmp_path, "--quick")
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^  n = +(\d+)  (.+)$", done.stdout, re.MULTILINE)
    assert [int(n) for n, _ in rows] == 3 * [2, 5, 20]
    without, recommended = (float(rows[2][1].split()[k]) for k in (0, 3))
    assert without < 0.4
    assert recommended > 1.1
    assert (tmp_path / "stability.png").read_bytes().startswith(PNG)


def test_stability_refusal(tmp_path: Path) -> None:
    done = run("stability.py", tmp_path, "--output=missing/stability.png")
    assert done.returncode == 2
    assert "there is no folder missing" in done.stderr
