"""A stand-in for the server of Weights & Biases 0.31, which stores the history of one run."""

import contextlib
import http.server
import json
import threading


class Server(http.server.ThreadingHTTPServer):
  """`rows` are the logged dicts, and `exit_codes` has an entry for each job that has finished."""

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.rows, self.exit_codes, self.names = [], [], []
    self.url = f'http://127.0.0.1:{self.server_port}'

  def answer(self, query, variables):
    """Answers a GraphQL query."""
    if 'mutation UpsertBucket' in query:
      self.names.append(variables['name'])
    elif 'query RunResumeStatus' in query and self.names:
      return {'model': {'bucket': self._bucket() | self._tails()}}
    return {
      'model': None,
      'upsertBucket': {'bucket': self._bucket(), 'inserted': len(self.names) == 1},
      'createRunFiles': {'runID': 'run', 'uploadHeaders': [], 'files': []},
      'viewer': {'id': 'viewer', 'entity': 'team', 'flags': '{}'},
      'serverInfo': {'cliVersionInfo': {'max_cli_version': '99'}, 'features': []},
    }

  def _bucket(self):
    project = {'id': 'project', 'name': 'tests', 'entity': {'id': 'entity', 'name': 'team'}}
    name = self.names[0] if self.names else 'unknown'
    lines = {'historyLineCount': len(self.rows), 'eventsLineCount': 0, 'logLineCount': 0}
    return {'id': 'run', 'name': name, 'displayName': name, 'project': project, **lines}

  def _tails(self):
    tail = json.dumps([json.dumps(self.rows[-1])] if self.rows else [])
    return {
      'historyTail': tail,
      'eventsTail': '[]',
      'summaryMetrics': '{}',
      'config': '{}',
      'tags': [],
      'wandbConfig': '{"t": 1}',
    }

  def store(self, part):
    """Stores a part of the file stream, which numbers the rows of the history."""
    if history := part.get('files', {}).get('wandb-history.jsonl'):
      self.rows[history['offset'] :] = map(json.loads, history['content'])
    if part.get('complete'):
      self.exit_codes.append(part['exitcode'])


class _Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self):
    body, reply = self.rfile.read(int(self.headers['Content-Length'])), {}
    if self.path.endswith('/graphql'):
      request = json.loads(body)
      reply = {'data': self.server.answer(request['query'], request.get('variables') or {})}
    elif self.path.endswith('/file_stream'):
      self.server.store(json.loads(body))
    data = json.dumps(reply).encode()
    self.send_response(200)
    self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


@contextlib.contextmanager
def running():
  """Context with a server in a thread."""
  server = Server()
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  yield server
  server.shutdown()
  server.server_close()
  thread.join()
