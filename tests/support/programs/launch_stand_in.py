"""Replaces every program that the launch scripts call, under the name of that program.

tests/test_launch.py installs this file as python, gcloud, xpk, srun, scontrol and kubectl. The
program records its arguments in the folder RECORDS. Under the name python, it ends as the
environment variable PLAN specifies: JSON {process id: [one entry per start]}, with process id 0 if
there is no --process_id. An entry is one of these:

  an int               exit with this code
  [signal name, code]  wait for the signal, then exit with the code
  'ignore SIGTERM'     wait and ignore SIGTERM
  'leave child'        wait for SIGUSR1, start a child that keeps the output open, exit with 7
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time


def main():
  name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
  ids = [a.partition('=')[2] for a in arguments if a.startswith('--process_id=')] or ['0']
  records = pathlib.Path(os.environ['RECORDS'])
  attempt = len(list(records.glob(f'{name}-{ids[0]}-*')))
  plan = json.loads(os.environ['PLAN']).get(ids[0], [0] * 9)
  end = plan[attempt] if name == 'python' else 0
  leaves_child = end == 'leave child'
  end = ['SIGUSR1', 7] if leaves_child else end
  received = []
  if isinstance(end, list):
    signal.signal(getattr(signal, end[0]), lambda *_: received.append(1))
  elif end == 'ignore SIGTERM':
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
  print(f'attempt {attempt}', flush=True)
  print('a line on standard error', file=sys.stderr, flush=True)
  write_record(records, f'{name}-{ids[0]}-{attempt}', [name, *arguments])
  if name == 'gcloud':
    sys.exit(subprocess.run(['bash', '-c', arguments[-1].partition('=')[2]]).returncode)
  if name == 'srun':
    os.execvp(arguments[2], arguments[2:])
  if not isinstance(end, int):
    deadline = time.monotonic() + 30
    while not received:
      time.sleep(0.01)
      if time.monotonic() > deadline:
        sys.exit('no signal arrived')
    print('received a signal', flush=True)
    if leaves_child:
      subprocess.Popen(['sleep', '30'])
    end = end[1]
  sys.exit(end)


def write_record(records, name, argv):
  gpu = os.environ.get('JAX_LOCAL_DEVICE_IDS')
  temporary = records / f'new{os.getpid()}'
  temporary.write_text(json.dumps({'argv': argv, 'gpu': gpu, 'pid': os.getpid()}))
  os.replace(temporary, records / name)


if __name__ == '__main__':
  main()
