"""The scripts for Cloud TPU and Slurm, with programs in place of gcloud, sbatch, srun and imgcap."""

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TPU, SLURM = REPOSITORY / "scripts/tpu/tpu.sh", REPOSITORY / "scripts/slurm/train.sh"
SCRIPTS = sorted((REPOSITORY / "scripts").rglob("*.sh"))
Run = Callable[..., subprocess.CompletedProcess[str]]
LAUNCH = ["coco", "--run", "gs://b/r"]

# The options of gcloud's reference (cloud.google.com/sdk/gcloud/reference/compute/tpus), in so far as they are used.
GCLOUD = {
    "queued-resources create": {
        "--node-id",
        "--zone",
        "--project",
        "--accelerator-type",
        "--runtime-version",
        "--spot",
    },
    "queued-resources describe": {"--zone", "--project", "--format"},
    "queued-resources delete": {"--zone", "--project", "--force", "--quiet"},
    "tpu-vm scp": {"--zone", "--project", "--worker"},
    "tpu-vm ssh": {"--zone", "--project", "--worker", "--command"},
}

# Prints its arguments into $CALLS. The state is the first line of $STATE; describing removes the line if there is
# another one, and creating makes the state ACTIVE. The calls whose numbers are in $FAILING fail. It warns whenever it
# describes, as gcloud does for an old version. $HOSTS has what the hosts say, or $HOST is a folder in which the
# commands run.
FAKE_GCLOUD = """#!/usr/bin/env bash
echo "$*" >> "$CALLS"
case " ${FAILING:-} " in *" $(wc -l < "$CALLS" | tr -d ' ') "*) echo UNAVAILABLE >&2; exit 1 ;; esac
case "$*" in
  *" describe "*)
    [ -s "$STATE" ] || { echo "NOT_FOUND: none" >&2; exit 1; }
    echo "WARNING: update gcloud" >&2
    head -n 1 "$STATE"
    sed -i.old '1{$!d;}' "$STATE" ;;
  *" create "*) echo ACTIVE > "$STATE" ;;
  *" delete "*) : > "$STATE" ;;
  *" scp "*) [ -z "${HOST:-}" ] || cp "$5" "$HOST/${6#*:}" ;;
  *" --command="*)
    if [ -n "${HOST:-}" ]; then
      cd "$HOST" && HOME="$HOST" exec bash -c "$(printf %s "${!#}" | sed 's/^--command=//')"
    elif [[ "$*" == *"--worker=0"*"host.sh status"* ]]; then
      head -n 1 "$HOSTS"
    elif [[ "$*" == *"host.sh status"* ]]; then
      cat "$HOSTS"
    fi ;;
esac
"""

# In place of the two outputs of $HOSTS: a look at all hosts, of which $LOOKS has the number, and one at the first host.
LOOKS = """{
  echo >> "$LOOKS"; n="$(wc -l < "$LOOKS" | tr -d ' ')"
  case " $CRASHES " in *" $n "*) echo ended 137 ;; *) [ "$n" -lt 36 ] && echo training || echo ended 0 ;; esac
}"""
LAST = """{ [ "$(wc -l < "$LOOKS")" -lt 36 ] && echo ended 137 || echo ended 0; }"""

# Makes an imgcap in .venv that trains by ending with the next code of the file "codes", and with 0 afterwards.
FAKE_UV = """#!/usr/bin/env bash
echo "$*" >> "$HOME/uv.calls"
[ "$1" = pip ] || exit 0
mkdir -p .venv/bin
cat > .venv/bin/imgcap <<'END'
#!/usr/bin/env bash
code="$(head -n 1 ~/codes)"
sed -i.old 1d ~/codes
exit "${code:-0}"
END
chmod +x .venv/bin/imgcap
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a script with only the given variables of ours, and the programs of the folder bin first in PATH."""
    tpu = ("ZONE", "PROJECT", "SPOT", "DATA", "TPU_NAME", "TPU_TYPE", "RUNTIME", "COMMIT", "PAUSE", "TRIES")
    slurm = ("SLURM_JOB_ID", "VENV", "NODES", "GPUS", "CPUS", "HOURS", "PARTITION", "ACCOUNT")
    for name in (*tpu, *slurm):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()

    def run(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return subprocess.run(
            [script, *arguments],
            env={**os.environ, "PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["shellcheck", script], check=True)


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line) for line in output.splitlines() if not line.startswith("#")]


@pytest.mark.parametrize("action", ["create", "setup", "launch", "watch", "stop", "resume", "keep", "delete"])
def test_dry_runs_print_commands_that_gcloud_knows(run: Run, action: str) -> None:
    arguments = ["coco", "--run", "gs://bucket/my runs/coco"] if action in ("launch", "resume", "keep") else []
    ended = run(TPU, "--dry-run", action, *arguments, ZONE="us-west4-a", PROJECT="mine", SPOT="1", DATA="gs://bucket/d")
    assert ended.returncode == 0, ended.stderr
    found = commands(ended.stdout)
    assert found
    for words in found:
        if words[0] in ("git", "rm"):
            continue
        assert words[:3] == ["gcloud", "compute", "tpus"]
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        assert options <= GCLOUD[" ".join(words[3:5])]
        assert {"--zone=us-west4-a", "--project=mine"} <= set(words)
    for words in found:
        if words[0] == "gcloud" and "host.sh launch" in words[-1]:
            sent = shlex.split(words[-1].partition("=")[2])
            assert sent[1:] == [
                "launch",
                "coco",
                "--run",
                "gs://bucket/my runs/coco",
                "--data.data-dir",
                "gs://bucket/d",
            ]


def test_a_dry_run_of_create_asks_for_the_software_of_the_type(run: Run) -> None:
    for kind, version in (
        ("tpu7x-8", "v2-alpha-tpu7-ubuntu2404"),
        ("v6e-16", "v2-alpha-tpuv6e"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v5litepod-8", "v2-alpha-tpuv5-lite"),
        ("v4-8", "tpu-ubuntu2204-base"),
    ):
        output = run(TPU, "--dry-run", "create", ZONE="z", TPU_TYPE=kind).stdout
        assert f"--accelerator-type={kind} --runtime-version={version}" in output
        assert "--spot" not in output


def test_mistakes_are_one_line(run: Run) -> None:
    assert "set ZONE" in run(TPU, "--dry-run", "create").stderr
    assert "needs an experiment" in run(TPU, "--dry-run", "launch", ZONE="z").stderr
    for script in (TPU, SLURM):
        ended = run(script)
        assert ended.returncode == 2
        assert "--dry-run" in ended.stdout


def lines_of(ended: subprocess.CompletedProcess[str]) -> list[str]:
    """What a mistake prints: nothing but one line, and exit code 2."""
    assert (ended.returncode, ended.stdout) == (2, "")
    return ended.stderr.splitlines()


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["delete"],
        ["stop"],
        ["watch"],
        ["setup"],
        *([action, *LAUNCH] for action in ("launch", "resume", "keep")),
    ],
    ids=lambda arguments: arguments[0],
)
def test_dry_run_and_help_are_found_anywhere(cloud: Any, arguments: list[str]) -> None:
    """In every place of the arguments, no program is called."""
    expected, _ = cloud("--dry-run", *arguments)
    assert expected.returncode == 0, expected.stderr
    for place in {1, len(arguments)}:
        ended, calls = cloud(*arguments[:place], "--dry-run", *arguments[place:])
        assert (ended.returncode, calls) == (0, [])
        # setup makes an archive with a name of its own
        assert len(commands(ended.stdout)) == len(commands(expected.stdout))
        assert "host.sh launch coco --dry-run" not in ended.stdout.replace("\\", "")
        for option in ("--help", "-h"):
            ended, calls = cloud(*arguments[:place], option, *arguments[place:])
            assert (ended.returncode, calls) == (0, [])
            assert ended.stdout.startswith("Trains on a Cloud TPU VM")


@pytest.mark.parametrize("action", ["create", "setup", "watch", "stop", "delete"])
def test_actions_without_arguments_refuse_them(cloud: Any, action: str) -> None:
    ended, calls = cloud(action, "--dry_run")
    assert lines_of(ended) == [f"tpu: {action} takes no arguments: --dry_run"]
    assert not calls


def test_training_that_is_taken_away_needs_a_run_in_a_bucket(cloud: Any) -> None:
    """So does a slice of several hosts."""
    for action in ("keep", "resume"):
        for run in ([], ["--run", "runs/coco"], ["--run", "gs://"], ["--run=gs://b/r", "--run", "runs/coco"]):
            ended, calls = cloud(action, "coco", *run)
            assert lines_of(ended) == [
                f"tpu: {action} needs --run gs://BUCKET/FOLDER: the disks of the hosts go with the TPU"
            ]
            assert not calls
    for kind, several in (("v5litepod-8", False), ("v4-8", False), ("v6e-16", True), ("v5p-32", True)):
        ended, calls = cloud("launch", "coco", TPU_TYPE=kind)
        if several:
            assert "has several hosts, which need a common run" in lines_of(ended)[0]
        assert len(calls) == (0 if several else 1)
        ended, calls = cloud("launch", "coco", "--run=gs://b/r", TPU_TYPE=kind)
        assert (ended.returncode, len(calls)) == (0, 1)
        assert ended.stdout == "next: scripts/tpu/tpu.sh watch\n"


def test_unknown_types_are_refused_before_gcloud_is_called(cloud: Any) -> None:
    """A TPU can be deleted whatever the type is. A new one needs RUNTIME."""
    for action in (["create"], ["launch", *LAUNCH], ["keep", *LAUNCH]):
        ended, calls = cloud(*action, TPU_TYPE="v5e-8")
        assert lines_of(ended) == ["tpu: TPU_TYPE=v5e-8: v5litepod-8 is its name"]
        assert not calls
        for kind in ("v6e", "v6e-", "v5-8", "v5litepod-4x4", "v9-8"):
            ended, calls = cloud(*action, TPU_TYPE=kind)
            assert f"tpu: TPU_TYPE={kind} is not known; use v2-N, v3-N, v4-N, v5litepod-N" in lines_of(ended)[0]
            assert not calls
    assert cloud("--dry-run", "create", TPU_TYPE="v9-8", RUNTIME="new")[0].returncode == 0
    ended, calls = cloud("delete", TPU_TYPE="v5e-8")
    assert (ended.returncode, len(calls)) == (0, 1)


def test_experiments_that_the_hosts_would_not_have_are_refused(cloud: Any) -> None:
    for options in ([], ["--dry-run"]):
        for action in ("launch", "resume", "keep"):
            for name in ("cocoa", "__init__", "experiments/coco", "--run", "", "coco coco_scst"):
                ended, calls = cloud(action, name, "--run", "gs://b/r", *options)
                assert f"no experiment '{name}' in commit" in lines_of(ended)[0]
                assert "one of coco, coco_aoa, coco_aoa_scst, " in lines_of(ended)[0]
                assert not calls
        ended, calls = cloud("launch", "mine.py", *options)
        assert "mine.py is not in commit" in lines_of(ended)[0]
        ended, _ = cloud("launch", "experiments/coco.py", *options)
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("state", "hosts", "expected"),
    [
        ("ACTIVE", "training\ntraining\n", ["describe", "status"]),
        ("ACTIVE", "training\nended 137\n", ["describe", "status", "stop", "launch"]),
        (
            "ACCEPTED\nCREATING\nWAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE",
            "ended\n",
            ["describe"] * 5 + ["status", "stop", "launch"],
        ),
        ("SUSPENDING\nSUSPENDED", "", ["describe"] * 2 + ["delete", "create", "describe", "scp", "install", "launch"]),
        ("SUSPENDED", "", ["describe", "delete", "create", "describe", "scp", "install", "launch"]),
        ("", "", ["describe", "create", "describe", "scp", "install", "launch"]),
    ],
)
def test_resuming(run: Run, tmp_path: Path, state: str, hosts: str, expected: list[str]) -> None:
    program(tmp_path / "bin" / "gcloud", FAKE_GCLOUD)
    files = {name: tmp_path / name for name in ("CALLS", "STATE", "HOSTS")}
    files["STATE"].write_text(state)
    files["HOSTS"].write_text(hosts)
    variables = {name: str(path) for name, path in files.items()}
    ended = run(TPU, "resume", "coco", "--run", "gs://b/r", ZONE="z", PAUSE="0", **variables)
    assert ended.returncode == 0, ended.stderr
    calls = files["CALLS"].read_text().splitlines()
    assert len(calls) == len(expected), calls
    for call, word in zip(calls, expected, strict=True):
        assert f" {word}" in call
    if expected[-1] == "launch":
        assert calls[-1].endswith("host.sh launch coco --run gs://b/r")


def test_errors_of_gcloud_do_not_look_like_a_missing_tpu(run: Run, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "gcloud", "#!/usr/bin/env bash\necho 'PERMISSION_DENIED' >&2; exit 1\n")
    ended = run(TPU, "resume", *LAUNCH, ZONE="z")
    assert ended.returncode != 0
    assert "PERMISSION_DENIED" in ended.stderr


@pytest.fixture
def cloud(run: Run, tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]:
    """Runs an action of tpu.sh with a TPU in a state, and with what its hosts say. Returns the calls of gcloud too."""
    program(tmp_path / "bin" / "gcloud", FAKE_GCLOUD)

    def act(
        *arguments: str, state: str = "ACTIVE", hosts: str = "training", **variables: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        files = {name: tmp_path / name for name in ("CALLS", "STATE", "HOSTS")}
        for name, text in (("CALLS", ""), ("STATE", state), ("HOSTS", hosts)):
            files[name].write_text(text)
        paths = {name: str(path) for name, path in files.items()}
        ended = run(TPU, *arguments, ZONE="z", PAUSE="0", **paths, **variables)
        return ended, files["CALLS"].read_text().splitlines()

    return act


@pytest.mark.parametrize(
    ("hosts", "code", "said"),
    [
        ("ended 0", 0, "training has finished"),
        ("ended 2", 2, "training has ended 2"),
        ("ended 139", 2, "training has ended 139, 3 failures in a row"),
        ("ended 134", 2, "training has ended 134, 3 failures in a row"),
        ("ended 137", 2, "training has ended 137, 3 failures in a row"),
        ("training\nended 137", 2, "training has ended on a host, 3 failures in a row"),
    ],
)
def test_keeping_ends_with_the_training(cloud: Any, hosts: str, code: int, said: str) -> None:
    ended, calls = cloud("keep", *LAUNCH, hosts=hosts, TRIES="3")
    assert ended.returncode == code
    assert said in ended.stdout + ended.stderr
    # After a crash, training is launched again.
    assert sum("launch" in call for call in calls) == (3 if "3 failures" in said else 1)


def test_keeping_tries_again_after_failures_of_gcloud(cloud: Any) -> None:
    # describe, status, stop, launch, status of all and of the first: the second and the fourth call fail.
    ended, calls = cloud("keep", *LAUNCH, hosts="ended 0", FAILING="2 4")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("is tried again") == 2
    assert [word for call in calls for word in ("describe", "status", "stop", "launch") if f" {word}" in call or
            f"host.sh {word}" in call] == [
        "describe", "status", "describe", "status", "describe", "status", "stop", "launch", "status", "status",
    ]  # fmt: skip
    ended, _ = cloud("keep", *LAUNCH, hosts="ended 0", FAILING=" ".join(map(str, range(99))), TRIES="4")
    assert ended.returncode == 2
    assert "4 failures in a row" in ended.stderr


def test_keeping_waits_on_in_the_queue_if_gcloud_fails(cloud: Any) -> None:
    queued = "WAITING_FOR_RESOURCES\n" * 4 + "ACTIVE"
    ended, calls = cloud("keep", *LAUNCH, state=queued, hosts="ended 0", FAILING="2 3 5", TRIES="3")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("UNAVAILABLE") == 3
    assert "is tried again" not in ended.stderr  # it is one resume
    assert [" describe" in call for call in calls] == [True] * 8 + [False] * 5
    ended, calls = cloud("keep", *LAUNCH, state=queued, hosts="ended 0", FAILING="2 3", TRIES="2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("resume has failed") == 1


@pytest.mark.parametrize(("crashes", "code"), [("2 6", 2), pytest.param("2 34", 0, marks=pytest.mark.slow)])
def test_crashes_count_unless_training_goes_on_for_a_while(cloud: Any, tmp_path: Path, crashes: str, code: int) -> None:
    """Training has crashed at each of the looks in $CRASHES. Every other look is keep's, and the rest are resume's."""
    program(tmp_path / "bin" / "gcloud", FAKE_GCLOUD.replace('cat "$HOSTS"', LOOKS).replace('head -n 1 "$HOSTS"', LAST))
    ended, _ = cloud("keep", *LAUNCH, CRASHES=crashes, LOOKS=str(tmp_path / "looks"), TRIES="2")
    assert ended.returncode == code, ended.stdout + ended.stderr


def installs(host: Path) -> list[str]:
    calls = (host / "uv.calls").read_text().splitlines()
    return [call for call in calls if call.startswith("pip install")]


def test_keeping_installs_a_tpu_on_which_that_has_failed(cloud: Any, tmp_path: Path) -> None:
    """Calls of gcloud: describe, create, describe, scp. The scp fails, because the hosts do not answer yet."""
    host, temporary = tmp_path / "host", tmp_path / "temporary"
    program(host / ".local" / "bin" / "uv", FAKE_UV)
    temporary.mkdir()
    (host / "codes").write_text("137\n")
    places = {"HOST": str(host), "TMPDIR": str(temporary)}
    ended, calls = cloud("keep", *LAUNCH, state="", FAILING="4", **places)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("is tried again") == 1
    assert sum(" scp " in call for call in calls) == 2
    assert sum("host.sh launch coco" in call for call in calls) == 2  # the first one ended with 137
    assert len(installs(host)) == 1
    assert not list(temporary.iterdir())
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, text=True)
    assert (host / "imgcap_jax" / "installed").read_text() == commit
    # A host with another commit gets this one before the launch.
    (host / "imgcap_jax" / "installed").write_text("0" * 40)
    ended, calls = cloud("resume", *LAUNCH, **places)
    assert ended.returncode == 0, ended.stderr
    assert len(installs(host)) == 2
    assert calls[-1].endswith("host.sh launch coco --run gs://b/r")
    assert (host / "imgcap_jax" / "installed").read_text() == commit
    # If the installation fails, the host does not count as installed.
    program(host / ".local" / "bin" / "uv", "#!/usr/bin/env bash\nexit 1\n")
    ended, _ = cloud("setup", **places)
    assert ended.returncode != 0
    assert not (host / "imgcap_jax" / "installed").exists()
    assert not list(temporary.iterdir())


def test_creating_fails_if_the_state_is_not_known(cloud: Any) -> None:
    ended, calls = cloud("create", state="", FAILING="2 3", TRIES="2")
    assert ended.returncode == 2
    assert "UNAVAILABLE" in ended.stderr
    assert "is ACTIVE" not in ended.stdout
    assert len(calls) == 3
    ended, _ = cloud("create", state="")
    assert ended.returncode == 0
    assert "imgcap is ACTIVE" in ended.stdout  # and the warning is no part of the state


def test_many_hosts_are_all_asked_before_one_that_ended_counts(cloud: Any) -> None:
    """The output of a first host that ended is longer than a pipe holds."""
    hosts = "ended 137\n" + "training\n" * 20_000
    ended, calls = cloud("resume", *LAUNCH, hosts=hosts)
    assert ended.returncode == 0
    assert "host.sh launch" in calls[-1]


def test_a_host_starts_training_once_and_stops_it_with_sigterm(run: Run, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "scripts" / "tpu", tmp_path / "scripts" / "tpu")
    host = tmp_path / "scripts" / "tpu" / "host.sh"
    program(
        tmp_path / ".venv" / "bin" / "imgcap",
        "#!/usr/bin/env bash\ntrap 'echo saved; exit 143' TERM\nprintf '<%s>' \"$@\"; echo\n"
        "while true; do sleep 0.05; done\n",
    )
    assert run(host, "status").stdout == "ended \n"
    assert "started" in run(host, "launch", "coco", "--run", "gs://b/my run").stdout
    assert run(host, "status").stdout == "training\n"
    assert run(host, "launch", "coco").stdout == "already training\n"
    assert run(host, "stop").returncode == 0
    deadline = time.monotonic() + 10
    while not (tmp_path / "train.exit").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert run(host, "status").stdout == "ended 143\n"
    assert (tmp_path / "train.log").read_text() == "<train><coco><--run><gs://b/my run><--distributed>\nsaved\n"


def test_slurm_submits_itself(run: Run) -> None:
    ended = run(SLURM, "--dry-run", "coco", "--run", "my runs/coco", NODES="2", GPUS="8", PARTITION="gpu")
    submitted, started = commands(ended.stdout)
    assert submitted[0] == "sbatch"
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--partition=gpu"} <= set(submitted)
    assert "--signal=B:USR1@120" in submitted
    assert submitted[-3:] == ["coco", "--run", "my runs/coco"]
    assert started == ["srun", ".venv/bin/imgcap", "train", "coco", "--run", "my runs/coco", "--distributed"]
    assert run(SLURM, "coco", "--run", "my runs/coco", "--dry-run", NODES="2", GPUS="8", PARTITION="gpu").stdout == (
        ended.stdout
    )
    assert run(SLURM, "coco", "--dry-run", SLURM_JOB_ID="7").stdout.startswith("sbatch ")


def test_slurm_submits_nothing_by_mistake(run: Run, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "sbatch", f"#!/usr/bin/env bash\necho >> {tmp_path}/submitted\n")
    for arguments in (["--help"], ["coco", "-h"], ["coco", "--data.batch-size", "8", "--help"]):
        ended = run(SLURM, *arguments)
        assert ended.returncode == 0
        assert ended.stdout.startswith("Trains on the GPUs")
    for name in ("NODES", "GPUS", "CPUS", "HOURS"):
        for value in ("1.5", "0", "-1", "two", "12:00"):
            ended = run(SLURM, "coco", **{name: value})
            assert lines_of(ended) == [f"train.sh: {name}={value} must be a whole number above 0"]
    assert "--run is no experiment" in lines_of(run(SLURM, "--run", "r"))[0]
    assert not (tmp_path / "submitted").exists()
    assert run(SLURM, "coco", NODES="2", HOURS="12").returncode == 0
    assert (tmp_path / "submitted").exists()


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="needs a machine without Slurm")
def test_slurm_says_that_sbatch_is_missing(run: Run) -> None:
    assert lines_of(run(SLURM, "coco")) == [
        "train.sh: sbatch is not installed; submit on a login node of the Slurm cluster"
    ]


def test_slurm_queues_the_job_again_at_the_time_limit_only(run: Run, tmp_path: Path) -> None:
    """srun stands for training: it ends with 143 after SIGTERM, which scancel sends to it, and with 0 otherwise."""
    bin = tmp_path / "bin"
    program(
        bin / "srun",
        f"#!/usr/bin/env bash\necho $$ > {tmp_path}/srun\ntrap 'exit 143' TERM\n"
        f"for i in $(seq ${{STEPS:-400}}); do sleep 0.05; done\n",
    )
    program(
        bin / "scancel", f"#!/usr/bin/env bash\n[ \"$*\" = '--signal=TERM 7' ] && kill -TERM $(cat {tmp_path}/srun)\n"
    )
    program(bin / "scontrol", f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/scontrol\n')
    assert run(SLURM, "coco", SLURM_JOB_ID="7", STEPS="1").returncode == 0
    assert not (tmp_path / "scontrol").exists()
    environment = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    (tmp_path / "srun").unlink()
    job = subprocess.Popen([SLURM, "coco"], env=environment)
    deadline = time.monotonic() + 20
    while not (tmp_path / "srun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
