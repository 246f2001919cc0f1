"""Starts gcp-storage-emulator: google_store.py PORT FOLDER. The bucket is called bucket.

The emulator neither returns the generation of an object that is read nor compares it before a
change. TensorStore needs both.
"""

import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

_LOCK = threading.Lock()


def generation(storage, bucket, name):
  try:
    return storage.get_file_obj(bucket, name)['generation']
  except NotFound:
    return '0'


def with_generation(download):
  def handler(request, response, storage, *args, **kwargs):
    with _LOCK:
      download(request, response, storage, *args, **kwargs)
      names = request.params['bucket_name'], request.params['object_id']
      response['x-goog-generation'] = generation(storage, *names)

  return handler


def conditional(upload):
  def handler(request, response, storage):
    with _LOCK:
      expected = request.query.get('ifGenerationMatch')
      names = request.params['bucket_name'], request.query.get('name', [''])[0]
      if expected and expected[0] != generation(storage, *names):
        response.status = HTTPStatus.PRECONDITION_FAILED
      else:
        upload(request, response, storage)

  return handler


def conditional_delete(delete):
  def handler(request, response, storage, *args, **kwargs):
    expected = request.query.get('ifGenerationMatch')
    names = request.params['bucket_name'], request.params['object_id']
    if expected and expected[0] != generation(storage, *names):
      response.status = HTTPStatus.PRECONDITION_FAILED
    else:
      delete(request, response, storage, *args, **kwargs)

  return handler


def main(port, folder):
  objects.download = with_generation(objects.download)
  objects._media_upload = conditional(objects._media_upload)
  objects._multipart_upload = conditional(objects._multipart_upload)
  for _, methods in server.HANDLERS:
    if 'DELETE' in methods and methods['DELETE'] is objects.delete:
      methods['DELETE'] = conditional_delete(objects.delete)
  server.create_server('127.0.0.1', int(port), False, 'bucket', data_dir=folder).run()


if __name__ == '__main__':
  main(*sys.argv[1:])
