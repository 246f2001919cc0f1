"""The launch scripts: the command that they run, and what they do with its exit code."""

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
TRICKY = [
  '--config=configs/in256.py:1.1b-p16',
  '--workdir=gs://bucket/my run',
  '--config.name=it\'s "$HOME" `id` $(id) $$ \\ {x} a;b & c | d * ~ #',
  '--config.data.path=',
  '',
]
TPU = {'TPU_NAME': 'pod', 'ZONE': 'us-central2-b'}
XPK = {
  'NAME': 'run',
  'CLUSTER': 'tpus',
  'ZONE': 'us-east5-a',
  'TPU_TYPE': 'v5litepod-16',
  'IMAGE': 'gcr.io/project/farmer',
}
NEEDS = {'local.sh': {}, 'tpu_pod.sh': TPU, 'xpk.sh': XPK, 'slurm.sbatch': {}}

# Stands in for every program that the scripts call, under its name. It records its arguments, and
# ends as PLAN says: a list of exit codes, one a call, for each --process_id (0 without one).
# [signal, code] waits for that signal first; 'deaf' does not hear SIGTERM; 'orphan' waits for
# SIGUSR1 and fails, but leaves a child behind that keeps its output open.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
process = [a.partition('=')[2] for a in arguments if a.startswith('--process_id=')] or ['0']
records = pathlib.Path(os.environ['RECORDS'])
attempt = len(list(records.glob(f'{name}-{process[0]}-*')))
end = json.loads(os.environ['PLAN']).get(process[0], [0] * 9)[attempt] if name == 'python' else 0
orphan = end == 'orphan'
if orphan:
  end = ['SIGUSR1', 7]
heard = []
if isinstance(end, list):
  signal.signal(getattr(signal, end[0]), lambda *_: heard.append(1))
elif end == 'deaf':
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f'attempt {attempt}', flush=True)
print('careful', file=sys.stderr, flush=True)
gpu = os.environ.get('JAX_LOCAL_DEVICE_IDS')
new = records / f'new{os.getpid()}'
new.write_text(json.dumps({'argv': [name, *arguments], 'gpu': gpu, 'pid': os.getpid()}))
os.replace(new, records / f'{name}-{process[0]}-{attempt}')
if name == 'gcloud':
  sys.exit(subprocess.run(['bash', '-c', arguments[-1].partition('=')[2]]).returncode)
if name == 'srun':
  os.execvp(arguments[2], arguments[2:])
deadline = time.monotonic() + 30
while (end == 'deaf' or isinstance(end, list)) and not heard:
  time.sleep(0.01)
  if time.monotonic() > deadline:
    sys.exit('nothing came')
if heard:
  print('heard', flush=True)
if orphan:
  subprocess.Popen(['sleep', '30'])
sys.exit(end[1] if heard else end)
"""


class Launcher:
  """Runs launch scripts where every program that they call is a stand-in."""

  def __init__(self, folder):
    self.folder = folder
    self.started = []
    (folder / 'bin').mkdir()
    self.records = folder / 'records'
    self.records.mkdir()
    for name in ('python', 'gcloud', 'xpk', 'srun', 'scontrol', 'kubectl'):
      program = folder / 'bin' / name
      program.write_text(f'#!{sys.executable} -IS\n{STAND_IN}')
      program.chmod(0o755)
    self.environment = {
      'PATH': f'{folder / "bin"}:{os.environ["PATH"]}',
      'HOME': str(folder),
      'RECORDS': str(self.records),
      'GRACE': '20',
    }

  def start(self, script, *arguments, plan=None, **environment):
    # Where the tests run in the background SIGINT may be ignored, which processes inherit.
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
    """Exit code, lines of standard output, lines of standard error."""
    process = self.start(script, *arguments, **more)
    out, err = process.communicate(timeout=15)
    return process.returncode, out.splitlines(), err.splitlines()

  def dry(self, script, *arguments, **environment):
    """The commands that the script would run; checks that it runs none."""
    code, out, err = self(script, *arguments, DRY_RUN='1', **environment)
    assert (code, err) == (0, [])
    assert not self.calls()
    return [shlex.split(line) for line in out]

  def calls(self, name=''):
    """What was run, the programs whose name so begins, in the order of their processes."""
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
def test_the_scripts_are_clean(script):
  subprocess.run(['bash', '-n', LAUNCH / script], check=True)
  assert os.access(LAUNCH / script, os.X_OK)
  if not shutil.which('shellcheck'):
    pytest.skip('shellcheck is not installed')
  done = subprocess.run(
    ['shellcheck', LAUNCH / script], capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
  ('script', 'missing'),
  [(s, variable) for s in SCRIPTS for variable in NEEDS[s]]
  + [(s, 'say what to run') for s in SCRIPTS],
)
def test_what_is_missing_gets_one_line(launch, script, missing):
  environment = {k: v for k, v in NEEDS[script].items() if k != missing}
  arguments = [] if missing == 'say what to run' else TRICKY
  if script == 'local.sh':
    arguments = ['2', *arguments]
  code, out, err = launch(script, *arguments, **environment)
  assert (code, out) == (2, [])
  (line,) = err
  assert line.startswith('error: ') and missing in line
  assert not launch.calls()


@pytest.mark.parametrize('arguments', [[], ['0', '--a'], ['two', '--a'], TRICKY])
def test_local_needs_a_number(launch, arguments):
  code, out, (line,) = launch('local.sh', *arguments)
  assert (code, out) == (2, []) and 'how many processes' in line


def test_local_dry(launch):
  lines = launch.dry('local.sh', '2', *TRICKY, PORT='1234')
  for i, line in enumerate(lines):
    assert line == [
      *('env', f'JAX_LOCAL_DEVICE_IDS={i}', *JOB, '--coordinator=localhost:1234'),
      *('--num_processes=2', f'--process_id={i}', *TRICKY),
    ]
  (line,) = launch.dry('local.sh', '1', *TRICKY)
  assert line[:3] == JOB and line[4:] == ['--num_processes=1', '--process_id=0', *TRICKY]
  assert re.fullmatch(r'--coordinator=localhost:\d+', line[3])


def test_local_runs_all_and_marks_their_lines(launch):
  code, out, err = launch('local.sh', '3', *TRICKY)
  assert (code, err) == (0, [])
  assert sorted(out) == sorted(f'[{i}] {t}' for i in range(3) for t in ('attempt 0', 'careful'))
  calls = launch.calls()
  assert [call['gpu'] for call in calls] == ['0', '1', '2']
  assert len({call['argv'][3] for call in calls}) == 1, 'one coordinator'
  for i, call in enumerate(calls):
    assert call['argv'][4:] == ['--num_processes=3', f'--process_id={i}', *TRICKY]


def test_local_ends_all_when_one_fails(launch):
  """The code is that of the first, though another answers with 75 and one has to be killed."""
  plan = {'0': [['SIGTERM', 75]], '1': ['orphan'], '2': ['deaf']}
  process = launch.start('local.sh', '3', '--a', plan=plan, GRACE='1')
  launch.wait_for_calls(3)
  os.kill(launch.calls('python-1')[0]['pid'], signal.SIGUSR1)
  out, err = process.communicate(timeout=15)  # The orphan would hold the pipe for longer.
  assert process.returncode == 7
  assert '[0] heard' in out
  assert err == 'local.sh: process 1 ended with exit code 7\n'
  assert len(launch.calls()) == 3
  assert not any(pathlib.Path(f'/proc/{call["pid"]}').exists() for call in launch.calls())


def test_local_ends_those_that_do_not_follow_a_75(launch):
  process = launch.start('local.sh', '2', '--a', plan={'0': [75, 0], '1': ['deaf', 0]}, GRACE='1')
  process.communicate(timeout=15)
  assert process.returncode == 0
  assert len(launch.calls()) == 4


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
def test_local_passes_signals_on_and_stays_down(launch, name):
  process = launch.start('local.sh', '2', '--a', plan={i: [[name, 75]] for i in '01'})
  launch.wait_for_calls(2)
  process.send_signal(getattr(signal, name))
  process.communicate(timeout=15)
  assert process.returncode == 75
  assert len(launch.calls()) == 2, 'nothing starts again'


def test_local_starts_again_after_75(launch):
  code, out, err = launch('local.sh', '2', *TRICKY, plan={'0': [75, 75, 0], '1': [75, 75, 0]})
  assert code == 0
  assert [line for line in out if line.startswith('[1] attempt')] == [
    f'[1] attempt {i}' for i in range(3)
  ]
  assert [line for line in err if 'again' in line] == [
    f'local.sh: starting again, {i} of 10' for i in (1, 2)
  ]
  assert len(err) == 4
  assert all(call['argv'][6:] == TRICKY for call in launch.calls())
  assert len(launch.calls()) == 6


def test_local_gives_up_after_restarts(launch):
  code, *_ = launch('local.sh', '2', '--a', plan={i: [75] * 3 for i in '01'}, RESTARTS='1')
  assert code == 75
  assert len(launch.calls()) == 4


def test_tpu_pod_dry(launch):
  (line,) = launch.dry('tpu_pod.sh', *TRICKY, **TPU)
  ssh = ['gcloud', 'compute', 'tpus', 'tpu-vm', 'ssh', 'pod', '--zone=us-central2-b']
  assert line[:-1] == [*ssh, '--worker=all']
  assert line[-1].startswith('--command=cd ~/farmer_jax && ')
  remote = shlex.split(line[-1].removeprefix('--command='))
  assert remote == ['cd', '~/farmer_jax', '&&', 'exec', *JOB, '--distributed', *TRICKY]

  more = {'PROJECT': 'mine', 'REPO': '~/my $code', 'PYTHON': '.venv/bin/python'}
  (line,) = launch.dry('tpu_pod.sh', *TRICKY, **TPU, **more)
  assert line[:-1] == [*ssh, '--project=mine', '--worker=all']
  remote = shlex.split(line[-1].removeprefix('--command='))
  assert remote[:5] == ['cd', '~/my $code', '&&', 'exec', '.venv/bin/python']


def test_tpu_pod_gets_the_arguments_through_and_starts_again(launch):
  """The stand-in for gcloud hands the command to a shell, as ssh would."""
  (launch.folder / 'my $code').mkdir()
  plan = {'0': [75, 75, 3]}
  code, _, err = launch('tpu_pod.sh', *TRICKY, plan=plan, REPO='~/my $code', **TPU)
  assert code == 3
  assert len(err) == 2 * 3 + 2 and err[-3] == 'tpu_pod.sh: exit code 75; starting again, 2 of 10'
  runs = [call['argv'] for call in launch.calls('python')]
  assert runs == [[*JOB, '--distributed', *TRICKY]] * 3


def test_xpk(launch):
  (line,) = launch.dry('xpk.sh', *TRICKY, **XPK)
  assert line[:-1] == [
    *('xpk', 'workload', 'create', '--workload=run', '--cluster=tpus', '--zone=us-east5-a'),
    *('--tpu-type=v5litepod-16', '--num-slices=1', '--docker-image=gcr.io/project/farmer'),
    *('--max-restarts=10', '--restart-on-exit-codes=75'),
    '--termination-grace-period-seconds=120',
  ]
  command = shlex.split(line[-1].removeprefix('--command='))
  assert command == ['exec', *JOB, '--distributed', *TRICKY]
  (line,) = launch.dry('xpk.sh', '--a', **XPK, PROJECT='p', NUM_SLICES='2', RESTARTS='0')
  assert {'--project=p', '--num-slices=2', '--max-restarts=0'} < set(line)
  code, *_ = launch('xpk.sh', *TRICKY, **XPK)
  assert code == 0
  assert launch.calls()[0]['argv'][-1].startswith('--command=exec python')


def test_gke(launch):
  """Runs what the header of the manifest says, with other arguments."""
  yaml = pytest.importorskip('yaml')
  text = (LAUNCH / 'gke.yaml').read_text()
  header = '\n'.join(re.findall('^#     (.*)$', text, re.MULTILINE))
  example = '--config=configs/in256.py --workdir=gs://bucket/run'
  assert example in header
  header = header.replace(example, shlex.join(TRICKY))
  header = header.replace('python', shlex.quote(sys.executable))
  header = header.replace('envsubst < launch/gke.yaml | kubectl apply -f -', 'env -0')
  done = subprocess.run(['bash', '-euc', header], capture_output=True, text=True, check=True)
  values = dict(pair.split('=', 1) for pair in done.stdout.split('\0') if pair)
  # What envsubst does, but for variables that are not set: those are an error here.
  body = text[text.index('apiVersion') :]
  manifest = yaml.safe_load(string.Template(body).substitute(values))

  assert (manifest['apiVersion'], manifest['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
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
  assert container['command'] == [*JOB, '--distributed']
  assert container['resources']['limits'] == {'google.com/tpu': 4}
  # What Kubernetes does with args: $$ is $, and $(NAME) a variable.
  assert not any(re.search(r'(?<!\$)(\$\$)*\$\(', a) for a in container['args'])
  assert [a.replace('$$', '$') for a in container['args']] == TRICKY


IN_JOB = {
  'SLURM_JOB_ID': '17',
  'SLURM_CPUS_PER_TASK': '8',
  'SLURM_NTASKS_PER_NODE': '4',
  'SLURM_GPUS_ON_NODE': '4',
}


def test_slurm_dry(launch):
  job = [*JOB, '--distributed', *TRICKY]
  assert launch.dry('slurm.sbatch', *TRICKY) == [['srun', '--gpu-bind=none', *job]]
  (line,) = launch.dry('slurm.sbatch', *TRICKY, **IN_JOB)
  assert line == ['srun', '--gpu-bind=none', '--cpus-per-task=8', *job]


def test_slurm_asks_for_a_signal_to_the_tasks_and_a_process_a_gpu():
  options = re.findall('^#SBATCH --(.*)$', (LAUNCH / 'slurm.sbatch').read_text(), re.MULTILINE)
  values = dict(option.partition('=')[::2] for option in options)
  assert values['signal'] == 'TERM@120', 'with B: the tasks would not get it'
  assert values['gpus-per-node'] == values['ntasks-per-node']
  assert {'requeue', 'open-mode'} < set(values)


@pytest.mark.parametrize(('code', 'requeued'), [(75, True), (1, False), (0, False)])
def test_slurm_queues_again_after_75(launch, code, requeued):
  got, *_ = launch('slurm.sbatch', *TRICKY, **IN_JOB, plan={'0': [code]})
  assert got == code
  assert [c['argv'] for c in launch.calls('python')] == [[*JOB, '--distributed', *TRICKY]]
  requeues = [c['argv'] for c in launch.calls('scontrol')]
  assert requeues == [['scontrol', 'requeue', '17']] * requeued


@pytest.mark.parametrize(
  ('environment', 'message'),
  [
    ({}, 'submit this with sbatch'),
    (IN_JOB | {'SLURM_GPUS_ON_NODE': '8'}, '--ntasks-per-node=4 must be'),
  ],
)
def test_slurm_mistakes_get_one_line(launch, environment, message):
  code, out, (line,) = launch('slurm.sbatch', *TRICKY, **environment)
  assert (code, out) == (2, []) and message in line
  assert not launch.calls()
