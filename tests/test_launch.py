"""The launch scripts: the commands that they run, and how they handle exit codes and signals."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
SCRIPTS = ('local.sh', 'tpu_pod.sh', 'xpk.sh', 'slurm.sbatch')
JOB = ['python', '-m', 'farmer_jax.main']
DISTRIBUTED = [*JOB, '--distributed']
TRICKY = [
  '--config=configs/in256.py:1.1b-p16',
  '--workdir=gs://bucket/my run',
  '--config.name=it\'s "$HOME" `id` $(id) $$ \\ {x} a;b & c | d * ~ #',
  '--config.data.path=',
  '',
]
TPU = {'TPU_NAME': 'pod', 'ZONE': 'us-central2-b'}
XPK = dict(NAME='run', CLUSTER='tpus', ZONE='us-east5-a', TPU_TYPE='v5e-16', IMAGE='gcr.io/farmer')
NEEDS = {'local.sh': {}, 'tpu_pod.sh': TPU, 'xpk.sh': XPK, 'slurm.sbatch': {}}
STAND_IN = pathlib.Path(__file__).parent / 'support' / 'programs' / 'launch_stand_in.py'


class Launcher:
  """Runs launch scripts with stand-ins for all programs that they call."""

  def __init__(self, folder):
    self.folder, self.records, self.started = folder, folder / 'records', []
    for created in folder / 'bin', self.records:
      created.mkdir()
    for name in ('python', 'gcloud', 'xpk', 'srun', 'scontrol', 'kubectl'):
      program = folder / 'bin' / name
      program.write_text(f'#!{sys.executable} -IS\n{STAND_IN.read_text()}')
      program.chmod(0o755)
    self.environment = {
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
      'HOME': str(folder),
      'RECORDS': str(self.records),
      'GRACE': '20',
    }

  def start(self, script, *arguments, plan=None, **environment):
    # Tests in the background may ignore SIGINT, and child processes inherit that.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
      process = subprocess.Popen(
        ['bash', LAUNCH / script, *arguments],
        env=self.environment | {'PLAN': json.dumps(plan or {})} | environment,
        cwd=self.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    finally:
      signal.signal(signal.SIGINT, before)
    self.started.append(process)
    return process

  def __call__(self, script, *arguments, **more):
    """Returns the exit code, and the lines of standard output and standard error."""
    return self.wait(self.start(script, *arguments, **more))

  def wait(self, process):
    out, err = process.communicate(timeout=15)
    return process.returncode, out.splitlines(), err.splitlines()

  def dry(self, script, *arguments, **environment):
    """The commands that DRY_RUN=1 prints; checks that none is run."""
    code, out, err = self(script, *arguments, DRY_RUN='1', **environment)
    assert (code, err) == (0, [])
    assert not self.calls()
    return [shlex.split(line) for line in out]

  def calls(self, name=''):
    """The calls of programs whose name starts with `name`, in the order of processes."""
    return [json.loads(p.read_text()) for p in sorted(self.records.glob(f'{name}*-*'))]

  def wait_for_calls(self, count):
    deadline = time.monotonic() + 10
    while len(self.calls()) < count:
      assert time.monotonic() < deadline
      time.sleep(0.02)


@pytest.fixture(name='launch')
def _launch(tmp_path):
  launcher = Launcher(tmp_path)
  yield launcher
  for process in launcher.started:
    process.kill()
    process.wait()


@pytest.mark.parametrize('script', SCRIPTS)
def test_scripts_pass_shellcheck(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)
  assert os.access(LAUNCH / script, os.X_OK)
  if not shutil.which('shellcheck'):
    pytest.skip('shellcheck is not installed')
  subprocess.run(['shellcheck', LAUNCH / script], check=True)


IN_JOB = dict(
  SLURM_JOB_ID='17', SLURM_CPUS_PER_TASK='8', SLURM_NTASKS_PER_NODE='4', SLURM_GPUS_ON_NODE='4'
)


@pytest.mark.parametrize(
  ('script', 'arguments', 'environment', 'message'),
  [
    *((s, TRICKY, {**NEEDS[s], key: ''}, f'set {key}') for s in SCRIPTS for key in NEEDS[s]),
    *((s, [], NEEDS[s], 'arguments of farmer_jax.main') for s in SCRIPTS[1:]),
    ('local.sh', ['2'], {}, 'arguments of farmer_jax.main'),
    *(('local.sh', a, {}, 'number of processes') for a in ([], ['0', '--a'], ['two'], TRICKY)),
    ('slurm.sbatch', TRICKY, {}, 'submit this script with sbatch'),
    ('slurm.sbatch', TRICKY, IN_JOB | {'SLURM_GPUS_ON_NODE': '8'}, '--ntasks-per-node=4 must be'),
  ],
)
def test_wrong_settings_cause_one_line(launch, script, arguments, environment, message):
  code, out, (line,) = launch(script, *arguments, **environment)
  assert (code, out) == (2, [])
  assert line.startswith('error: ') and message in line
  assert not launch.calls()


def test_local_dry_run(launch):
  lines = launch.dry('local.sh', '2', *TRICKY, PORT='1234')
  job = [*JOB, '--coordinator=localhost:1234', '--num_processes=2']
  for i, line in enumerate(lines):
    assert line == ['env', f'JAX_LOCAL_DEVICE_IDS={i}', *job, f'--process_id={i}', *TRICKY]
  (line,) = launch.dry('local.sh', '1', *TRICKY)
  assert line[:3] == JOB and line[4:] == ['--num_processes=1', '--process_id=0', *TRICKY]
  assert re.fullmatch(r'--coordinator=localhost:\d+', line[3])


def test_local_runs_all_processes_and_labels_their_lines(launch):
  code, out, err = launch('local.sh', '3', *TRICKY)
  assert (code, err) == (0, [])
  assert sorted(out) == sorted(
    f'[{i}] {t}' for i in range(3) for t in ('attempt 0', 'a line on standard error')
  )
  calls = launch.calls()
  assert [call['gpu'] for call in calls] == ['0', '1', '2']
  assert len({call['argv'][3] for call in calls}) == 1, 'one coordinator'
  for i, call in enumerate(calls):
    assert call['argv'][4:] == ['--num_processes=3', f'--process_id={i}', *TRICKY]


def test_local_stops_all_processes_when_one_fails(launch):
  """The exit code is that of the process that failed; another one must be killed."""
  plan = {'0': [['SIGTERM', 75]], '1': ['leave child'], '2': ['ignore SIGTERM']}
  process = launch.start('local.sh', '3', '--a', plan=plan, GRACE='1')
  launch.wait_for_calls(3)
  os.kill(launch.calls('python-1')[0]['pid'], signal.SIGUSR1)
  # The child would hold the pipe for 30 seconds.
  code, out, err = launch.wait(process)
  assert code == 7 and '[0] received a signal' in out
  assert err == ['local.sh: process 1 ended with exit code 7']
  assert len(launch.calls()) == 3
  assert not any(pathlib.Path(f'/proc/{call["pid"]}').exists() for call in launch.calls())


def test_local_kills_processes_that_do_not_exit_after_a_75(launch):
  plan = {'0': [75, 0], '1': ['ignore SIGTERM', 0]}
  assert launch('local.sh', '2', '--a', plan=plan, GRACE='1')[0] == 0
  assert len(launch.calls()) == 4


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_local_forwards_signals_and_does_not_restart(launch, name):
  process = launch.start('local.sh', '2', '--a', plan={i: [[name, 75]] for i in '01'})
  launch.wait_for_calls(2)
  process.send_signal(getattr(signal, name))
  assert launch.wait(process)[0] == 75
  assert len(launch.calls()) == 2


def test_local_restarts_after_75(launch):
  code, out, err = launch('local.sh', '2', *TRICKY, plan={i: [75, 75, 0] for i in '01'})
  assert code == 0
  assert [line for line in out if '[1] att' in line] == [f'[1] attempt {i}' for i in range(3)]
  assert [line for line in err if 'restart' in line] == [
    f'local.sh: restart {i} of 10' for i in (1, 2)
  ]
  assert len(err) == 4
  assert [call['argv'][6:] for call in launch.calls()] == [TRICKY] * 6


def test_local_exits_after_the_last_restart(launch):
  assert launch('local.sh', '2', '--a', plan={i: [75] * 3 for i in '01'}, RESTARTS='1')[0] == 75
  assert len(launch.calls()) == 4


def test_tpu_pod_dry_run(launch):
  (line,) = launch.dry('tpu_pod.sh', *TRICKY, **TPU)
  ssh = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod', '--zone=us-central2-b']
  assert line[:-1] == [*ssh, '--worker=all']
  assert line[-1].startswith('--command=cd ~/farmer_jax && ')
  remote = shlex.split(line[-1].removeprefix('--command='))
  assert remote == ['cd', '~/farmer_jax', '&&', 'exec', *DISTRIBUTED, *TRICKY]
  more = {'PROJECT': 'mine', 'REPO': '~/my $code', 'PYTHON': '.venv/bin/python'}
  (line,) = launch.dry('tpu_pod.sh', *TRICKY, **TPU, **more)
  assert line[:-1] == [*ssh, '--project=mine', '--worker=all']
  remote = shlex.split(line[-1].removeprefix('--command='))
  assert remote[:5] == ['cd', '~/my $code', '&&', 'exec', '.venv/bin/python']


def test_tpu_pod_preserves_arguments_and_restarts_after_75(launch):
  """The stand-in for gcloud runs the command in a shell, as ssh does."""
  (launch.folder / 'my $code').mkdir()
  plan = {'0': [75, 75, 3]}
  code, _, err = launch('tpu_pod.sh', *TRICKY, plan=plan, REPO='~/my $code', **TPU)
  assert code == 3
  assert len(err) == 2 * 3 + 2 and err[-3] == 'tpu_pod.sh: exit code 75; restart 2 of 10'
  assert [call['argv'] for call in launch.calls('python')] == [[*DISTRIBUTED, *TRICKY]] * 3


def test_xpk(launch):
  (line,) = launch.dry('xpk.sh', *TRICKY, **XPK)
  assert line[:-1] == [
    *('xpk', 'workload', 'create', '--workload=run', '--cluster=tpus', '--zone=us-east5-a'),
    *('--tpu-type=v5e-16', '--num-slices=1', '--docker-image=gcr.io/farmer'),
    *('--max-restarts=10', '--restart-on-exit-codes=75'),
    '--termination-grace-period-seconds=120',
  ]
  assert shlex.split(line[-1]) == ['--command=exec', *DISTRIBUTED, *TRICKY]
  (line,) = launch.dry('xpk.sh', '--a', **XPK, PROJECT='p', NUM_SLICES='2', RESTARTS='0')
  assert {'--project=p', '--num-slices=2', '--max-restarts=0'} < set(line)
  assert launch('xpk.sh', *TRICKY, **XPK)[0] == 0
  assert launch.calls()[0]['argv'][-1].startswith('--command=exec python')


def test_gke(launch):
  """Runs the commands in the header of the manifest, with other arguments."""
  yaml = pytest.importorskip('yaml')
  text = (LAUNCH / 'gke.yaml').read_text()
  header = '\n'.join(re.findall('^#     (.*)$', text, re.MULTILINE))
  for example, replacement in (
    ('--config=configs/in256.py --workdir=gs://bucket/run', shlex.join(TRICKY)),
    ('python', shlex.quote(sys.executable)),
    ('envsubst < launch/gke.yaml | kubectl apply -f -', 'env -0'),
  ):
    assert example in header
    header = header.replace(example, replacement)
  done = subprocess.run(['bash', '-euc', header], capture_output=True, text=True, check=True)
  values = dict(pair.split('=', 1) for pair in done.stdout.split('\0') if pair)
  # As envsubst does; a variable that is not set is an error here.
  body = text[text.index('apiVersion') :]
  manifest = yaml.safe_load(string.Template(body).substitute(values))
  assert manifest['kind'] == 'JobSet'
  assert manifest['metadata']['name'] == 'run'
  policy = manifest['spec']['failurePolicy']
  assert policy['maxRestarts'] == 10
  assert policy['rules'][0]['onJobFailureReasons'] == ['PodFailurePolicy']
  (replicated,) = manifest['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert job['parallelism'] == job['completions'] == 4
  (rule,) = job['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['operator']) == ('FailJob', 'NotIn')
  assert 75 in rule['onExitCodes']['values'] and 1 not in rule['onExitCodes']['values']
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never', 'required by podFailurePolicy'
  assert pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'
  (container,) = pod['containers']
  assert container['name'] == rule['onExitCodes']['containerName']
  assert container['command'] == DISTRIBUTED
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  # Kubernetes replaces $$ in args by $, and $(NAME) by a variable.
  assert not any(re.search(r'(?<!\$)(\$\$)*\$\(', a) for a in container['args'])
  assert [a.replace('$$', '$') for a in container['args']] == TRICKY


def test_slurm_dry_run(launch):
  job = [*DISTRIBUTED, *TRICKY]
  assert launch.dry('slurm.sbatch', *TRICKY) == [['srun', '--gpu-bind=none', *job]]
  (line,) = launch.dry('slurm.sbatch', *TRICKY, **IN_JOB)
  assert line == ['srun', '--gpu-bind=none', '--cpus-per-task=8', *job]


def test_slurm_options():
  options = re.findall('^#SBATCH --(.*)$', (LAUNCH / 'slurm.sbatch').read_text(), re.MULTILINE)
  values = dict(option.partition('=')[::2] for option in options)
  assert values['signal'] == 'TERM@120', 'with B: the signal would not reach the tasks'
  assert values['gpus-per-node'] == values['ntasks-per-node']
  assert {'requeue', 'open-mode'} < set(values)


@pytest.mark.parametrize(('code', 'requeued'), [(75, True), (1, False), (0, False)])
def test_slurm_requeues_after_75(launch, code, requeued):
  assert launch('slurm.sbatch', *TRICKY, **IN_JOB, plan={'0': [code]})[0] == code
  assert [c['argv'] for c in launch.calls('python')] == [[*DISTRIBUTED, *TRICKY]]
  requeues = [c['argv'] for c in launch.calls('scontrol')]
  assert requeues == [['scontrol', 'requeue', '17']] * requeued
