"""The launch scripts; the cloud, SLURM and Python are replaced by recorders."""

import os
import pathlib
import shutil
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"

# Writes down how it was called; answers as the files beside it say.
_RECORDER = """#!/usr/bin/env bash
name=$(basename "$0")
here=$(dirname "$0")
{ printf '%s' "$name"; printf ' %q' "$@"; printf '\\n'; } >>"$here/calls"
for answer in "$here/answers/$name".*; do
  [[ -e "$answer" ]] || continue
  pattern=$(head -n 1 "$answer")
  [[ " $* " == *$pattern* ]] || continue
  status=$(sed -n 2p "$answer")
  tail -n +3 "$answer"
  rm "$answer"
  exit "$status"
done
exit 0
"""


class Machine:
  """A PATH of recorders and a project whose `local.sh` is one as well."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.bin = path / "bin"
    (self.bin / "answers").mkdir(parents=True)
    self.project = path / "project"
    shutil.copytree(LAUNCH, self.project / "launch")
    self.count = 0
    local = self.project / "launch" / "local.sh"
    local.write_text(
      f'#!/usr/bin/env bash\nexec "{self.bin}/local" "$@"'
      ' "extra=${PPNET_EXTRA:-}" "gpu=${CUDA_VISIBLE_DEVICES:-}"\n'
    )
    self.add("local")

  def add(self, *names: str) -> None:
    for name in names:
      (self.bin / name).write_text(_RECORDER)
      (self.bin / name).chmod(0o755)

  def answer(
    self, name: str, pattern: str, status: int, text: str = ""
  ) -> None:
    """The next call of `name` with `pattern` in it gets this; once."""
    self.count += 1
    path = self.bin / "answers" / f"{name}.{self.count:03}"
    path.write_text(f"{pattern}\n{status}\n{text}")

  def run(self, script: str, *flags: str, **variables: str):
    environment = os.environ | {
      "PATH": f"{self.bin}:{os.environ['PATH']}",
      **variables,
    }
    return subprocess.run(
      ["bash", str(self.project / "launch" / script), *flags],
      capture_output=True,
      text=True,
      env=environment,
      cwd=self.project,
      timeout=60,
      check=False,
    )

  @property
  def calls(self) -> list[str]:
    path = self.bin / "calls"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)


@pytest.fixture
def pod(machine):
  machine.add("gcloud")
  git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
  for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"]):
    subprocess.run([*git, *arguments], cwd=machine.project, check=True)
  return machine


POD = ("--name=pod", "--zone=z", "--type=v5litepod-16", "--version=v2")
JOB = ("--", "--config=configs/quickstart.py", "--workdir=/shared/run")


def verbs(machine) -> list[str]:
  """What gcloud was asked for; of commands on workers, which one."""
  found = []
  for call in machine.calls:
    verb = call.split("tpu-vm ")[1].split()[0]
    if verb == "ssh":
      verb = "job" if "--distributed" in call else "install"
    found.append(verb)
  return found


def test_a_new_slice_is_made_installed_run_and_read(pod):
  result = pod.run("tpu_pod.sh", *POD, "--spot", "--delete", *JOB)
  assert result.returncode == 0, result.stderr
  assert verbs(pod) == [
    "describe",
    "describe",
    "create",
    "scp",
    "install",
    "job",
    "scp",
    "delete",
  ]
  create, job, fetch = pod.calls[2], pod.calls[5], pod.calls[6]
  assert "--accelerator-type=v5litepod-16 --version=v2 --spot" in create
  assert "--worker=all" in job
  assert "local.sh\\ --distributed\\ --config=configs/quickstart.py" in job
  assert "pod:/shared/run" in fetch


def test_a_slice_that_is_ready_is_taken(pod):
  pod.answer("gcloud", "describe", 0, "READY\n")
  result = pod.run("tpu_pod.sh", "--name=pod", "--zone=z", *JOB)
  assert result.returncode == 0, result.stderr
  assert verbs(pod) == ["describe", "scp", "install", "job", "scp"]


def test_a_preempted_slice_is_made_again_and_the_run_goes_on(pod):
  for state in ("READY", "PREEMPTED", "PREEMPTED"):
    pod.answer("gcloud", "describe", 0, f"{state}\n")
  pod.answer("gcloud", "--distributed", 255)
  result = pod.run("tpu_pod.sh", *POD, *JOB)
  assert result.returncode == 0, result.stderr
  assert verbs(pod) == [
    "describe",
    "scp",
    "install",
    "job",
    "describe",
    "describe",
    "delete",
    "create",
    "scp",
    "install",
    "job",
    "scp",
  ]
  assert "restart 1 of 10" in result.stderr


def test_a_run_that_saved_itself_goes_on_and_one_that_failed_does_not(pod):
  for _ in range(4):
    pod.answer("gcloud", "describe", 0, "READY\n")
  pod.answer("gcloud", "--distributed", 75)
  pod.answer("gcloud", "--distributed", 1)
  result = pod.run("tpu_pod.sh", *POD, *JOB)
  assert result.returncode == 1
  assert verbs(pod).count("job") == 2
  assert verbs(pod)[-1] == "scp"  # Its records are what tells why.


def test_dry_run_prints_and_does_nothing(pod):
  result = pod.run("tpu_pod.sh", *POD, "--dry_run", *JOB)
  assert result.returncode == 0, result.stderr
  assert not pod.calls
  lines = result.stdout.splitlines()
  assert [line.split()[0] for line in lines if line.startswith("gcloud")] == [
    "gcloud"
  ] * 5
  assert "create pod" in lines[0]


def test_a_changed_checkout_is_refused(pod):
  (pod.project / "launch" / "new").write_text("x")
  result = pod.run("tpu_pod.sh", *POD, *JOB)
  assert result.returncode == 2
  assert "clean checkout" in result.stderr


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--name=pod", *JOB), "--name and --zone"),
    ((*POD, "--what", *JOB), "got --what"),
    (POD, "after --"),
    ((*POD, "--restarts=x", *JOB), "--restarts to be a number"),
  ],
)
def test_a_wrong_call_is_named(pod, flags, message):
  result = pod.run("tpu_pod.sh", *flags)
  assert result.returncode == 2
  assert message in result.stderr
  assert not pod.calls


def test_slurm_queues_a_run_that_saved_itself_again(machine):
  machine.add("srun", "scontrol")
  machine.answer("srun", "--distributed", 75)
  variables = {
    "SLURM_JOB_ID": "7",
    "SLURM_SUBMIT_DIR": str(machine.project),
  }
  result = machine.run("gpu_slurm.sh", "--config=c.py", **variables)
  assert result.returncode == 75
  install, run, requeue = machine.calls
  assert install.startswith("srun --nodes=1 --ntasks=1")
  assert run.endswith("launch/local.sh --distributed --config=c.py")
  assert requeue == "scontrol requeue 7"
  result = machine.run("gpu_slurm.sh", "--config=c.py", **variables)
  assert result.returncode == 0
  assert len(machine.calls) == 5  # Nothing is queued again.


def test_slurm_script_wants_slurm(machine):
  result = machine.run("gpu_slurm.sh", "--config=c.py", SLURM_JOB_ID="")
  assert result.returncode != 0
  assert "sbatch" in result.stderr


def test_gpus_of_one_machine(machine):
  result = machine.run("gpu_local.sh", "--config=c.py", PATH="/usr/bin:/bin")
  if not shutil.which("nvidia-smi", path="/usr/bin:/bin"):
    assert result.returncode == 1
    assert "NVIDIA driver" in result.stderr
  machine.add("nvidia-smi")
  machine.answer("local", "c.py", 75)
  result = machine.run("gpu_local.sh", "--config=c.py", PPNET_RESTARTS="2")
  assert result.returncode == 0, result.stderr
  assert machine.calls[-2:] == ["local --config=c.py extra=cuda gpu="] * 2


SWEEP = ("--config=c.py", "--sweep=seed=0,1")


def test_a_sweep_gives_each_gpu_a_shard_and_ends_in_the_table(machine):
  machine.add("nvidia-smi")
  machine.answer("nvidia-smi", "--list-gpus", 0, "GPU 0\nGPU 1\n")
  folder = machine.path / "out"
  result = machine.run("sweep.sh", *SWEEP, f"--workdir={folder}")
  assert result.returncode == 0, result.stderr
  calls = [call for call in machine.calls if call.startswith("local")]
  shards = sorted(call for call in calls if "--sweep_shard" in call)
  assert [s.split("--sweep_shard=")[1] for s in shards] == [
    "0/2 extra=cuda gpu=0",
    "1/2 extra=cuda gpu=1",
  ]
  assert "--sweep_shard" not in calls[-1]
  assert "--sweep=seed=0\\,1" in calls[-1]
  assert (folder / "shard-1.log").exists()


def test_a_shard_that_fails_is_named_and_fails_the_sweep(machine):
  folder = machine.path / "out"
  machine.answer("local", "--sweep_shard=1/2", 3, "boom\n")
  result = machine.run(
    "sweep.sh",
    *SWEEP,
    "--shards=2",
    f"--workdir={folder}",
    PATH=os.environ["PATH"],
  )
  assert result.returncode == 3
  assert "shard 1 of 2 ended with 3" in result.stderr
  assert "boom" in result.stderr
  result = machine.run("sweep.sh", *SWEEP, "--shards=0", "--workdir=x")
  assert result.returncode == 2


@pytest.mark.skipif(
  shutil.which("shellcheck") is None, reason="shellcheck is not installed"
)
def test_shellcheck_finds_nothing():
  scripts = [str(path) for path in sorted(LAUNCH.glob("*.sh"))]
  result = subprocess.run(
    ["shellcheck", "-x", *scripts], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout


def test_every_script_ends_in_one_python_command():
  for path in LAUNCH.glob("*.sh"):
    if path.name in ("test.sh", "venv.sh", "restart.sh"):
      continue
    text = path.read_text()
    ends = "-m ppnet.main" if path.name == "local.sh" else "local.sh"
    assert ends in text, path
